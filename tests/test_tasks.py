"""Every task type: what it draws, how it asks, what it takes for true, and who may see it."""

import hashlib
import json
import math
import random
import re
import runpy
import string
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import chisquare

from grpo_harness.rewards.outcome import strictly_correct
from grpo_harness.rewards.rule import read, rule_reward
from grpo_harness.tasks import (
    PROGRAMMING,
    Problem,
    TaskType,
    check_disjoint,
    is_held_out,
    load_task_type,
    make_problems,
    sources,
    task_types,
)

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))

TYPES = sorted(task_types())
MANY = 4000


def draws(name: str, n: int = MANY, seed: int = 7) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [task_types()[name].draw(rng) for _ in range(n)]


def assert_uniform(values: Any, possible: Any) -> None:
    """Every possible value and no other, as often as chance would have it."""
    counts = Counter(values)
    assert set(counts) == set(possible)
    assert chisquare([counts[value] for value in possible]).pvalue > 1e-4


# --- what is drawn ---------------------------------------------------------------------------


def test_there_are_six_task_types() -> None:
    assert {"math", *PROGRAMMING} == set(TYPES) == set(reference.TYPES)
    assert len(PROGRAMMING) == 5
    assert all(task_type.name == name for name, task_type in task_types().items())


def test_math_is_drawn_as_specified() -> None:
    tasks = draws("math", 20_000)
    assert all(list(task) == ["op", "a", "b"] for task in tasks)
    assert_uniform([task["op"] for task in tasks], ["add", "sub", "mul", "div"])
    division = [task for task in tasks if task["op"] == "div"]
    assert all(task["a"] % task["b"] == 0 for task in division)
    assert_uniform([task["b"] for task in division], range(2, 20))
    assert_uniform([task["a"] // task["b"] for task in division], range(-20, 21))
    for op in ("add", "sub", "mul"):
        others = [task for task in tasks if task["op"] == op]
        assert_uniform([task["a"] for task in others], range(-99, 100))
        assert_uniform([task["b"] for task in others], range(-99, 100))


def test_gcd_is_drawn_as_specified() -> None:
    tasks = draws("gcd", 10_000)
    assert all(list(task) == ["a", "b"] for task in tasks)
    assert_uniform([task["a"] for task in tasks], range(1, 501))
    assert_uniform([task["b"] for task in tasks], range(1, 501))


def test_sort_is_drawn_as_specified() -> None:
    tasks = draws("sort")
    assert all(list(task) == ["arr"] for task in tasks)
    assert_uniform([len(task["arr"]) for task in tasks], range(5, 10))
    assert_uniform([number for task in tasks for number in task["arr"]], range(-50, 51))


def test_palindrome_is_drawn_as_specified() -> None:
    tasks = draws("palindrome", 20_000)
    assert all(list(task) == ["s"] for task in tasks)
    texts = [task["s"] for task in tasks]
    assert_uniform("".join(texts), string.ascii_lowercase)
    # By the length: of 2, 3, 4 letters doubled, and of those with 1, 2, 3 letters behind.
    share = dict.fromkeys(range(3, 9), 0.0)
    for half in (2, 3, 4):
        share[2 * half] += 1 / 6
        for more in (1, 2, 3):
            share[half + more] += 1 / 18
    lengths = Counter(map(len, texts))
    assert set(lengths) == set(share)
    found = [lengths[length] for length in share]
    assert chisquare(found, [p * len(texts) for p in share.values()]).pvalue > 1e-4
    # One half of them mirrored, of the other half those that are palindromes by chance.
    by_chance = (1 / 26 + 5 / 26**2 + 3 / 26**3) / 9
    mirrored = sum(text == text[::-1] for text in texts)
    expected = (0.5 + 0.5 * by_chance) * len(texts)
    assert abs(mirrored - expected) < 4 * math.sqrt(len(texts) / 4)


def test_a_palindrome_by_chance_is_answered_as_one() -> None:
    chance = [task for task in draws("palindrome", 20_000) if len(task["s"]) in (3, 5, 7)]
    answers = Counter(task_types()["palindrome"].answer(task) for task in chance)
    assert answers["YES"] > 10
    for task in chance:
        expected = "YES" if list(task["s"]) == list(reversed(task["s"])) else "NO"
        assert task_types()["palindrome"].answer(task) == expected


def test_reverse_is_drawn_as_specified() -> None:
    tasks = draws("reverse")
    assert all(list(task) == ["s"] for task in tasks)
    assert_uniform([len(task["s"]) for task in tasks], range(4, 11))
    assert_uniform("".join(task["s"] for task in tasks), string.ascii_lowercase)


FORMS = {
    "len": r"len\('([a-z]+)'\)",
    "reversed": r"'([a-z]+)'\[::-1\]",
    "upper": r"'([a-z]+)'\.upper\(\)",
    "abs": r"abs\((-?\d+)\)",
    "sum": r"sum\(\[(-?\d+), (-?\d+), (-?\d+)\]\)",
    "max": r"max\((-?\d+), (-?\d+)\)",
    "min": r"min\((-?\d+), (-?\d+)\)",
}


def test_py_eval_is_drawn_as_specified() -> None:
    tasks = draws("py_eval", 30_000)
    assert all(list(task) == ["expr"] for task in tasks)
    found: dict[str, list[Any]] = {form: [] for form in FORMS}
    for task in tasks:
        ((form, groups),) = [
            (form, match.groups())
            for form, pattern in FORMS.items()
            if (match := re.fullmatch(pattern, task["expr"]))
        ]
        found[form].append(groups)
    assert_uniform([form for form in found for _ in found[form]], FORMS)
    for form in ("len", "reversed", "upper"):
        texts = [text for (text,) in found[form]]
        assert_uniform(map(len, texts), range(3, 9))
        assert_uniform("".join(texts), string.ascii_lowercase)
    for form, places, possible in (
        ("abs", 1, range(-50, 51)),
        ("sum", 3, range(-9, 10)),
        ("max", 2, range(-20, 21)),
        ("min", 2, range(-20, 21)),
    ):
        for place in range(places):
            assert_uniform([int(groups[place]) for groups in found[form]], possible)


# --- how it is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (
            {"type": "math", "op": "add", "a": 30, "b": -45},
            "【数学题】计算：30 + -45\n要求：只输出最终结果（整数），不要解释。\n"
            'TASK={"type":"math","op":"add","a":30,"b":-45}',
        ),
        (
            {"type": "math", "op": "sub", "a": -7, "b": -9},
            "【数学题】计算：-7 - -9\n要求：只输出最终结果（整数），不要解释。\n"
            'TASK={"type":"math","op":"sub","a":-7,"b":-9}',
        ),
        (
            {"type": "math", "op": "mul", "a": 0, "b": 99},
            "【数学题】计算：0 * 99\n要求：只输出最终结果（整数），不要解释。\n"
            'TASK={"type":"math","op":"mul","a":0,"b":99}',
        ),
        (
            {"type": "math", "op": "div", "a": -133, "b": 7},
            "【数学题】计算：-133 // 7\n要求：只输出最终结果（整数），不要解释。\n"
            'TASK={"type":"math","op":"div","a":-133,"b":7}',
        ),
        (
            {"type": "gcd", "a": 12, "b": 500},
            "【编程题】给定 a=12，b=500，输出 gcd(a,b)。\n要求：只输出一个整数，不要解释。\n"
            'TASK={"type":"gcd","a":12,"b":500}',
        ),
        (
            {"type": "sort", "arr": [3, -1, 20, -1, 50]},
            "【编程题】对数组进行升序排序：[3, -1, 20, -1, 50]\n"
            "要求：只输出排序后的数字，用空格分隔，不要解释。\n"
            'TASK={"type":"sort","arr":[3,-1,20,-1,50]}',
        ),
        (
            {"type": "palindrome", "s": "abba"},
            "【编程题】判断字符串是否回文：abba\n要求：只输出 YES 或 NO，不要解释。\n"
            'TASK={"type":"palindrome","s":"abba"}',
        ),
        (
            {"type": "reverse", "s": "hello"},
            "【编程题】把字符串反转：hello\n要求：只输出反转后的字符串，不要解释。\n"
            'TASK={"type":"reverse","s":"hello"}',
        ),
        (
            {"type": "py_eval", "expr": "'abc'[::-1]"},
            "【编程题】求下面 Python 表达式的值：\n'abc'[::-1]\n"
            "要求：只输出表达式的值，不要解释。\n"
            'TASK={"type":"py_eval","expr":"\'abc\'[::-1]"}',
        ),
        (
            {"type": "py_eval", "expr": "sum([-9, 0, 9])"},
            "【编程题】求下面 Python 表达式的值：\nsum([-9, 0, 9])\n"
            "要求：只输出表达式的值，不要解释。\n"
            'TASK={"type":"py_eval","expr":"sum([-9, 0, 9])"}',
        ),
        (
            {"type": "reverse", "s": "回文é"},
            "【编程题】把字符串反转：回文é\n要求：只输出反转后的字符串，不要解释。\n"
            'TASK={"type":"reverse","s":"回文é"}',
        ),
    ],
)
def test_a_prompt_is_worded_to_the_letter(task: dict[str, Any], prompt: str) -> None:
    assert task_types()[task["type"]].prompt(task) == prompt


@pytest.mark.parametrize("name", TYPES)
def test_every_problem_is_worded_and_answered_as_in_the_reference(name: str) -> None:
    rng = random.Random(11)
    for _ in range(500):
        problem = task_types()[name].problem(rng)
        assert next(iter(problem.task)) == "type"
        assert problem.type == problem.task["type"] == name
        lines = problem.prompt.split("\n")
        assert len(lines) == (4 if name == "py_eval" else 3)
        assert problem.prompt == reference.wording(problem.task) + lines[-1]
        assert json.loads(lines[-1].removeprefix("TASK=")) == problem.task
        assert list(json.loads(lines[-1].removeprefix("TASK="))) == list(problem.task)
        outside_texts = lines[-1] if name != "py_eval" else lines[-1].partition('"expr"')[0]
        assert " " not in outside_texts
        assert problem.answer == reference.true_answer(problem.task)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ({"type": "math", "op": "add", "a": 30, "b": -45}, -15),
        ({"type": "math", "op": "sub", "a": -99, "b": 99}, -198),
        ({"type": "math", "op": "mul", "a": -99, "b": -99}, 9801),
        ({"type": "math", "op": "div", "a": -380, "b": 19}, -20),
        ({"type": "gcd", "a": 500, "b": 375}, 125),
        ({"type": "sort", "arr": [3, -1, 20, -1, 7]}, [-1, -1, 3, 7, 20]),
        ({"type": "palindrome", "s": "abcba"}, "YES"),
        ({"type": "palindrome", "s": "abab"}, "NO"),
        ({"type": "reverse", "s": "hello"}, "olleh"),
        ({"type": "py_eval", "expr": "len('abcdefgh')"}, 8),
        ({"type": "py_eval", "expr": "'abc'[::-1]"}, "cba"),
        ({"type": "py_eval", "expr": "'abc'.upper()"}, "ABC"),
        ({"type": "py_eval", "expr": "abs(-50)"}, 50),
        ({"type": "py_eval", "expr": "sum([-9, 4, -9])"}, -14),
        ({"type": "py_eval", "expr": "max(-20, 20)"}, 20),
        ({"type": "py_eval", "expr": "min(-20, 20)"}, -20),
    ],
)
def test_the_true_answer(task: dict[str, Any], answer: Any) -> None:
    assert task_types()[task["type"]].answer(task) == answer


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [None, 0, -1, 5, True, 2.5, "5", [], ["a"], [[1]], {}, "abs(x)"])
def test_a_task_that_cannot_be_read_has_no_answer(name: str, value: Any) -> None:
    task_type = task_types()[name]
    with pytest.raises(KeyError):
        task_type.answer({"type": name, **({"op": "add"} if name == "math" else {})})
    task = {"type": name, **dict.fromkeys(("op", "a", "b", "arr", "s", "expr"), value)}
    tasks = [{**task, "op": op} for op in ("add", "div", value)] if name == "math" else [task]
    for task in tasks:
        try:
            expected = reference.true_answer(task)
        except reference.NoTaskError:
            with pytest.raises((ValueError, TypeError, KeyError)):
                task_type.answer(task)
        else:
            assert task_type.answer(task) == expected


# --- the contract of every task type ---------------------------------------------------------


def assert_contract(task_type: TaskType, problems: list[Problem]) -> None:
    for problem in problems:
        answer = task_type.canonical(problem.task)
        assert answer == answer.strip()
        assert len(answer.splitlines()) == 1
        assert read(problem.prompt, answer, problem.task) == "correct"
        assert strictly_correct(task_type, problem, answer)
        assert rule_reward(problem.prompt, answer, problem.task) == 1.0 - 0.002 * len(answer)
        assert read(problem.prompt, "", problem.task) == "unparsable"
        assert not strictly_correct(task_type, problem, "")
        assert rule_reward(problem.prompt, "") == -1.0
        assert json.loads(json.dumps(problem.task)) == problem.task


@pytest.mark.parametrize("name", TYPES)
def test_the_true_answer_is_correct_and_an_empty_one_is_not(name: str) -> None:
    task_type = task_types()[name]
    assert_contract(task_type, task_type.problems(200))
    assert_contract(task_type, [task_type.problem(random.Random(i)) for i in range(200)])


# --- training sets ---------------------------------------------------------------------------


def prompts(problems: list[Problem]) -> list[str]:
    return [problem.prompt for problem in problems]


def digest(problems: list[Problem]) -> str:
    return hashlib.sha256("\n\n".join(prompts(problems)).encode()).hexdigest()


# What a seed means, on every machine and every Python. A changed hash means that stored runs and
# baselines were made of other problems than today's: bump the version of the task type.
GOLDEN = {
    "make_problems": "a09e6bb762b06492b08532919cb082fd0ec4f3527ed52bcac622092475b919ea",
    "gcd": "13df1794584ad79bfb9b0c8b62dd2061dc57463d6ba72b608533abce1e1cc69a",
    "math": "056cfd7461118cf15116adec26f59265c53ae4e289bdc0ffb5db06c59a3d4512",
    "palindrome": "c9b1717709a55ff3bcc9cb0a4d6735d4c5f32ada94b4ac74ef783d519a1cf14f",
    "py_eval": "7ad757ecf8a38103e0748d27ee3bbb8db64249f383970846b90c16bd2b43fd4a",
    "reverse": "d637ee12084d539063557f6dc0a4615153f00ccd0af732f0deef9fa4bba76509",
    "sort": "72015683694e7f5f387b72374ef29081b52a8a83fa5882c2ccaf4514b773d3bb",
}


def test_a_seed_gives_the_same_training_set_everywhere() -> None:
    assert digest(make_problems(64, 64, 42)) == GOLDEN["make_problems"]


@pytest.mark.parametrize("name", TYPES)
def test_the_evaluation_problems_are_the_same_everywhere(name: str) -> None:
    assert digest(task_types()[name].problems(64)) == GOLDEN[name]


@pytest.mark.parametrize(
    ("n_math", "n_prog"), [(0, 0), (1, 0), (0, 1), (5, 3), (64, 64), (0, 200), (200, 0)]
)
def test_a_training_set_has_the_counts_asked_for(n_math: int, n_prog: int) -> None:
    problems = make_problems(n_math, n_prog, 0)
    types = Counter(problem.type for problem in problems)
    assert types["math"] == n_math
    assert sum(types[name] for name in PROGRAMMING) == n_prog == len(problems) - n_math


@pytest.mark.parametrize(("n_math", "n_prog"), [(-1, 0), (0, -1), (5, -5)])
def test_negative_counts_are_refused(n_math: int, n_prog: int) -> None:
    with pytest.raises(ValueError, match=f"negative: {n_math} and {n_prog}"):
        make_problems(n_math, n_prog, 0)


def test_the_programming_types_are_drawn_uniformly() -> None:
    assert_uniform([problem.type for problem in make_problems(0, 3000, 1)], PROGRAMMING)


def test_a_training_set_is_shuffled() -> None:
    # A mathematics problem is as likely in the first half as in the second.
    first_half = [
        sum(problem.type == "math" for problem in make_problems(50, 50, seed)[:50])
        for seed in range(40)
    ]
    assert len(set(first_half)) > 1
    assert abs(sum(first_half) / 40 - 25) < 4 * 2.52 / math.sqrt(40)


def test_a_training_set_comes_from_its_seed_alone() -> None:
    random.seed(1)
    one = make_problems(30, 30, 5)
    random.seed(2)
    before = random.getstate()
    assert make_problems(30, 30, 5) == one
    assert random.getstate() == before
    assert prompts(make_problems(30, 30, 6)) != prompts(one)


def test_ids_are_unique_and_say_which_prompt() -> None:
    problems = make_problems(500, 1500, 3)
    assert len({problem.id for problem in problems}) == len(problems)
    of_prompt: dict[str, list[str]] = {}
    for problem in problems:
        of_prompt.setdefault(problem.prompt, []).append(problem.id)
    assert any(len(ids) > 1 for ids in of_prompt.values()), "no prompt was drawn twice"
    for prompt, ids in of_prompt.items():
        task_type = json.loads(prompt.split("TASK=")[1])["type"]
        stem = f"{task_type}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"
        assert ids == [stem] + [f"{stem}.{count}" for count in range(2, len(ids) + 1)]


# --- held-out problems -----------------------------------------------------------------------


def test_training_never_sees_what_is_held_out() -> None:
    seen = {prompt for seed in range(60) for prompt in prompts(make_problems(20, 40, seed))}
    assert not any(map(is_held_out, seen))
    asked = {prompt for name in TYPES for prompt in prompts(task_types()[name].problems(100))}
    assert all(map(is_held_out, asked))
    check_disjoint(seen, asked)


@pytest.mark.parametrize("name", TYPES)
def test_one_prompt_in_eight_is_held_out(name: str) -> None:
    rng = random.Random(5)
    drawn = {task_types()[name].problem(rng).prompt for _ in range(3000)}
    share = sum(map(is_held_out, drawn)) / len(drawn)
    assert abs(share - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / len(drawn))


@pytest.mark.parametrize("name", TYPES)
def test_evaluation_problems_are_distinct_and_a_prefix_of_more(name: str) -> None:
    task_type = task_types()[name]
    longest = task_type.problems(120, seed=4)
    assert len(longest) == len(set(prompts(longest))) == 120
    assert len({problem.id for problem in longest}) == 120
    for n in (0, 1, 7, 119):
        assert task_type.problems(n, seed=4) == longest[:n]
    assert task_type.problems(120, seed=5) != longest
    assert task_type.problems(20) == task_type.problems(20, seed=0)


@pytest.mark.parametrize("name", TYPES)
def test_the_id_of_a_prompt_is_the_same_in_training_and_evaluation(name: str) -> None:
    for problem in task_types()[name].problems(5):
        assert problem.id == f"{name}-{hashlib.sha256(problem.prompt.encode()).hexdigest()[:12]}"


def test_a_shared_prompt_is_named() -> None:
    check_disjoint([], [])
    check_disjoint(iter(["a", "b"]), iter(["c"]))
    with pytest.raises(ValueError, match=r"2 problems of the evaluation were trained on.*'a\\n1'"):
        check_disjoint(["b", "a\n1", "x"], ["y", "a\n1", "b", "b"])


# --- a task type of one's own ----------------------------------------------------------------

OWN = '''
from __future__ import annotations

from dataclasses import dataclass

from grpo_harness.tasks import Reading, TaskType, int_field, read_integer


@dataclass
class Range:
    """A dataclass with annotations as texts looks its module up while the file is run."""

    low: int
    high: int


class Double(TaskType):
    name = "{name}"
    range = Range(1, {high})

    def draw(self, rng):
        return {{"n": rng.randint(self.range.low, self.range.high)}}

    def statement(self, task):
        return f"Double {{task['n']}}."

    def requirement(self, task):
        return "Only the number."

    def answer(self, task):
        return 2 * int_field(task, "n")

    def read(self, task, text) -> Reading:
        return read_integer(text, self.answer(task))
'''


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what a test loads."""
    monkeypatch.setattr(sources, "_own", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("grpo_harness_task_"):
            del sys.modules[name]


def own_file(folder: Path, name: str = "double", high: int = 10**6) -> Path:
    path = folder / f"{name}.py"
    path.write_text(OWN.format(name=name, high=high), encoding="utf-8")
    return path


def test_a_built_in_type_is_loaded_by_name(fresh: None) -> None:
    for name in TYPES:
        assert load_task_type(name) is task_types()[name]


def test_a_file_of_ones_own_makes_a_task_type(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_file(tmp_path)
    double = load_task_type(str(path))
    assert double.name == "double"
    assert task_types()["double"] is double
    assert load_task_type(str(path)) is load_task_type("double") is double
    monkeypatch.chdir(tmp_path)
    assert load_task_type("double.py") is double
    problems = double.problems(50)
    assert problems[0].prompt.startswith("Double ")
    assert problems[0].prompt.split("\n")[1:] == ["Only the number."]
    assert all(is_held_out(problem.prompt) for problem in problems)
    assert_contract(double, problems)
    assert rule_reward(problems[0].prompt, "-1", problems[0].task) == -1.004
    assert rule_reward(problems[0].prompt, str(problems[0].answer), problems[0].task) > 0.9
    assert rule_reward('TASK={"type":"double","n":"x"}', "0") == -1.002


def test_a_type_of_ones_own_leaves_training_sets_as_they_are(fresh: None, tmp_path: Path) -> None:
    load_task_type(str(own_file(tmp_path)))
    assert digest(make_problems(64, 64, 42)) == GOLDEN["make_problems"]


def test_a_type_with_too_few_problems_says_how_many_it_has(fresh: None, tmp_path: Path) -> None:
    double = load_task_type(str(own_file(tmp_path, high=40)))
    rng = random.Random(0)
    held_out = {p for _ in range(2000) if is_held_out(p := double.problem(rng).prompt)}
    assert 0 < len(held_out) < 40
    assert len(double.problems(len(held_out))) == len(held_out)
    with pytest.raises(ValueError, match=f"'double' has no more than {len(held_out)} distinct"):
        double.problems(41)


@pytest.mark.parametrize("source", ["chess", "missing.py", "", ".", "math.txt"])
def test_an_unknown_type_is_refused_with_the_known_ones(source: str, fresh: None) -> None:
    with pytest.raises(
        ValueError, match=r"no task type .* known are .*math.* path of its \.py file"
    ):
        load_task_type(source)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "defines 0 subclasses of TaskType: it takes exactly one"),
        ("from grpo_harness.tasks.gcd import Gcd", ValueError, "defines 0 subclasses"),
        (
            OWN.format(name="double", high=9) + "\n\nclass Twice(Double):\n    name = 'twice'\n",
            ValueError,
            "defines 2 subclasses of TaskType: it takes exactly one",
        ),
        (
            OWN.format(name="gcd", high=9),
            ValueError,
            "defines the task type 'gcd', which exists already",
        ),
        (
            OWN.format(name="GCD", high=9),
            ValueError,
            "defines the task type 'GCD', which exists already",
        ),
        *(
            (OWN.format(name=name, high=9), ValueError, "and a name is 1 to 64 letters")
            for name in ("../../evil", "模型-é", "...", "a b", "", "a.", "a\\n::error::", "x" * 65)
        ),
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("import nothing_of_this_name", ModuleNotFoundError, "nothing_of_this_name"),
        ("def", SyntaxError, "invalid syntax"),
        (
            "from grpo_harness.tasks import TaskType\n\n\n"
            "class Empty(TaskType):\n    name = 'empty'\n",
            TypeError,
            "abstract class Empty",
        ),
    ],
)
def test_a_bad_file_is_refused_and_leaves_nothing_behind(
    text: str, error: type[Exception], message: str, fresh: None, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(text, encoding="utf-8")
    before = set(sys.modules), set(task_types())
    for _ in range(2):  # the second time as well: nothing half-loaded is found
        with pytest.raises(error, match=message):
            load_task_type(str(path))
    assert {name for name in sys.modules if "grpo_harness_task" in name} <= before[0]
    assert set(task_types()) == before[1]
    path.write_text(OWN.format(name="mended", high=10**4), encoding="utf-8")
    assert load_task_type(str(path)).name == "mended"


def test_two_files_cannot_define_one_name(fresh: None, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    load_task_type(str(own_file(tmp_path)))
    with pytest.raises(ValueError, match="'double', which exists already"):
        load_task_type(str(own_file(tmp_path / "other")))
