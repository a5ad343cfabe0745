"""Did the reward rule change?

The cases in ``reward_cases.json`` are the rule, written out: for each task type the edge cases,
with the score of each completion and, in ``why``, the purpose of the case. After a changed score,
every stored baseline and every earlier result of a policy is incomparable. If the change is meant,
edit the file by hand: it is small, and its diff shows what changed.
"""

import json
import math
from pathlib import Path

import pytest

from grpo_harness.rewards.outcome import outcome
from grpo_harness.rewards.rule import read
from grpo_harness.tasks import task_types
from grpo_harness.text import escape

FILE = Path(__file__).with_name("reward_cases.json")
CASES = json.loads(FILE.read_text(encoding="utf-8"))

IF_MEANT = (
    f"If the rule was meant to change, edit these cases in {FILE.name} in the same commit, and "
    "record the baselines again with --grpo-record: the old ones follow the old rule."
)


def score(name, grpo_session, cases):
    """Score cases with the configured reward: one number each, or the test fails."""
    prompts = [case["prompt"] for case in cases]
    completions = [case["completion"] for case in cases]
    task = grpo_session.settings.task(task_types()[name])
    scores = task.rewards.functions[0].function(prompts=prompts, completions=completions)
    assert len(scores) == len(cases), f"{len(scores)} scores for {len(cases)} completions"
    return scores


def changes(cases, key, now):
    """Describe every case whose stored value under ``key`` differs from its value in ``now``."""
    return [
        f"case {number} ({case['why']}): {key} {case[key]!r} is stored, now it is {value!r}\n"
        f"    prompt      {escape(case['prompt'].splitlines()[-1])}\n"
        f"    completion  '{escape(case['completion'], 120)}'"
        for number, (case, value) in enumerate(zip(cases, now, strict=True), 1)
        if case[key] != value
    ]


def report(name, changed, what):
    """Fail with all changed cases in one message."""
    if changed:
        pytest.fail(
            f"{len(changed)} of {len(CASES[name])} {name} cases {what}:\n"
            + "\n".join(changed)
            + f"\n{IF_MEANT}",
            pytrace=False,
        )


@pytest.mark.parametrize("name", CASES)
def test_scores(name, grpo_session):
    """Every case has its stored score, to the last bit."""
    cases = CASES[name]
    report(
        name, changes(cases, "score", score(name, grpo_session, cases)), "are scored differently"
    )


@pytest.mark.parametrize("name", CASES)
def test_readings(name):
    """Every case has its stored reading: correct, wrong or unparsable."""
    cases = CASES[name]
    now = [read(case["prompt"], case["completion"]) for case in cases]
    report(name, changes(cases, "reading", now), "are read differently")


def test_what_is_cut_off_is_not_correct(task_type):
    """A completion that the token limit cut off is truncated, also if its text is the answer."""
    for problem in task_type.problems(8):
        right = task_type.wanted(problem)
        if right is None or task_type.reading(problem, right) is None:
            pytest.skip(f"{task_type.name} is judged by its rewards alone")
        assert outcome(task_type, problem, right, truncated=False) == "correct", right
        cut = outcome(task_type, problem, right, truncated=True)
        assert cut == "truncated", f"'{escape(right)}', cut off by the token limit, counts as {cut}"


@pytest.mark.parametrize("name", CASES)
def test_scores_are_finite_and_repeatable(name, grpo_session):
    """Scores are finite, and the same when repeated and in another order."""
    cases = CASES[name]
    first = score(name, grpo_session, cases)
    bad = [value for value in first if not math.isfinite(value)]
    assert not bad, f"{len(bad)} of {len(first)} scores are not finite: {bad[:5]}"
    assert list(score(name, grpo_session, cases)) == list(first), (
        "the same cases scored differently"
    )
    assert list(score(name, grpo_session, cases[::-1])) == list(first)[::-1], (
        "a score depends on the other completions of its batch"
    )
