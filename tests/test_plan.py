"""The plan of a check: what it predicts, and that no cheaper size finds the margin."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from grpo_harness.checks import planner
from grpo_harness.evaluation import Tally
from grpo_harness.gate.bounds import RATE, Bounds
from grpo_harness.gate.plan import Noise, Planner
from grpo_harness.gate.verdicts import judge, judge_sequential
from grpo_harness.rules import RULES, asked

ALPHA = 0.0002
K_THEN = 64


def recorded(n, seed=0, k_then=K_THEN):
    rng = np.random.default_rng(seed)
    return rng.binomial(k_then, rng.beta(0.7, 0.7, n))


def expected(then, k_then, k, n, alpha=ALPHA, minimum=RATE.minimum, sequential=False):
    """The drop that is found nine times in ten, written down anew and for one size."""
    rates = (np.asarray(then[:n]) + 0.5) / (k_then + 1)
    differences = rates * (1 - rates) * (1 / k + 1 / k_then)
    se = math.sqrt((differences.sum() + 2) / (n + 1)) / math.sqrt(n + 2)
    strict = norm.isf(alpha / 2)
    if sequential:
        strict = math.sqrt(norm.isf(0.1) ** 2 + 2 * math.log(2 / alpha))
    return max(strict * se, minimum) + norm.isf(0.1) * se


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 1), (100, 4), (600, 4), (1000, 16)])
def test_the_prediction_is_that_of_the_formula(n, k, sequential):
    then = recorded(1000)
    found = Planner(Noise.of_counts(then, K_THEN), alpha=ALPHA, sequential=sequential).plan(k, n)
    assert (found.n, found.k) == (n, k)
    assert found.then == pytest.approx(then[:n].mean() / K_THEN)
    assert found.mde90 == pytest.approx(expected(then, K_THEN, k, n, sequential=sequential))
    assert found.enough == (found.mde90 <= RATE.margin)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(64, 300),
    seed=st.integers(0, 99),
    k_then=st.sampled_from([4, 16, 64]),
    least=st.integers(1, 6),
    times=st.integers(1, 4),
    margin=st.sampled_from([0.03, 0.05, 0.08, 0.2]),
)
def test_no_smaller_size_finds_the_margin(n, seed, k_then, least, times, margin):
    then = recorded(n, seed, k_then)
    most = least * times
    bounds = Bounds(margin, RATE.minimum)
    found = Planner(Noise.of_counts(then, k_then), bounds, ALPHA).cheapest(least, most)
    enough = [
        (size * k, k, size)
        for size in range(64, n + 1)
        for k in range(least, most + 1)
        if expected(then, k_then, k, size) <= margin
    ]
    wanted = min(enough) if enough else (n * most, most, n)
    assert (found.n * found.k, found.k, found.n) == wanted
    assert found.enough == bool(enough)


def test_more_samples_are_drawn_only_where_problems_are_too_few():
    then = recorded(1000)
    many, few = (
        Planner(Noise.of_counts(then[:n], K_THEN), alpha=ALPHA).cheapest(4, 16) for n in (1000, 250)
    )
    assert many.k == 4
    assert 64 <= many.n < 1000
    assert few.k > 4
    assert few.enough
    # The same number of problems is needed whatever was recorded beyond them.
    assert Planner(Noise.of_counts(then[:900], K_THEN), alpha=ALPHA).cheapest(4, 16) == many


def test_a_part_of_the_margin_takes_more():
    planned = Planner(Noise.of_counts(recorded(1000), K_THEN), alpha=ALPHA)
    sizes = [planned.cheapest(4, 16, part).n for part in (2.0, 1.0, 0.8)]
    assert sizes == sorted(set(sizes))


def test_a_margin_of_the_recorded_rate_is_that_of_the_problems_asked():
    then = np.r_[np.full(100, K_THEN), np.zeros(100, int)]
    planned = Planner(
        Noise.of_counts(then, K_THEN), lambda rate: Bounds(rate / 5, rate / 25), ALPHA
    )
    assert [planned.plan(4, n).margin for n in (100, 200)] == pytest.approx([0.2, 0.1])


def test_needed_goes_on_beyond_what_was_recorded():
    then = recorded(128)
    found = Planner(Noise.of_counts(then, K_THEN), alpha=ALPHA).plan(4)
    assert not found.enough
    again = np.tile(then, 20)[: found.needed]
    assert expected(again, K_THEN, 4, found.needed) <= 0.0502
    assert expected(again, K_THEN, 4, int(0.97 * found.needed)) > 0.05
    tiny = Planner(Noise.of_counts(then, K_THEN), Bounds(1e-5, 0.0), ALPHA).plan(4)
    assert tiny.needed is None


def powers(planned, k, then, drop, judged, runs=200):
    """The share of runs with such a drop that fail."""
    rates = (np.asarray(then) + 0.5) / (K_THEN + 1)
    lower = np.clip(rates - drop * rates * (1 - rates) / (rates * (1 - rates)).mean(), 0, 1)
    failed = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        before, now = rng.binomial(K_THEN, rates), rng.binomial(k, lower)
        failed += judged(now, k, before) == "FAIL"
    return failed / runs, rates.mean() - lower.mean()


@pytest.mark.parametrize("sequential", [False, True])
def test_the_planned_size_finds_its_margin_nine_times_in_ten(sequential):
    then = recorded(1000, seed=3)
    planned = Planner(Noise.of_counts(then, K_THEN), alpha=ALPHA, sequential=sequential).cheapest(
        4, 16
    )

    def judged(now, k, before):
        if sequential:
            return judge_sequential(now, k, before, K_THEN, alpha=ALPHA).verdict
        return judge(now, k, before, K_THEN, same_policy=True, alpha=ALPHA).verdict

    found, drop = powers(planned, planned.k, then[: planned.n], RATE.margin, judged)
    assert drop == pytest.approx(RATE.margin, abs=0.004)
    assert found >= 0.85


def test_rewards_are_planned_by_their_own_noise():
    rng = np.random.default_rng(1)
    levels = rng.normal(0, 1, 400)
    then = rng.normal(levels[:, None], 0.5, (400, K_THEN)).round(3)
    tallies = [Tally(K_THEN, 0, 0, 0, 1.0, tuple(row)) for row in then.tolist()]
    found = planner(tallies, ALPHA, RULES["reward"]).cheapest(4, 16)
    assert found.margin == pytest.approx(0.1 * then.std())
    assert found.enough
    assert found.n < 400
    own, means = levels[: found.n, None], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        before = rng.normal(own, 0.5, (found.n, K_THEN))
        means.append(rng.normal(own, 0.5, (found.n, found.k)).mean() - before.mean())
    reach = np.ptp(np.percentile(then, [1, 99]))
    se = math.sqrt((found.n**2 * np.var(means) + 2 * reach**2) / (found.n + 1) / (found.n + 2))
    distance = norm.isf(ALPHA / 2) + norm.isf(0.1)
    assert found.mde90 == pytest.approx(distance * se, rel=0.05)


def test_a_reward_that_applies_to_nothing_cannot_be_planned():
    with pytest.raises(ValueError, match="applies to no completion"):
        planner([Tally(4, 0, 0, 0, 1.0)] * 64, ALPHA, RULES["reward"])
    some = [Tally(4, 0, 0, 0, 1.0, (1.0, 0.0)), Tally(4, 0, 0, 0, 1.0)] * 64
    assert planner(some, ALPHA, RULES["reward"]).plan(4).n == 128


def test_every_check_of_the_suites_is_counted():
    found = Counter(asked([lambda name: name not in ("slices", "rewards")] * 6, 1))
    assert found == Counter(
        dict.fromkeys(("accuracy", "length", "truncation", "unparsable", "reward"), 12)
        | dict.fromkeys(("no_loss", "lenient", "hacking"), 6)
        | {"total": 2, "improvement": 1}
    )
