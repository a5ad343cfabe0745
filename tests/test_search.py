"""The first checkpoint that has dropped is found, and what is not proven is not claimed."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from grpo_harness.choice.search import ERROR, GOOD, WOBBLE, bisect
from grpo_harness.gate.stats import BETS


def histories(lost, skill=0.9, drop=0.8, seed=0, k=4, most=4096):
    """Rates of checkpoints that have lost these parts of the drop, and how many were asked of each.

    Every problem has the same skill, which is enough for what is tested here.
    """
    rng, rates, asked = np.random.default_rng(seed), {}, {}
    parts = [*lost, 1.0, 0.0]

    def measured(number, n):
        if number not in rates:
            rates[number] = rng.binomial(k, skill - parts[number] * drop, most) / k
        asked[number] = max(n, asked.get(number, 0))
        return rates[number][:n]

    return measured, asked


@pytest.mark.parametrize("candidates", [1, 2, 3, 7, 8, 20])
def test_a_clear_step_is_found_wherever_it_is_by_few_probes(candidates):
    for first in range(candidates + 1):
        rates, asked = histories([float(i >= first) for i in range(candidates)])
        answer = bisect(candidates, rates, most=1024)
        assert (answer.kept, answer.dropped, answer.found) == (first - 1, first, True)
        assert len(answer.probes) <= math.ceil(math.log2(candidates + 1))
        assert {probe.number for probe in answer.probes} == asked.keys() - {GOOD, candidates}
        assert all(probe.state == ("dropped" if probe.number >= first else "kept")
                   for probe in answer.probes)  # fmt: skip
        assert answer.step.mean == pytest.approx(0.8, abs=0.15)


EXACT = {"kept": np.ones(16), "undecided": np.tile([1.0, 0.0], 8), "dropped": np.zeros(16)}
"""Rates that are clear, or clearly not, by sixteen problems alone."""


@pytest.mark.parametrize("candidates", range(1, 8))
def test_a_range_is_from_the_last_kept_to_the_first_dropped(candidates):
    """Against a look at every checkpoint, for all histories of kept, undecided and dropped."""
    for kept in range(candidates + 1):
        for undecided in range(candidates + 1 - kept):
            dropped = candidates - kept - undecided
            states = ["kept"] * kept + ["undecided"] * undecided + ["dropped"] * dropped
            rates = [EXACT[state] for state in [*states, "dropped", "kept"]]
            answer = bisect(candidates, lambda i, n, rates=rates: rates[i][:n], most=16)
            assert (answer.kept, answer.dropped) == (kept - 1, kept + undecided)
            assert answer.found == (undecided == 0)
            assert all(probe.state == states[probe.number] for probe in answer.probes)


def test_without_a_proven_loss_of_the_bad_one_nothing_is_asked():
    for drop in (0.0, -0.5):
        rates, asked = histories([0.0, 1.0], skill=0.4, drop=drop)
        answer = bisect(2, rates, most=256)
        assert answer.bad.state != "dropped"
        assert not answer.found
        assert not answer.probes
        assert asked.keys() == {GOOD, 2}


def state_of(own, good, bad, risk, most):
    """The claim on a checkpoint, from the definition: problem by problem, bet by bet."""
    sides = {
        "kept": own - ((1 - WOBBLE) * bad + WOBBLE * good),
        "dropped": ((1 - WOBBLE) * good + WOBBLE * bad) - own,
    }
    wealth = dict.fromkeys(product(sides, BETS), 1.0)
    for i in range(most):
        for side, bet in wealth:
            wealth[side, bet] *= 1 + bet * sides[side][i]
        total = {side: np.mean([wealth[side, bet] for bet in BETS]) for side in sides}
        best = max(total, key=total.get)
        if total[best] >= 2 / risk:
            return best, i + 1
    guarded = {side: [*of, 1.0, -1.0] for side, of in sides.items()}
    p = {side: ttest_1samp(of, 0, alternative="greater").pvalue for side, of in guarded.items()}
    best = min(p, key=p.get)
    return (best if p[best] <= risk / 2 else "undecided"), most


def test_a_probe_is_what_its_definition_says():
    seen = set()
    for seed in range(80):
        rates, _ = histories([seed % 5 / 4], skill=0.7, drop=0.2, seed=seed)
        answer = bisect(1, rates, most=120)
        if not answer.probes:
            continue
        (probe,) = answer.probes
        own, good, bad = (rates(i, 120) for i in (0, GOOD, 1))
        wanted, at = state_of(own, good, bad, ERROR / 2, 120)
        assert probe.state == wanted
        assert at <= probe.n <= max(at + 16, 1.25 * at + 1)  # the end of the look
        seen.add((wanted, at < 120))
        lost = good[: probe.n] - own[: probe.n]
        assert probe.lost.mean == pytest.approx(lost.sum() / (probe.n + 2))
    assert {("kept", True), ("dropped", True), ("undecided", False)} <= seen


@pytest.mark.parametrize(("part", "false"), [(WOBBLE, "dropped"), (1 - WOBBLE, "kept")])
def test_claims_at_the_limits_are_rarely_false(part, false):
    """The hardest case: what has lost exactly a quarter, or all but a quarter."""
    runs, wrong = 1000, 0
    for seed in range(runs):
        rates, _ = histories([part], skill=0.7, drop=0.3, seed=seed, most=256)
        answer = bisect(1, rates, most=256, error=0.2)
        wrong += any(probe.state == false for probe in answer.probes)
    # One probe and the proof of the loss share the risk of 0.2.
    assert wrong / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)
    assert wrong  # the risk is used


def test_more_checkpoints_need_more_proof_and_each_probe_is_told():
    few, asked_few = histories([0.0] * 3, drop=0.3)
    many, asked_many = histories([0.0] * 3 + [1.0] * 60, drop=0.3)
    told = []
    bisect(3, few, most=4096)
    answer = bisect(63, many, most=4096, told=told.append)
    assert asked_many[63] >= asked_few[3]
    assert told == [answer.bad, *answer.probes]
