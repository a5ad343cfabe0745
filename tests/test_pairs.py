"""Every two policies are compared on every task, as one family of two-sided tests."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from grpo_harness.choice.pairs import best, compare, overall, unbeaten
from grpo_harness.engines.engine import Sample
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import ask, evaluate
from grpo_harness.gate.stats import stratified_p
from grpo_harness.policy import load
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import task_types

ALPHA = 0.01
NO_BOUNDS = MappingProxyType({})
N, K = 96, 4


class Skilled:
    """An engine that answers right with the given chance, by the seed."""

    def __init__(self, questions, skill):
        self.right = {
            prompt: str(problem.answer)
            for prompt, problem in zip(questions.prompts, questions.problems, strict=True)
        }
        self.skill = skill

    def identity(self):
        return {"engine": "skilled", "skill": self.skill}

    def remarks(self):
        return {}

    def sample(self, requests, progress=None):
        return [
            Sample(self.right[r.prompt] if r.seed % 1000 < 1000 * self.skill else "-1", 3, False)
            for r in requests
        ]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three policies with weights of their own."""
    from tests.conftest import save_tiny

    folder = tmp_path_factory.mktemp("three")
    return [load(str(save_tiny(folder / name, seed=i))) for i, name in enumerate("abc")]


@pytest.fixture
def asked(three, tmp_path):
    """A function that evaluates the three on gcd and math, by the skills of each on both."""

    def asked(*skills, names=("gcd", "math"), n=N):
        found = []
        for number, (policy, of) in enumerate(zip(three, skills, strict=False)):
            evaluations = []
            for name, skill in zip(names, of, strict=True):
                questions = ask(policy, task_types()[name], n, settings={"temperature": 1.0})
                # A seed of its own: the draws of two policies of equal skill are independent.
                evaluations.append(
                    evaluate(
                        questions,
                        Skilled(questions, skill),
                        k=K,
                        run_seed=number,
                        store=Store(tmp_path / FILE),
                    )
                )
            found.append(evaluations)
        return found

    return asked


def correct(evaluations):
    return [g.count("correct") for e in evaluations for g in e.groups]


def test_p_values_are_two_sided_and_adjusted_over_all_pairs_and_tasks(asked, three):
    found = asked((0.5, 0.5), (0.6, 0.5), (0.55, 0.4))
    pairs = compare(found, [NO_BOUNDS] * 3, ALPHA)
    wanted = []
    for other, policy in ((0, 1), (0, 2), (1, 2)):
        for part in (slice(0, 1), slice(1, 2), slice(None)):
            now, then = correct(found[policy][part]), correct(found[other][part])
            sides = []
            for a, b in ((now, then), (then, now)):
                d = (np.array(a) - b) / K
                sides.append(
                    max(stratified_p(a, K, b, K), ttest_1samp(d, 0, alternative="less").pvalue)
                )
            wanted.append(min(1, 2 * min(sides)))
    assert [pair.evidence.p for pair in pairs] == pytest.approx(wanted)
    holm = multipletests(wanted, method="holm")[1]
    assert [pair.adjusted for pair in pairs] == pytest.approx(list(holm))
    names = [policy.name for policy in three]
    tasks = ["gcd", "math", "all"]
    rows = [(p.check.reference, p.check.policy, p.check.task_type) for p in pairs]
    order = ((0, 1), (0, 2), (1, 2))
    assert rows == [(names[a], names[b], task) for a, b in order for task in tasks]


def test_the_best_is_proven_better_than_all_others(asked, three):
    a, b, c = (policy.name for policy in three)
    pairs = compare(asked((0.3, 0.3), (0.8, 0.5), (0.3, 0.3)), [NO_BOUNDS] * 3, ALPHA)
    relation = {(p.check.policy, p.check.reference, p.check.task_type): p.relation for p in pairs}
    assert relation[b, a, "gcd"] == relation[b, a, "math"] == relation[b, a, "all"] == "better"
    assert relation[c, b, "gcd"] == relation[c, b, "all"] == "worse"
    assert relation[c, a, "all"] == "not told apart"
    assert (best(pairs), unbeaten(pairs)) == (b, [b])
    assert [p.check.task_type for p in overall(pairs)] == ["all"] * 3
    assert {p.check.verdict for p in pairs if p.relation == "worse"} == {"FAIL"}
    assert {p.check.verdict for p in pairs if p.relation == "better"} == {"PASS"}
    worse = next(p for p in pairs if p.relation == "worse")
    assert worse.check.changed  # it shows the problems that are lost
    assert "proven worse" in worse.check.reason


def test_equal_policies_are_not_told_apart_or_equivalent_and_none_is_best(asked, three):
    pairs = compare(asked((0.5,), (0.5,), (0.2,), names=("gcd",)), [NO_BOUNDS] * 2, ALPHA)
    assert [pair.check.task_type for pair in pairs] == ["gcd"] * 3  # one task is not asked twice
    assert best(pairs) is None
    assert unbeaten(pairs) == [three[0].name, three[1].name]
    (equal,) = (p for p in pairs if p.check.reference == three[0].name and p.relation != "worse")
    assert equal.relation == "not told apart"
    assert equal.check.verdict == "UNPROVEN"
    assert f"{100 * equal.evidence.mde90:.1f} points would have been found" in equal.check.reason
    same = compare(asked((1.0,), (1.0,), names=("gcd",)), [NO_BOUNDS] * 2, ALPHA)
    assert [pair.relation for pair in same] == ["equivalent"]
    assert "5 points or more, either way, is ruled out" in same[0].check.reason


def test_one_that_is_unbeaten_need_not_be_the_best(asked, three):
    """One that beats another, with nothing known of it and a third, is unbeaten alone."""
    pairs = compare(asked((0.6,), (0.4,), (0.2,), names=("gcd",)), [NO_BOUNDS] * 2, ALPHA)
    assert (best(pairs), unbeaten(pairs)) == (three[0].name, [three[0].name])
    first_and_third = 1
    unknown = [
        replace(pair, relation="not told apart") if i == first_and_third else pair
        for i, pair in enumerate(pairs)
    ]
    assert (best(unknown), unbeaten(unknown)) == (None, [three[0].name])


def test_what_cannot_be_judged_is_an_error(asked):
    with pytest.raises(HarnessError, match="16 problems are too few to judge"):
        compare(asked((0.5,), (0.6,), names=("gcd",), n=16), [NO_BOUNDS] * 2, ALPHA)
    one = asked((0.5,), names=("gcd",))
    with pytest.raises(HarnessError, match="both have the same weights"):
        compare([*one, *one], [NO_BOUNDS] * 2, ALPHA)


def test_the_risk_is_that_of_the_family():
    """Policies of equal skill are told apart in few families, by simulation on their counts."""
    from grpo_harness.choice.pairs import _difference
    from grpo_harness.evaluation import Tally
    from grpo_harness.gate.bounds import RATE, Sizes
    from grpo_harness.gate.stats import holm
    from grpo_harness.rules import Terms

    rng, alpha, runs, told_apart = np.random.default_rng(0), 0.2, 200, 0
    sizes = Sizes(RATE.margin, RATE.minimum)
    for _ in range(runs):
        skills = rng.beta(1.4, 0.6, 64)
        sides = [[Tally(K, int(c), 0, 0, 0.0) for c in rng.binomial(K, skills)] for _ in range(3)]
        p = [
            _difference(sides[b], sides[a], sizes, Terms(alpha / 3)).p
            for a, b in ((0, 1), (0, 2), (1, 2))
        ]
        told_apart += min(holm(p)) <= alpha
    assert 0 < told_apart / runs <= alpha + 3 * (alpha * (1 - alpha) / runs) ** 0.5
