"""Tables of the user's as problems: every way to read one, and every way to refuse one."""

import json
import sys
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from grpo_harness.policy import load
from grpo_harness.tasks.dataset import DataError, DatasetSource

ROWS = [
    {"prompt": f"How much is {i} + {i}?", "solution": str(2 * i), "kind": "even" if i % 2 else None}
    for i in range(40)
]


def asked(problems):
    # A number in a CSV file is a number, as in TRL.
    return {(problem.prompt, str(problem.task["solution"])) for problem in problems}


WANTED = {(row["prompt"], row["solution"]) for row in ROWS}


def write(folder, kind):
    """Write the rows in a format; the arguments of a source that reads them."""
    table = Dataset.from_list(ROWS)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        table.to_csv(folder / "a.csv", index=False)
    elif kind == "parquet":
        table.to_parquet(folder / "a.parquet")
    elif kind == "folder":
        table.save_to_disk(folder / "a.folder")
    elif kind == "splits":
        DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(folder / "a.splits")
    return {"path": f"a.{kind}", "home": folder, "split": "test" if kind == "splits" else None}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "splits"])
def test_every_row_of_every_format_is_a_problem(tmp_path, kind):
    source = DatasetSource("sums", **write(tmp_path, kind), answer="solution")
    problems = source.problems(256)
    assert asked(problems) == WANTED
    assert {source.wanted(problem) for problem in problems} == {s for _, s in WANTED}
    assert all(problem.answer == str(problem.task["solution"]) for problem in problems)
    assert all(problem.task.keys() == {"solution", "kind"} for problem in problems)
    assert len({problem.id for problem in problems}) == 40


@pytest.mark.parametrize("name", ["x[1].jsonl", "a*b.jsonl", "?.jsonl"])
def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path, name):
    for file in ("x1.jsonl", "a_b.jsonl", "z.jsonl", name):
        (tmp_path / file).write_text(json.dumps({"prompt": file}))
    (problem,) = DatasetSource("x", name, tmp_path).problems(9)
    assert problem.prompt == name


def test_a_function_returns_a_table(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        f"from datasets import Dataset\ndef rows():\n    return Dataset.from_list({ROWS!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert asked(DatasetSource("sums", "own_rows:rows").problems(256)) == WANTED
    sys.modules.pop("own_rows")


def test_a_transform_makes_the_rows(tmp_path, monkeypatch):
    """As TRL's documentation has it for columns that are None in some rows."""
    (tmp_path / "own_rows.py").write_text(
        "from datasets import Dataset\n"
        "def asked(rows):\n"
        "    return {'prompt': [f'{q}?' for q in rows['question']]}\n"
        "def without_none(rows):\n"
        "    return {k: v for k, v in rows.items() if v[0] is not None}\n"
        "def transformed():\n"
        "    return Dataset.from_list([{'question': 'Why'}]).with_transform(asked)\n"
        "def uneven():\n"
        "    rows = [{'prompt': 'p', 'hint': 'x'}, {'prompt': 'q', 'hint': None}]\n"
        "    return Dataset.from_list(rows).with_transform(without_none)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = DatasetSource("own", "own_rows:transformed").problems(9)
    assert problem.prompt == "Why?"
    with pytest.raises(DataError, match="row 1 of own_rows:uneven: the column hint is in this row"):
        DatasetSource("own", "own_rows:uneven").problems(9)
    sys.modules.pop("own_rows")


def test_the_order_is_that_of_the_ids_and_not_of_the_file(tmp_path):
    """A shorter list is a prefix of a longer one, and shuffled rows are the same problems."""
    one = DatasetSource("sums", **write(tmp_path, "jsonl")).problems(256)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1]))
    two = DatasetSource("sums", "b.jsonl", tmp_path)
    assert [p.id for p in two.problems(256)] == [p.id for p in one]
    assert two.problems(7) == one[:7]


def test_ids_are_of_prompt_and_columns(tmp_path):
    """One prompt with two answers is two problems; a changed column changes the id."""
    rows = [{"prompt": "p", "solution": s} for s in ("1", "2", "2")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = [p.id for p in DatasetSource("sums", "a.jsonl", tmp_path).problems(9)]
    assert len(set(ids)) == 3
    assert Counter(name.partition(".")[0] for name in ids).most_common()[0][1] == 2
    assert sum(name.endswith(".2") for name in ids) == 1


def test_a_column_names_the_rows(tmp_path):
    rows = [{"prompt": "p", "n": 7}, {"prompt": "q", "n": 10}, {"prompt": "r", "n": "../x"}]
    table = Dataset.from_list([{**row, "n": str(row["n"])} for row in rows])
    table.to_parquet(tmp_path / "a.parquet")
    source = DatasetSource("sums", "a.parquet", tmp_path, row_id="n")
    names = {problem.prompt: problem.id for problem in source.problems(9)}
    assert (names["p"], names["q"]) == ("sums-7", "sums-10")
    assert "/" not in names["r"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "n": 1}\n{"prompt": "q", "n": 1}')
    with pytest.raises(DataError, match=r"row 1 of b\.jsonl: n is 1, as in a row before"):
        DatasetSource("sums", "b.jsonl", tmp_path, row_id="n").problems(1)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        (None, [SYSTEM, USER]),
        ("", [USER]),
        ("Be long.", [{"role": "system", "content": "Be long."}, USER]),
    ],
)
def test_a_conversation_goes_through_the_template(tmp_path, tiny_policy, system, wanted):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": [SYSTEM, USER]}))
    source = DatasetSource("talks", "a.jsonl", tmp_path)
    (problem,) = source.problems(1)
    assert source.conversation(problem, system) == wanted
    own = tiny_policy.tokenizer.apply_chat_template(
        wanted, tokenize=False, add_generation_prompt=True
    )
    assert tiny_policy.render(source.conversation(problem, system)) == own


def test_a_text_goes_to_the_policy_as_it_is(tmp_path):
    source = DatasetSource("sums", **write(tmp_path, "jsonl"))
    problem = source.problems(1)[0]
    assert source.conversation(problem, None) == problem.prompt
    with pytest.raises(DataError, match="a prompt that is a text goes to the policy as it is"):
        source.conversation(problem, "Be brief.")


def test_a_template_without_system_messages_is_named(copy):
    from grpo_harness.policy import PolicyError

    (copy / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    policy = load(str(copy))
    assert policy.render([USER]) == "Why?"
    with pytest.raises(PolicyError, match='takes no system message: set system = ""'):
        policy.render([SYSTEM, USER])
    with pytest.raises(PolicyError, match=r"'tokenize': change .* chat_template_kwargs\), or fix"):
        policy.render([USER], tokenize=True)


@pytest.mark.parametrize(
    ("content", "how", "says"),
    [
        ("", {}, "data 'sums': a.jsonl has no rows"),
        ("[]", {"path": "a.json"}, "a.json has no rows"),
        ("prompt,s\n", {"path": "a.csv"}, "a.csv has no rows"),
        ("prompt,s\nfoo,bar,baz\nq,r,s\n", {"path": "a.csv"}, "fewer fields than others: quote"),
        ('{"prompt": "é"}'.encode("latin-1"), {}, "UnicodeDecodeError"),
        ('{"prompt": "x"}\n{"prom', {}, "JSON parse error: Missing a closing quotation mark"),
        (b"PAR1" * 99, {"path": "a.parquet"}, "ArrowInvalid: Parquet"),
        ("prompt\tx\n", {"path": "a.tsv"}, r"a.tsv does not end in .jsonl, .json, .csv, .parquet"),
        ('{"prompt": "x"}', {"config": "main"}, "no name and revision, as data sets of the Hub"),
        ('{"prompt": "x"}', {"revision": "v1"}, "no name and revision, as data sets of the Hub"),
        ('{"prompt": "x"}', {"split": "dev["}, r"Unrecognized instruction format: dev\["),
        ('{"prompt": "x", "prompts": 1}', {}, "has a column prompts, .*: rename the column"),
        ('{"prompt": "x", "log_extra": 1}', {}, "has a column log_extra, .*: rename the column"),
        ('{"prompt": "x"}', {"slices": ("prompt",)}, "slices has 'prompt'"),
        ('{"prompt": "x"}\n{"prompt": [{"role": "user", "content": "x"}]}', {}, "all of one kind"),
        ('{"prompt": [{"role": "user", "content": 7}]}', {}, "prompt is .* a list of messages"),
        ("{oops", {}, "cannot be read as a data set"),
        ('{"prompt": ""}', {}, "row 0 of a.jsonl: prompt is ''"),
        ('{"prompt": 7}', {}, "prompt is 7: it must be a text, or a list of messages"),
        ('{"prompt": []}', {}, r"prompt is \[\]"),
        ('{"prompt": [{"role": "user"}]}', {}, "prompt is .* a list of messages"),
        ('{"question": "x"}', {}, "there is no column 'prompt'; it has question"),
        ('{"prompt": "x"}', {"answer": "solution"}, "no column 'solution'; it has prompt"),
        ('{"prompt": "x"}', {"slices": ("kind",)}, "no column 'kind'"),
        ('{"prompt": "x"}', {"path": "b.jsonl"}, "b.jsonl cannot be read as a data set"),
        ('{"prompt": "x"}', {"path": "below/missing"}, "there is no .*missing"),
        ('{"prompt": "x"}', {"path": "no_module:f"}, "ModuleNotFoundError"),
        ('{"prompt": "x"}', {"path": "json:dumps"}, "json:dumps cannot be read"),
        ('{"prompt": "x"}', {"path": "os:getcwd"}, "it is str, not a Dataset"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, content, how, says):
    path = tmp_path / str(how.get("path", "a.jsonl"))
    if path.suffix and path.parent == tmp_path and path.name != "b.jsonl":
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "below").mkdir()
    with pytest.raises(DataError, match=says) as error:
        DatasetSource("sums", **{"path": "a.jsonl", "home": tmp_path, **how}).problems(1)
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there_is_named(tmp_path):
    how = {**write(tmp_path, "splits"), "split": "dev"}
    with pytest.raises(DataError, match="splits train, test: name one with split"):
        DatasetSource("sums", **how).problems(1)
    assert len(DatasetSource("sums", **{**how, "split": None}).problems(9)) == 1, "train"
    how = {**write(tmp_path, "folder"), "split": "dev"}
    with pytest.raises(DataError, match="it has no splits, so there is no dev"):
        DatasetSource("sums", **how).problems(1)


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"prompt": "x"}')
    assert DatasetSource("sums", "A.JSONL", tmp_path).problems(9)[0].prompt == "x"


def test_the_answer_may_be_a_column_that_rewards_do_not_get(tmp_path):
    """``completion`` is what TRL calls the wanted text; a row may lack it."""
    rows = [{"prompt": "p", "completion": "7", "kind": "a"}, {"prompt": "q", "completion": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = DatasetSource("sums", "a.jsonl", tmp_path, answer="completion")
    problems = {problem.prompt: problem for problem in source.problems(9)}
    assert source.wanted(problems["p"]) == "7"
    assert source.columns(problems["p"]) == {"kind": "a"}
    assert source.wanted(problems["q"]) is None


def test_a_turn_may_have_calls_of_tools_and_no_text(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": prompt}))
    (problem,) = DatasetSource("sums", "a.jsonl", tmp_path).problems(9)
    assert problem.prompt[1]["tool_calls"] == [call]
