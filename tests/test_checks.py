from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_harness.baselines.file import Baseline, BaselineError, Record
from grpo_harness.evaluation import Completion, Evaluation, Group
from grpo_harness.policy.policy import Fingerprint
from grpo_harness.rules import Rules
from grpo_harness.tasks import task_types

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
    ids = tuple(problem.id for problem in PROBLEMS)
    prompts = ("p",) * len(groups)
    return Evaluation(policy, policy, fingerprint, GCD, {}, "r", 0, K, ids, prompts, groups)


def baseline(correct, truncated=0, unparsable=0, log_length=1.0986, error=None):
    """A baseline of 16 samples a problem, all problems alike."""
    record = Record(16, correct, truncated, unparsable, 48, 16 * log_length, 0.0, "", correct, 16)

    def select(evaluation):
        if error:
            raise BaselineError(error)
        return [record] * len(evaluation.plan)

    records = {problem.id: record for problem in PROBLEMS}
    stored = Baseline(Path("x.json"), {"policy": "old"}, records, "")
    return SimpleNamespace(
        policy=stored.policy, records=records, select=select, same_policy=lambda _: True
    )


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
    for part in ("accuracy", "new", "gcd", "75.0%", "50.0%", "-25.0 points", PROBLEMS[0].id):
        assert part in message
    assert "\x1b" not in message
    assert "::" not in message
    assert "\u202e" not in message


def test_truncation_and_unparsable_answers_are_faults_of_their_own():
    now = evaluation(share(2, bad="truncated"))
    check = RULES.truncation(now, baseline(8))
    assert check.name == "FAIL"
    assert "0% -> 50% truncated" in check.changed[0]
    assert RULES.truncation(now, baseline(8, truncated=8)).name == "PASS"
    assert RULES.unparsable(now, baseline(8)).name == "PASS"
    assert RULES.unparsable(evaluation(share(2, bad="unparsable")), baseline(8)).name == "FAIL"


@pytest.mark.parametrize(("log_length", "name"), [(1.0986, "PASS"), (1.5, "FAIL"), (0.7, "FAIL")])
def test_length_both_ways(log_length, name):
    check = RULES.length(evaluation(share(2)), baseline(8, log_length=log_length))
    assert check.name == name
    assert check.unit == "tokens"
    assert bool(check.changed) == (name == "FAIL")
    assert all("-> 3.0 tokens" in line for line in check.changed)


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


def test_sides_that_are_no_pair_are_not_compared():
    base, better = evaluation(share(1), policy="base"), evaluation(share(2), weights="v")
    same_weights = replace(
        evaluation(share(3)), fingerprint=Fingerprint("w", "another tokenizer", "c")
    )
    assert "is the base policy" in RULES.improvement([better, same_weights], [base, base]).reason
    sort = replace(base, task_type=task_types()["sort"])
    assert RULES.no_loss([better], [sort]).name == "ERROR"
    fewer = replace(base, plan=base.plan[:64], groups=base.groups[:64])
    assert "128 problems of gcd were asked" in RULES.no_loss([better], [fewer]).reason
    hotter = replace(base, settings={"temperature": 1.5})
    assert "sampled differently" in RULES.no_loss([better], [hotter]).reason
    for sides in ([[], []], [[better], []]):
        with pytest.raises(ValueError, match="compared in pairs"):
            RULES.improvement(*sides)


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


def test_an_attempt_pools_and_halves_the_risk():
    now = evaluation(lambda i, j: "correct" if j < (2 if i < 30 else 3) else "wrong")
    pooled = now.pooled([now])
    assert pooled.samples == [2 * K] * 128
    assert pooled.accuracy == now.accuracy
    first, second = RULES.accuracy(now, baseline(12)), replace(RULES, attempt=1)
    again = second.accuracy(pooled, baseline(12))
    assert again.verdict.k == 2 * K
    assert again.verdict.p < first.verdict.p
    assert "pooled with the samples of 1 earlier run" in again.reason
    # The p-value between the two thresholds is what half the risk no longer calls proven.
    p = first.verdict.p
    strict = replace(RULES, alpha=1.5 * p * RULES.checks)
    assert strict.accuracy(now, baseline(12)).name == "FAIL"
    assert replace(strict, attempt=1).accuracy(now, baseline(12)).name != "FAIL"


class TestSequential:
    RULES = replace(RULES, sequential=True)

    def stopped(self, now):
        """The evaluation as a run that stops at a decision leaves it."""
        records = [baseline(12).records[problem] for problem in now.plan]
        for n in range(16, now.n + 1, 16):
            if self.RULES.decided(now.groups[:n], records):
                return replace(now, groups=now.groups[:n])
        return now

    def test_a_collapse_is_found_at_the_floor(self):
        now = self.stopped(evaluation(share(0)))
        assert now.n == 64
        check = self.RULES.accuracy(now, baseline(12))
        assert check.name == "FAIL"
        assert check.verdict.n <= 64

    def test_a_steady_policy_passes_early_and_is_judged_on_what_was_drawn(self):
        now = self.stopped(evaluation(share(3)))
        assert 64 <= now.n < 128
        assert self.RULES.accuracy(now, baseline(12)).name == "PASS"
        assert self.RULES.length(now, baseline(12)).verdict.n == now.n
        assert self.RULES.truncation(now, baseline(12)).name == "PASS"

    def test_two_sides_are_compared_on_the_problems_that_both_were_asked(self):
        base, better = evaluation(share(1), policy="base"), evaluation(share(3), weights="v")
        shorter = replace(better, groups=better.groups[:96])
        check = self.RULES.no_loss([shorter, better], [base, base])
        assert check.name == "PASS"
        assert check.verdict.n == 96 + 128

    def test_another_policy_is_judged_by_the_fixed_rule(self):
        now = evaluation(share(3))
        stored = baseline(12)
        stored.same_policy = lambda _: False
        assert self.RULES.accuracy(now, stored) == RULES.accuracy(now, stored)


def test_the_plan_foresees_what_the_rule_can_find():
    plan = RULES.plan(baseline(12), [problem.id for problem in PROBLEMS], K)
    assert (plan.n, plan.k, plan.then) == (128, K, 0.75)
    more = RULES.plan(baseline(12), [problem.id for problem in PROBLEMS], 2 * K)
    assert more.mde90 < plan.mde90
    assert RULES.plan(baseline(12), ["gcd-unknown"], K) is None
