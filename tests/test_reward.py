"""The reward against a second implementation, against hostile texts, and against the clock."""

import builtins
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_harness.rewards import outcome as outcomes
from grpo_harness.rewards.outcome import OUTCOMES
from grpo_harness.rewards.rule import read, reward_func, rule_reward, task_of
from grpo_harness.tasks import Problem, TaskType, task_types

ROOT = Path(__file__).parent.parent
reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))

thorough = settings(deadline=None, max_examples=250)
quick = settings(deadline=None, max_examples=100)


def prompt_of(**task: Any) -> str:
    return "何か\nTASK=" + json.dumps(task, ensure_ascii=False, separators=(",", ":"))


FIVE = prompt_of(type="math", op="add", a=2, b=3)
ABC = prompt_of(type="reverse", s="cba")


def problem_of(prompt: str) -> tuple[TaskType, Problem]:
    found = task_of(prompt)
    assert found is not None
    task_type, task = found
    return task_type, Problem("x", task_type.name, task, prompt)


def strictly_correct(prompt: str, completion: str) -> bool:
    return outcomes.strictly_correct(*problem_of(prompt), completion)


def outcome(prompt: str, completion: str | None, *, truncated: bool) -> str:
    return outcomes.outcome(*problem_of(prompt), completion, truncated=truncated)


# --- what is asked and what is answered ------------------------------------------------------

small = st.integers(-99, 99)
words = st.text("abcz", max_size=8)
expressions = st.one_of(
    words.map("len('{}')".format),
    words.map("'{}'[::-1]".format),
    words.map("'{}'.upper()".format),
    small.map("abs({})".format),
    st.lists(small, min_size=1, max_size=3).map("sum({})".format),
    st.tuples(small, small).map("max{}".format),
    st.tuples(small, small).map("min{}".format),
)
TASKS = {
    "math": st.builds(
        lambda op, a, b: {"type": "math", "op": op, "a": a, "b": b},
        st.sampled_from(["add", "sub", "mul", "div"]),
        small,
        small,
    ),
    "gcd": st.builds(
        lambda a, b: {"type": "gcd", "a": a, "b": b}, st.integers(0, 500), st.integers(0, 500)
    ),
    "sort": st.lists(small, max_size=5).map(lambda arr: {"type": "sort", "arr": arr}),
    "palindrome": st.one_of(words, words.map(lambda s: s + s[::-1])).map(
        lambda s: {"type": "palindrome", "s": s}
    ),
    "reverse": words.map(lambda s: {"type": "reverse", "s": s}),
    "py_eval": expressions.map(lambda expr: {"type": "py_eval", "expr": expr}),
}

SPACES = ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\u2028"]
SPACES += ["\u2029", " ", "\t", "\u3000", "\xa0", "\u200b", "\ufeff"]
FENCES = ["```", "```", "```python\n", "```py3\n", "``` \n", "```\n", "\n```", "````", "``", "`"]
FENCES += ["```python ", "```答案\n", "~~~"]
NUMBERS = [
    "-",
    "--",
    "\u2212",
    "0",
    "7",
    "-7",
    "+",
    ".5",
    "1e3",
    "1_000",
    "٣",
    "-٣",
    "０",
    "Ⅷ",
    "²",
]
NUMBERS += ["0" * 4299, "0" * 4300, "9" * 4301]
WORDS = [
    "YES",
    "NO",
    "yes",
    "No",
    "I know",
    "eyes",
    "ye",
    "s",
    "yeſ",
    "NOYES",
    "N O",
    "答案是",
    "。",
]
QUOTES = ["'", '"', "''", "’", "“", "\\"]


def inked(answer: Any) -> str:
    return " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


@st.composite
def completions(draw: st.DrawFn, task: dict[str, Any]) -> str:
    """A text with the true answer somewhere in it, more often than chance would have it."""
    try:
        answer = inked(reference.true_answer(task))
    except reference.NoTaskError:
        answer = "0"
    in_arabic = answer.translate({ord("0") + digit: chr(0x660 + digit) for digit in range(10)})
    answers = [answer, answer, f"'{answer}'", f'"{answer}"', in_arabic, answer[::-1]]
    answers += [answer.lower(), answer.replace(" ", ", "), answer[:-1], f"0{answer}"]
    piece = st.one_of(
        st.sampled_from(answers),
        st.sampled_from(SPACES),
        st.sampled_from(FENCES),
        st.sampled_from(NUMBERS + WORDS + QUOTES),
        st.text(max_size=4),
    )
    pieces = draw(st.lists(piece, max_size=7))
    pieces.insert(draw(st.integers(0, len(pieces))), draw(st.sampled_from([*answers, ""])))
    return "".join(pieces)


def assert_as_in_the_reference(prompt: str, completion: str) -> None:
    # hex() shows every bit.
    assert rule_reward(prompt, completion).hex() == reference.reward(prompt, completion).hex()
    assert read(prompt, completion) == reference.reading(prompt, completion)


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_is_that_of_the_reference(name: str) -> None:
    @thorough
    @given(st.data())
    def check(data: st.DataObject) -> None:
        task = data.draw(TASKS[name])
        assert_as_in_the_reference(prompt_of(**task), data.draw(completions(task)))

    check()


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_of_any_text_is_that_of_the_reference(name: str) -> None:
    @quick
    @given(TASKS[name], st.text(st.characters()))
    def check(task: dict[str, Any], completion: str) -> None:
        assert_as_in_the_reference(prompt_of(**task), completion)

    check()


@quick
@given(st.text("a-17 `\n'\"YESNO", max_size=30), st.text("a-17 `\n'\"YESNO", max_size=400))
def test_lengths_count_whole_and_up_to_two_hundred(head: str, tail: str) -> None:
    assert_as_in_the_reference(FIVE, head + tail)
    assert_as_in_the_reference(FIVE, f"5\n{head}{tail}")


def test_the_stored_cases_are_those_of_the_reference() -> None:
    cases = json.loads((ROOT / "suites/reward_cases.json").read_text(encoding="utf-8"))
    assert set(cases) == set(reference.TYPES)
    for case in [case for of_type in cases.values() for case in of_type]:
        prompt, completion = case["prompt"], case["completion"]
        assert case["score"] == reference.reward(prompt, completion), case
        assert case["reading"] == reference.reading(prompt, completion), case
        task = reference.task_in(prompt)
        assert prompt == reference.wording(task) + prompt_of(**task).splitlines()[1], case


# --- the prompt ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (f"{FIVE}\n{prompt_of(type='math', op='add', a=1, b=1)}", "5"),
        (f"TASK={{}} {FIVE}", None),
        (f"TASK=x {FIVE}", "5"),
        (f"TASK= {{}} {FIVE}", "5"),
        ('TASK={"type":"math",\n "op": "add", "a": 2, "b": 3 }', "5"),
        ('TASK={"type":"gcd","a":1,"a":10,"b":15}', "5"),
        ('TASK={"type":"gcd","a":-10,"b":15,"c":null}', "5"),
        ('TASK={"type":"sort","arr":[]}', ""),
        ('TASK={"type":"reverse","s":""}', "''"),
        ('TASK={"type":"reverse","s":"a}b"}', None),
        ('TASK={"type":"palindrome","s":""}', "YES"),
        ('TASK={"type":"py_eval","expr":" abs( -5 ) "}', "5"),
        ('TASK={"type":"py_eval","expr":"sum([+2,3])"}', "5"),
        ('TASK={"type":"py_eval","expr":"max(5 ,4,\\t-9)"}', "5"),
        ('TASK={"type":"py_eval","expr":"len( \'a b_d\' )"}', "5"),
    ],
)
def test_the_first_task_up_to_the_first_brace(prompt: str, answer: str | None) -> None:
    for completion in ("5", "") if answer is None else (answer,):
        assert_as_in_the_reference(prompt, completion)
        assert (read(prompt, completion) == "correct") == (answer is not None)


UNREADABLE = [
    "",
    "TASK=",
    "TASK={",
    "TASK={}",
    "TASK={junk}",
    "TASK=[1]",
    'TASK={"a":1}',
    'TASK={"type":"math"}',
    'TASK={"type":null}',
    'TASK={"type":["math"]}',
    'TASK={"type":{"x":1}}',
    'TASK={"type":"MATH","op":"add","a":2,"b":3}',
    'TASK={"type":"chess","a":2}',
    'TASK={"type":"math","op":"div","a":5,"b":0}',
    'TASK={"type":"math","op":"pow","a":5,"b":1}',
    'TASK={"type":"math","op":["add"],"a":5,"b":0}',
    'TASK={"type":"math","op":"add","a":"2","b":"3"}',
    'TASK={"type":"math","op":"add","a":2.5,"b":2.5}',
    'TASK={"type":"math","op":"add","a":5.0,"b":0}',
    'TASK={"type":"math","op":"mul","a":5,"b":true}',
    'TASK={"type":"math","op":"add","a":NaN,"b":1}',
    'TASK={"type":"math","op":"div","a":1,"b":Infinity}',
    'TASK={"type":"math","op":"add","a":1e999,"b":1}',
    'TASK={"type":"math","op":"add","a":5,"b":' + "0" * 5000 + "}",
    'TASK={"type":"math","op":"add","a":5,"b":' + "1" * 5000 + "}",
    'TASK={"type":"gcd","a":null,"b":5}',
    'TASK={"type":"gcd","a":5,"b":false}',
    'TASK={"type":"sort"}',
    'TASK={"type":"sort","arr":"5"}',
    'TASK={"type":"sort","arr":5}',
    'TASK={"type":"sort","arr":{"5":5}}',
    'TASK={"type":"sort","arr":["5"]}',
    'TASK={"type":"sort","arr":[5.0]}',
    'TASK={"type":"sort","arr":[5,null]}',
    'TASK={"type":"palindrome","s":5}',
    'TASK={"type":"reverse","s":["5"]}',
    'TASK={"type":"reverse","s":null}',
    'TASK={"type":"py_eval","expr":5}',
    'TASK={"type":"py_eval","expr":""}',
    'TASK={"type":"x","y":' + "[" * 100_000 + "}",
    'TASK={"type":"x","y":' + '{"a":' * 100_000 + "}",
]


@pytest.mark.parametrize("prompt", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_prompt_without_a_readable_task_scores_as_incorrect(prompt: str) -> None:
    for completion in ("", "5", "YES", "NO", "''", "'5'", "nan", "5.0", "None"):
        assert rule_reward(prompt, completion) == -1.0 - 0.002 * len(completion)
        assert read(prompt, completion) == "wrong"
        assert_as_in_the_reference(prompt, completion)


def test_no_depth_of_nesting_raises() -> None:
    # Around the interpreter's limit, where parsing may still succeed and what follows may not.
    for depth in (1, 10, 100, *range(900, 1010), 10_000):
        prompt = 'TASK={"type":"sort","arr":' + "[" * depth + "]" * depth + "}"
        assert rule_reward(prompt, "5") == -1.002


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
strange_tasks = st.fixed_dictionaries(
    {"type": st.sampled_from([*TASKS, None, 1])},
    optional={
        field: json_values | st.sampled_from(["add", "div", 0, -1, True, 10**4000])
        for field in ("op", "a", "b", "arr", "s", "expr")
    },
)
strange_prompts = st.one_of(
    st.text(st.characters()),
    st.text(st.characters()).map("TASK={{{}}}".format),
    strange_tasks.map(lambda task: f"TASK={json.dumps(task)}"),
    strange_tasks.map(lambda task: f"TASK={json.dumps(task, ensure_ascii=False)}"),
)


@thorough
@given(strange_prompts, st.text(st.characters()) | st.sampled_from(["5", "YES", "\ud800", ""]))
@example('TASK={"type":"reverse","s":"\ud800"}', "\ud800")
@example('TASK={"type":"palindrome","s":"\\ud800"}', "YES\udfff")
def test_no_two_texts_raise(prompt: str, completion: str) -> None:
    assert_as_in_the_reference(prompt, completion)


# --- expressions -----------------------------------------------------------------------------

HOSTILE = [
    "__import__('os').system('touch {}')",
    "len(__import__('os').listdir('.'))",
    "[open('{}', 'w') for _ in 'x']",
    "'a'.__class__.__mro__",
    "(lambda: 5)()",
    "abs(-5) if True else 0",
    "len('abcde') # len('')",
    "len('abcde'); 5",
    "len('abcde', 'x')",
    "len('abc' 'de')",
    "len(b'abcde')",
    "len(f'abcde')",
    "len('''abcde''')",
    "len('abcd\\n')",
    "'5'[::-2]",
    "'5'[0::-1]",
    "'5'.upper('x')",
    "'5'.lower()",
    "abs(5.0)",
    "abs(True)",
    "abs(2, 3)",
    "abs(2+3)",
    "abs(--5)",
    "abs(- 5)",
    "abs(5,)",
    "abs(005)",
    "abs(0x5)",
    "abs(1_0)",
    "abs(٥)",
    "abs(\xa05)",
    "abs(\x0b5)",
    "\u3000abs(5)",
    "abs(5)\x00",
    "len('abcd\x00')",
    "len('abcd\ud800')",
    "sum([])",
    "sum(5)",
    "sum([2, 3], 0)",
    "sum([[5]])",
    "max(5)",
    "max([5, 4])",
    "max()",
    "max(5, key=4)",
    "9**9**9",
    "'5'*10**10",
    "abs(" + "9" * 4001 + ")",
    "abs(" * 1000 + "5" + ")" * 1000,
]


@pytest.mark.parametrize("expr", HOSTILE, ids=range(len(HOSTILE)))
def test_no_expression_is_run(expr: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    marker = tmp_path / "ran"
    prompt = f"TASK={json.dumps({'type': 'py_eval', 'expr': expr.format(marker)})}"
    with monkeypatch.context() as patch:
        for module, name in ((builtins, "eval"), (builtins, "exec"), (builtins, "compile")):
            patch.setattr(module, name, lambda *args, **_: ran.append(str(args)))
        patch.setattr(os, "system", lambda command: ran.append(command))
        scores = [rule_reward(prompt, text) for text in ("5", "0", "1", "-5", "2", "8", "''")]
    # Python gives some of these a value: the closed list of forms leaves them out.
    assert all(score < -1 for score in scores)
    assert not ran
    assert not marker.exists()


@thorough
@given(
    expressions,
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.sampled_from([*" \t\n\x0b\x0c\xa0\0'\"()[],+-019_.#\\eé\ud800", "::", "max", "٣"]),
            st.booleans(),
        ),
        max_size=3,
    ),
)
def test_an_expression_with_a_value_has_the_value_that_python_gives_it(
    expr: str, changes: list[tuple[int, str, bool]]
) -> None:
    for place, text, instead in changes:
        expr = expr[:place] + text + expr[place + instead :]
    task_type = task_types()["py_eval"]
    try:
        answer = task_type.answer({"type": "py_eval", "expr": expr})
    except ValueError:
        assert changes, "an expression of the seven kinds has a value"
    else:
        assert answer == reference.value_of(expr)


# --- the clock -------------------------------------------------------------------------------

MILLION = 10**6
LONG = {
    text[:12]: (text * (MILLION // len(text) + 1))[:MILLION]
    for text in (
        *("-", "`", "1", " ", "\n", "1 ", "-1", "1-", "- ", "'", '"', "a", "Y", "YE", "N", "YESNO"),
        *("٣", "```\n", "```a\n", "\r\n", "\x1c", "\u2028", "\\", "::", "##", "\u200b", "\ud800"),
        *("}", "TASK={", "0" * 4301 + " ", "9" * 4300 + " "),
    )
}
LONG |= {
    "open fence": "```" + "a" * MILLION,
    "fence, spaces, fence": "```" + " " * MILLION + "```",
    "fence, lines, fence": "```a\n" + "b\n" * (MILLION // 2) + "```",
    "fence, dashes, fence": "```a\n" + "-" * MILLION + "\n```",
    "spaces around": " " * (MILLION // 2) + "5" + " " * (MILLION // 2),
    "spaces between": "5" + " " * MILLION + "5",
}


def seconds(start: float) -> float:
    # Of this process: what else the machine does is left out.
    return time.process_time() - start


@pytest.mark.parametrize("completion", LONG.values(), ids=map(ascii, LONG))
def test_a_million_characters_are_read_at_once(completion: str) -> None:
    for task in (
        {"type": "math", "op": "add", "a": 2, "b": 3},
        {"type": "gcd", "a": 4, "b": 6},
        {"type": "sort", "arr": [3, 1, 2]},
        {"type": "palindrome", "s": "abba"},
        {"type": "reverse", "s": "abc"},
        {"type": "py_eval", "expr": "'abc'.upper()"},
        {"type": "py_eval", "expr": "abs(-5)"},
    ):
        prompt = prompt_of(**task)
        start = time.process_time()
        score = rule_reward(prompt, completion)
        strictly_correct(prompt, completion)
        assert seconds(start) < 2
        assert score in (1.0 - 0.002 * 200, -1.0 - 0.002 * 200)


@pytest.mark.parametrize("text", LONG.values(), ids=map(ascii, LONG))
def test_a_million_characters_of_prompt_are_read_at_once(text: str) -> None:
    for prompt in (text, f"TASK={{{text}}}", prompt_of(type="py_eval", expr=f"sum([1{text}])")):
        start = time.process_time()
        assert rule_reward(prompt, "5") == -1.002
        assert seconds(start) < 2


# --- outcomes, strict reading ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "truncated", "expected"),
    [
        ("5", False, "correct"),
        ("6", False, "wrong"),
        ("five", False, "unparsable"),
        ("", False, "unparsable"),
        ("5", True, "truncated"),
        ("6", True, "truncated"),
        ("", True, "truncated"),
        (None, False, "error"),
        (None, True, "error"),
    ],
)
def test_every_completion_has_one_outcome(
    completion: str | None, truncated: bool, expected: str
) -> None:
    assert outcome(FIVE, completion, truncated=truncated) == expected


@quick
@given(st.data())
def test_the_outcome_says_what_the_reward_says(data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(sorted(TASKS)).flatmap(TASKS.__getitem__))
    prompt, completion = prompt_of(**task), data.draw(completions(task))
    if task.get("op") == "div" and task["b"] == 0:
        return  # no task: no type draws it, and what reads it raises
    found = outcome(prompt, completion, truncated=False)
    assert OUTCOMES.count(found) == 1
    assert found not in ("truncated", "error")
    assert (found == "correct") == (reference.reading(prompt, completion) == "correct")
    assert outcome(prompt, completion, truncated=True) == "truncated"


def test_outcomes_are_five_and_each_once() -> None:
    assert sorted(OUTCOMES) == ["correct", "error", "truncated", "unparsable", "wrong"]


@pytest.mark.parametrize(
    ("prompt", "strict", "lenient_only"),
    [
        (FIVE, ["5", " 5\n"], ["5.", "= 5", "05", "```5```", "5\n6", "٥", "+5", "5 apples"]),
        (ABC, ["abc", "\tabc "], ["'abc'", "abc\nbecause", "```py\nabc\n```"]),
        (
            prompt_of(type="sort", arr=[2, -1]),
            ["-1 2"],
            ["[-1, 2]", "-1  2", "-1,2", "from -1 to 2"],
        ),
        (prompt_of(type="palindrome", s="ab"), ["NO"], ["no", "I know", "NO.", "NO, not YES"]),
        (prompt_of(type="py_eval", expr="'ab'.upper()"), ["AB"], ["'AB'", '"AB"']),
        (prompt_of(type="py_eval", expr="len('ab')"), ["2"], ["2 letters", "len = 2"]),
    ],
)
def test_the_strict_reading_takes_the_answer_alone(
    prompt: str, strict: list[str], lenient_only: list[str]
) -> None:
    for completion in strict:
        assert strictly_correct(prompt, completion)
        assert read(prompt, completion) == "correct"
    for completion in lenient_only:
        assert not strictly_correct(prompt, completion), completion
        assert read(prompt, completion) == "correct", completion


# --- the function that a trainer takes -------------------------------------------------------


def test_none_is_the_empty_text() -> None:
    assert rule_reward(None, None) == rule_reward("", "") == -1.0
    assert rule_reward(FIVE, None) == -1.0
    assert rule_reward(None, "5") == -1.0 - 0.002
    assert reward_func([FIVE, None], [None, "5"]) == [-1.0, -1.0 - 0.002]


def test_texts_are_scored_in_pairs() -> None:
    assert reward_func([FIVE, ABC], ["5", "abd"]) == [1.0 - 0.002, -1.0 - 0.002 * 3]
    assert reward_func(prompts=[], completions=[]) == []


def test_conversations_are_scored_by_their_last_message() -> None:
    system = {"role": "system", "content": "TASK={} 5"}
    prompts = [[system, {"role": "user", "content": FIVE}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in ("5", "6")]
    assert reward_func(prompts, answers) == reward_func([FIVE, FIVE], ["5", "6"])
    assert reward_func([FIVE], answers[:1]) == reward_func(prompts[:1], ["5"])


@pytest.mark.parametrize("empty", [[], [{"role": "assistant"}], [{"content": None}]])
def test_a_conversation_without_a_text_reads_as_empty(empty: list[dict[str, Any]]) -> None:
    assert reward_func([FIVE], [empty]) == [-1.0]
    assert reward_func([empty], ["5"]) == [-1.002]


def test_what_else_a_trainer_passes_is_ignored() -> None:
    extra: dict[str, Any] = {"completion_ids": [[1]], "trainer_state": object(), "answer": ["6"]}
    assert reward_func(prompts=[FIVE], completions=["5"], **extra) == [0.998]


@pytest.mark.parametrize(("prompts", "answers"), [([FIVE], []), ([], ["5"]), ([FIVE], ["5", "5"])])
def test_lists_of_unequal_length_are_refused(prompts: list[Any], answers: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts but {len(answers)} completions"):
        reward_func(prompts, answers)


def test_scores_are_finite_floats() -> None:
    scores = reward_func([FIVE, "", ABC], ["", "x" * 500, "9" * 5000])
    assert all(type(score) is float and math.isfinite(score) for score in scores)


def test_the_reward_needs_the_standard_library_alone() -> None:
    # -S leaves site-packages out, so that an import of anything from there would fail as well.
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'harness')!r})\n"
        "import grpo_harness.rewards.rule\n"
        f"assert grpo_harness.rewards.rule.reward_func([{FIVE!r}], ['5']) == [0.998]\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__main__"}
    assert loaded == {"grpo_harness"}
