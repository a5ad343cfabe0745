from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.baseline import Baseline, BaselineError, Record
from harness.checks import Rules
from harness.evaluation import Completion, Evaluation, Group
from harness.policy import Fingerprint
from harness.tasks import task_types

GCD = task_types()["gcd"]
PROBLEMS = GCD.problems(128)
K = 4


def evaluation(outcomes, text="7", policy="new", weights="w"):
    """An evaluation whose completion j of problem i has the outcome ``outcomes(i, j)``."""
    groups = tuple(
        Group(
            problem,
            tuple(
                Completion(
                    text, 3, 1.0 if outcomes(i, j) == "correct" else -1.0, outcomes(i, j), False
                )
                for j in range(K)
            ),
        )
        for i, problem in enumerate(PROBLEMS)
    )
    fingerprint = Fingerprint(weights, "t", "c")
    return Evaluation(policy, policy, fingerprint, GCD, {}, 0, K, ("p",) * len(groups), groups)


def baseline(correct, truncated=0, unparsable=0, log_length=1.0986, error=None):
    """A baseline of 16 samples a problem, all problems alike."""
    record = Record(16, correct, truncated, unparsable, 48, 16 * log_length, 0.0, "")

    def select(evaluation, reward):
        if error:
            raise BaselineError(error)
        return [record] * evaluation.n

    stored = Baseline(Path("x.json"), {"policy": "old"}, {})
    return SimpleNamespace(policy=stored.policy, select=select, same_policy=lambda _: True)


def share(good, bad="wrong"):
    """``good`` of every four completions are correct."""
    return lambda i, j: "correct" if j < good else bad


RULES = Rules(checks=12)


def test_accuracy():
    assert RULES.accuracy(evaluation(share(3)), baseline(12)).name == "PASS"
    failed = RULES.accuracy(evaluation(share(2)), baseline(12))
    assert failed.name == "FAIL"
    assert failed.verdict.delta == pytest.approx(-0.25)


def test_a_failure_shows_number_place_and_problems_escaped():
    check = RULES.accuracy(evaluation(share(2), text="\x1b[31m::error::\u202e"), baseline(12))
    message = check.message()
    for part in ("accuracy", "new", "gcd", "75.0%", "50.0%", "-25.0%", PROBLEMS[0].id):
        assert part in message
    assert "\x1b" not in message
    assert "::" not in message
    assert "\u202e" not in message


def test_truncation_and_unparsable_answers_are_faults_of_their_own():
    now = evaluation(share(2, bad="truncated"))
    assert RULES.truncation(now, baseline(8)).name == "FAIL"
    assert RULES.truncation(now, baseline(8, truncated=8)).name == "PASS"
    assert RULES.unparsable(now, baseline(8)).name == "PASS"
    assert RULES.unparsable(evaluation(share(2, bad="unparsable")), baseline(8)).name == "FAIL"


@pytest.mark.parametrize(("log_length", "name"), [(1.0986, "PASS"), (1.5, "FAIL"), (0.7, "FAIL")])
def test_length_both_ways(log_length, name):
    check = RULES.length(evaluation(share(2)), baseline(8, log_length=log_length))
    assert check.name == name
    assert check.unit == "tokens"


def test_improvement():
    base, better = evaluation(share(1), policy="base"), evaluation(share(2), weights="v")
    assert RULES.improvement([better], [base]).name == "PASS"
    assert RULES.improvement([base], [better]).name == "FAIL"
    assert RULES.no_loss([better], [base]).name == "PASS"
    assert RULES.no_loss([base], [better]).name == "FAIL"
    even = evaluation(share(1), weights="u")
    assert RULES.no_loss([even], [base]).name == "PASS"
    assert RULES.improvement([even], [base]).name == "UNPROVEN"
    assert RULES.improvement([better] * 2, [base] * 2).task_type == "all"


def test_a_trained_policy_that_is_the_base_is_named_by_its_fingerprint():
    base, copy = evaluation(share(1), policy="base"), evaluation(share(3), policy="copy")
    check = RULES.improvement([copy], [base])
    assert check.name == "ERROR"
    assert "copy is the base policy base" in check.reason
    assert str(base.fingerprint) in check.reason


@pytest.mark.parametrize("rule", ["accuracy", "length", "truncation", "unparsable"])
def test_what_cannot_be_compared_or_was_not_scored_is_an_error(rule):
    judge = getattr(RULES, rule)
    not_comparable = judge(evaluation(share(3)), baseline(12, error="not comparable: x"))
    assert (not_comparable.name, not_comparable.reason) == ("ERROR", "not comparable: x")
    failed = evaluation(lambda i, j: "error" if (i, j) == (5, 1) else "correct")
    check = judge(failed, baseline(16))
    assert check.name == "ERROR"
    assert "1 of 512" in check.reason


def test_more_checks_ask_for_more_proof():
    now = evaluation(lambda i, j: "correct" if j < (2 if i < 30 else 3) else "wrong")
    alone, among_many = Rules(checks=1), Rules(checks=10_000)
    assert alone.accuracy(now, baseline(12)).name == "FAIL"
    assert among_many.accuracy(now, baseline(12)).name != "FAIL"
