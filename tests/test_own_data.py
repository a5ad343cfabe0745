"""A team's data set and rewards in a repository of its own, from the settings to the verdicts."""

import json
import re
import sys

import pytest
from datasets import load_dataset

from grpo_harness import session
from grpo_harness.tasks.dataset import DatasetSource
from tests.projects import OWN_SUITE, run

REWARDS = '''
import asyncio
import functools
import re

SEEN = []


def accuracy(completions, solution, **kwargs):
    """1 for the right last word, 0 for a wrong one, None for an empty text."""
    SEEN.append(kwargs)
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [None if not t else float(s in t) for t, s in zip(texts, solution, strict=True)]


async def brief(prompts, completions, completion_ids, solution, kind, trainer_state, log_extra,
                log_metric):
    """All arguments by name, and no others."""
    await asyncio.sleep(0)
    log_extra("kind", kind)
    log_metric("share", 0.5)
    return [-len(ids) / 100 for ids in completion_ids]


class Even:
    def __call__(self, completions, kind, **kwargs):
        return [1.0 if k == "even" else None for k in kind]


def _off(completions, by, **kwargs):
    return [by] * len(completions)


partly = functools.partial(_off, by=0.25)
'''

T, R = "pyproject.toml", "our_rewards.py"

TABLE = """
[tool.grpo-harness]
base = "base-policy"
trained = "trained-policy"
problems = 64
samples = 2

[tool.grpo-harness.gate]
allow_floor = true

[tool.grpo-harness.sampling]
max_new_tokens = 2

[tool.grpo-harness.data.sums]
path = "sums.jsonl"
answer = "solution"
rewards = ["our_rewards:accuracy", "our_rewards:brief", "our_rewards:Even", "our_rewards:partly"]
reward_weights = [1.0, 0.5, 2.0, 1.0]
correct = { reward = "accuracy", at_least = 1.0 }
sampling = { max_new_tokens = 3 }
"""


def rows(n=80):
    return [
        {
            "prompt": [{"role": "user", "content": f"How much is {i} + {i}?"}],
            "solution": str(i % 10),
            "kind": "even" if i % 2 == 0 else "odd",
        }
        for i in range(n)
    ]


ROWS = rows()


@pytest.fixture
def team(project):
    """A repository with a data set, four rewards of every kind and one suite."""
    sys.modules.pop("our_rewards", None)
    project.makepyprojecttoml(TABLE)
    project.makepyfile(our_rewards=REWARDS, test_own=OWN_SUITE)
    (project.path / "sums.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for file in project.path.glob("test_*.py"):
        if file.name != "test_own.py":
            file.unlink()
    project.syspathinsert()
    return project


def replaced(team, file, old, new):
    path = team.path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_it_is_recorded_judged_and_reported(team):
    run(team, "--grpo-record", skipped=2)
    result = run(team, "--grpo-report=out")
    assert result.ret in (0, 1)
    assert "not comparable" not in result.stdout.str()
    report = json.loads((team.path / "out" / "report.json").read_text())
    assert [row["metrics"] for row in report["evaluations"]] == [{"share": 0.5}] * 2
    rows = [
        json.loads(line)
        for line in (team.path / "out/samples/trained-policy--sums.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 128
    assert {(row["policy"], row["task_type"]) for row in rows} == {("trained-policy", "sums")}
    together = load_dataset(
        "json",
        data_files=str(team.path / "out/samples/*.jsonl"),
        split="train",
        cache_dir=str(team.path / "cache"),
    )
    assert len(together) == 256
    assert set(together["policy"]) == {"base-policy", "trained-policy"}
    problems = {row["problem"] for row in rows}
    assert len(problems) == 64
    by_prompt = {row["prompt"][0]["content"]: row for row in ROWS}
    for row in rows:
        own = next(r for text, r in by_prompt.items() if text in row["prompt"])
        scores, right = row["rewards"], own["solution"]
        assert row["wanted"] == right
        assert row["prompt"].count("<|im_start|>") == 2, "no system message was asked for"
        assert 1 <= row["tokens"] <= 3
        assert scores["accuracy"] == (None if not row["completion"] else right in row["completion"])
        assert scores["brief"] == pytest.approx(-row["tokens"] / 100)
        assert scores["Even"] == (1.0 if own["kind"] == "even" else None)
        assert scores["_off"] == 0.25
        assert row["logged"] == {"kind": own["kind"]}
        total = (scores["accuracy"] or 0) + 0.5 * scores["brief"] + 2 * (scores["Even"] or 0) + 0.25
        assert row["reward"] == pytest.approx(total)
        if row["outcome"] != "truncated":
            wanted = {None: "unparsable", 0.0: "wrong", 1.0: "correct"}[scores["accuracy"]]
            assert row["outcome"] == wanted


def test_what_rewards_do_is_tried_once_for_all_policies(team, monkeypatch):
    tried = []
    own = session.rewards_digest
    monkeypatch.setattr(session, "rewards_digest", lambda *of: tried.append(of) or own(*of))
    run(team, "--grpo-record", skipped=2)
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (R, "float(s in t)", "1.0", "the reward accuracy changed: '"),
        (R, "-len(ids) / 100", "-len(ids) / 50", "the reward brief changed: '"),
        (
            "pyproject.toml",
            "reward_weights = [1.0, 0.5,",
            "reward_weights = [1.0, 0.7,",
            "the weight of brief was 0.5 and is 0.7.",
        ),
        (T, "at_least = 1.0", "at_least = 0.0", "correct was accuracy >= 1 and is accuracy >= 0."),
        (T, "max_new_tokens = 3", "max_new_tokens = 4", "max_new_tokens was 3"),
        (T, "allow_floor = true", "margin = 0.2", "gate.accuracy.margin was 0.05 and is 0.2"),
        (T, "allow_floor = true", 'margin = "9%"', "gate.accuracy.margin was 0.05 and is 9%"),
        (T, "allow_floor = true", "alpha = 0.02", "gate.alpha was 0.01 and is 0.02"),
        (
            "pyproject.toml",
            'answer = "solution"',
            'answer = "solution"\nsystem = "x"',
            "the prompt is",
        ),
        ("sums.jsonl", '"solution": "3"', '"solution": "4"', "of them are, with other columns"),
    ],
)
def test_what_changed_is_named_before_anything_is_drawn(team, file, old, new, says):
    run(team, "--grpo-record", skipped=2)
    replaced(team, file, old, new)
    sys.modules.pop("our_rewards", None)
    result = run(team, errors=2)
    text = " ".join(result.stdout.str().split())
    assert says in text
    assert "not comparable" in text


def test_rows_that_come_or_go_are_named_as_data(team):
    """They change what rewards are tried on, and not what rewards are."""
    replaced(team, T, "problems = 64", "problems = 80")
    run(team, "--grpo-record", skipped=2)
    replaced(team, T, "problems = 80", "problems = 64")
    data = DatasetSource("sums", "sums.jsonl", team.path)
    gone = data.problems(1)[0].prompt
    fewer = [row for row in ROWS if row["prompt"] != gone]
    assert len(fewer) == 79
    (team.path / "sums.jsonl").write_text("\n".join(map(json.dumps, fewer)))
    result = run(team)
    assert result.ret in (0, 1)
    assert "not comparable" not in result.stdout.str()
    more = [{**ROWS[0], "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(40)]
    (team.path / "sums.jsonl").write_text("\n".join(map(json.dumps, fewer + more)))
    text = " ".join(run(team, errors=2).stdout.str().split())
    assert "are not among its 80, the first" in text
    assert "reward" not in text.partition("not comparable")[2].partition("--grpo-record")[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (T, 'path = "sums.jsonl"', 'pth = "sums.jsonl"', "no key 'pth': did you mean path"),
        (T, 'path = "sums.jsonl"', "", "missing required field `path`"),
        (T, 'answer = "solution"', "answer = 7", "answer is 7"),
        (T, 'reward = "accuracy"', 'reward = "acuracy"', "must be one of accuracy, brief"),
        (T, "[1.0, 0.5, 2.0, 1.0]", "[1.0]", "1 reward_weights for 4 rewards"),
        (T, "correct =", "gate_slices = true\ncorrect =", "gate_slices = true and no slices"),
        (T, "[1.0, 0.5, 2.0, 1.0]", "[nan, 1, 1, 1]", "must be a list of finite numbers"),
        (T, "at_least = 1.0", "at_least = inf", "at_least is inf: .* correct one, finite"),
        (T, "samples = 2", "samples = 2\nreward_seconds = inf", "reward_seconds is inf: it must"),
        (T, "our_rewards:brief", "our_rewards:accuracy", "two rewards of the name accuracy"),
        (T, "our_rewards:brief", "our_rewards:briefe", "can be imported"),
        (T, "max_new_tokens = 3", "max_tokens = 3", "no key 'max_tokens'"),
        (T, "data.sums", "data.gcd", "not that of a built-in"),
        (R, "solution, **kwargs", "answers, **kwargs", "accuracy .* TypeError"),
        (R, "trainer_state, log_extra", "log_extra", "brief .* TypeError"),
        (R, "return [by]", "return [float('nan')]", "_off .* nan"),
        ("sums.jsonl", '"prompt"', '"question"', "there is no column 'prompt'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_the_run_before_weights_are_loaded(
    team, monkeypatch, file, old, new, says
):
    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)
    replaced(team, file, old, new)
    result = run(team, "--grpo-record")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.startswith("ERROR")]
    assert re.search(says, line), line


def test_a_reward_that_hangs_is_named_with_the_completion(team):
    replaced(team, "our_rewards.py", "return [by]", "while by: pass\n    return [by]")
    replaced(team, "pyproject.toml", "problems = 64", "problems = 64\nreward_seconds = 0.2")
    result = run(team, "--grpo-record")
    assert "the reward _off (problem sums-" in result.stderr.str()
    assert "did not return within 0.2 seconds" in result.stderr.str()


def test_a_reward_that_differs_from_call_to_call_is_named(team):
    replaced(team, "our_rewards.py", "return [by]", "import random\n    return [random.random()]")
    result = run(team, "--grpo-record", errors=2)
    text = " ".join(result.stdout.str().split())
    assert re.search(r"the reward _off \(problem sums-\w+, .*'\) scored the same completion", text)


def test_a_task_without_correct_has_rewards_alone(team):
    replaced(team, "pyproject.toml", 'correct = { reward = "accuracy", at_least = 1.0 }', "")
    result = run(team, "--grpo-record", skipped=2)
    assert result.ret == 0


def test_a_data_set_that_is_drawn_greedily_has_one_completion_of_each_problem(team):
    """More would be the same ones, and count as evidence."""
    replaced(team, T, "max_new_tokens = 3", "max_new_tokens = 3, greedy = true")
    run(team, "--grpo-record", skipped=2)
    (content,) = (json.loads(f.read_text()) for f in team.path.glob("baselines/base*/sums.json"))
    assert {problem["k"] for problem in content["problems"].values()} == {1}
    run(team, "--grpo-report=out")
    report = json.loads((team.path / "out" / "report.json").read_text())
    assert [row["k"] for row in report["evaluations"]] == [1, 1]


def test_slices_have_rows_and_are_judged_where_that_is_asked(team):
    (team.path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows(140))))
    replaced(team, T, "problems = 64", "problems = 140")
    replaced(team, T, 'answer = "solution"', 'answer = "solution"\nslices = ["kind"]')
    team.makepyfile(
        test_own="""
        import pytest

        @pytest.mark.grpo("slices")
        def test_slices(evaluation, baseline, gate):
            gate.slices(evaluation, baseline)

        @pytest.mark.grpo("length")
        def test_length(evaluation, baseline, gate):
            gate.length(evaluation, baseline)
        """
    )
    run(team, "--grpo-record", skipped=2, deselected=2)
    run(team, "--grpo-report=out", "--grpo-seed=1", passed=2, deselected=2)
    (row, _) = json.loads((team.path / "out" / "report.json").read_text())["evaluations"]
    assert [(part["of"], part["n"]) for part in row["slices"]] == [
        ("kind=even", 70),
        ("kind=odd", 70),
    ]
    assert "sums kind=even" in (team.path / "out" / "report.md").read_text().replace("&#61;", "=")
    replaced(team, T, 'slices = ["kind"]', 'slices = ["kind"]\ngate_slices = true')
    run(team, "--grpo-report=out")
    checks = json.loads((team.path / "out" / "report.json").read_text())["checks"]
    found = {(c["rule"], c["policy"], c["evidence"]["n"]) for c in checks}
    assert {check for check in found if check[0] != "length"} == {
        (f"slices.kind={kind}", policy, 70)
        for kind in ("even", "odd")
        for policy in ("base-policy", "trained-policy")
    }


def test_prompts_that_are_texts_and_rewards_of_trl(team):
    """A text goes to the policy as it is, and completions are texts; TRL's own reward is used."""
    plain = [{**row, "prompt": row["prompt"][0]["content"]} for row in ROWS]
    (team.path / "sums.jsonl").write_text("\n".join(map(json.dumps, plain)))
    replaced(team, R, "SEEN = []", "from trl.rewards import get_repetition_penalty_reward as make\n"
             "repeats = make(ngram_size=2, max_penalty=-1.0)\nSEEN = []")  # fmt: skip
    replaced(team, T, '"our_rewards:Even"', '"our_rewards:repeats"')
    run(team, "--grpo-record", skipped=2)
    run(team, "--grpo-report=out")
    lines = (team.path / "out/samples/base-policy--sums.jsonl").read_text().splitlines()
    prompts = {row["prompt"] for row in plain}
    assert {json.loads(line)["prompt"] for line in lines} <= prompts
    assert all("repetition_penalty_reward" in json.loads(line)["rewards"] for line in lines)


def test_thinking_is_part_of_a_completion_and_the_template_gets_its_variables(team):
    replaced(team, T, "our_rewards:brief", "trl.rewards:think_format_reward")
    replaced(team, T, 'answer = "solution"', 'answer = "solution"\n'
             'chat_template_kwargs = { enable_thinking = false }')  # fmt: skip
    for name in ("base-policy", "trained-policy"):
        path = team.path / name / "chat_template.jinja"
        path.write_text(
            path.read_text() + "{% if enable_thinking is false %}<think></think>{% endif %}"
        )
    run(team, "--grpo-record", skipped=2)
    run(team, "--grpo-report=out")
    line = (team.path / "out/samples/base-policy--sums.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["prompt"].endswith("<think></think>")
    assert json.loads(line)["rewards"]["think_format_reward"] == 0
