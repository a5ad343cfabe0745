"""The exact test of rewards against oracles that share no code with it, and its verdicts."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, t, ttest_1samp

from grpo_harness.gate.bounds import MOST_SAMPLES, RATE, REWARD, Bounds
from grpo_harness.gate.permutation import Rewards, permutation_p
from grpo_harness.gate.stats import stratified_p
from grpo_harness.gate.verdicts import NOT_THE_POLICY, judge, judge_reward

Table = Sequence[Sequence[Any]]


def shares(now: Table, then: Table) -> list[Counter[Fraction]]:
    """The ways to reach each mean difference of every problem, by enumeration."""
    found = []
    for a, b in zip(now, then, strict=True):
        pooled, ways = [Fraction(x) for x in (*a, *b)], Counter[Fraction]()
        for hand in combinations(range(len(pooled)), len(a)):
            drawn = sum(pooled[i] for i in hand)
            ways[drawn / len(a) - (sum(pooled) - drawn) / len(b)] += 1
        found.append(ways)
    return found


def difference(now: Table, then: Table) -> Fraction:
    return sum(
        (
            Fraction(sum(map(Fraction, a))) / len(a) - Fraction(sum(map(Fraction, b))) / len(b)
            for a, b in zip(now, then, strict=True)
        ),
        Fraction(0),
    )


def enumerated_p(now: Table, then: Table) -> float:
    """Every deal of every problem, in exact fractions."""
    observed, at_most, total = difference(now, then), 0, 0
    for deal in product(*(ways.items() for ways in shares(now, then))):
        weight = math.prod(times for _, times in deal)
        total += weight
        at_most += weight * (sum(value for value, _ in deal) <= observed)
    return float(Fraction(at_most, total))


def counted_p(now: Table, then: Table) -> float:
    """The convolution of whole rewards in whole numbers; equally many samples everywhere."""
    k = len(now[0])
    parts = []
    for a, b in zip(now, then, strict=True):
        rows = [Counter({0: 1}), *(Counter[int]() for _ in range(k))]
        for value in (*a, *b):
            for c in range(k, 0, -1):
                for drawn, ways in rows[c - 1].items():
                    rows[c][drawn + value] += ways
        parts.append(rows[k])

    def both(x: Counter[int], y: Counter[int]) -> Counter[int]:
        sums = Counter[int]()
        for (a, i), (b, j) in product(x.items(), y.items()):
            sums[a + b] += i * j
        return sums

    sums, observed = reduce(both, parts), sum(map(sum, now))
    return float(Fraction(sum(w for s, w in sums.items() if s <= observed), sums.total()))


def drawn(values: Any, skill: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Rewards of shape (n, k): the first of `values` with chance `skill`, else any other."""
    others = rng.choice(np.asarray(values)[1:], (len(skill), k))
    return np.where(rng.random(others.shape) < skill[:, None], values[0], others)


def correct(counts: np.ndarray, k: int) -> list[list[float]]:
    return [[1.0] * c + [0.0] * (k - c) for c in counts.tolist()]


@st.composite
def tables(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[Table, Table]:
    n = draw(st.integers(1, 3))
    sizes = [draw(st.tuples(st.integers(1, 3), st.integers(1, 4))) for _ in range(n)]
    sides = [
        [draw(st.lists(values, min_size=size[i], max_size=size[i])) for size in sizes]
        for i in (0, 1)
    ]
    return sides[0], sides[1]


@settings(deadline=None, max_examples=100)
@given(
    tables(
        st.sampled_from([0, 1])
        | st.integers(-3, 3)
        | st.sampled_from([1.2, 0.2, 0.0, -0.3])
        | st.integers(-503, 500).map(lambda i: i / 500)
        | st.integers(0, 7).map(lambda i: i / 3)
    )
)
@example(([[1e6, 1.0]], [[0.5, 2.0, 3.0]]))
@example(([[0, 1], [1], [1, 0.2]], [[0, 1], [0, -0.338], [0, 0, 1]]))
def test_it_is_brute_force_enumeration(m: tuple[Table, Table]) -> None:
    now, then = m
    # Decimals as they are written, and thirds: in floats, sums that are equal would differ.
    now_, then_ = ([[Fraction(x).limit_denominator(3000) for x in a] for a in s] for s in m)
    assert permutation_p(now, then) == pytest.approx(enumerated_p(now_, then_), rel=1e-10)


@settings(deadline=None, max_examples=50)
@given(tables(st.floats(-2, 2)))
# Equal sums of values that have no step in common.
@example(([[0.0, 1.0, 0.5], [0.0], [-1.0]], [[-1.0], [1.3190467560325532], [0.0, 1.0, 0.5]]))
def test_it_is_brute_force_enumeration_of_any_numbers(m: tuple[Table, Table]) -> None:
    # Sums that nearly tie are apart in the oracle only.
    sums = sorted({sum(deal) for deal in product(*(ways.keys() for ways in shares(*m)))})
    assume(all(b - a > 1e-4 for a, b in pairwise(sums)))
    assert permutation_p(*m) == pytest.approx(enumerated_p(*m), rel=0.01)


@pytest.mark.parametrize("drop", [0, 0.1, 0.3, 0.6, 1])
@pytest.mark.parametrize(("n", "k", "k_then"), [(1, 4, 16), (64, 4, 16), (256, 1, 1), (90, 9, 4)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 1.2)])
def test_with_two_values_it_is_the_exact_test_of_counts(
    n: int, k: int, k_then: int, drop: float, low: float, high: float
) -> None:
    rng = np.random.default_rng(n)
    skill = rng.beta(0.7, 0.3, n)
    a, b = rng.binomial(k, skill * (1 - drop)), rng.binomial(k_then, skill)
    now, then = (
        [[low + (high - low) * x for x in row] for row in correct(c, size)]
        for c, size in ((a, k), (b, k_then))
    )
    expected = stratified_p(a, k, b, k_then)
    assert permutation_p(now, then) == pytest.approx(expected, rel=1e-12)
    assert Rewards.of(now, then).drop_p() == expected


def test_a_problem_counts_alike_whatever_its_samples() -> None:
    # One of four correct completions lost, and the only one gained: more counts, not more means.
    now, then = [[1.0, 0.0, 0.0, 0.0], [1.0]], [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0]]
    assert permutation_p(now, then) == pytest.approx(enumerated_p(now, then), rel=1e-12)
    assert stratified_p([1, 1], [2, 1], [3, 0], 3) != pytest.approx(permutation_p(now, then))


@pytest.mark.parametrize("values", [(1, 0), (2, 1, 0), (12, 2, 0, -3), (40, -7, -11, 3)])
@pytest.mark.parametrize("drop", [0.1, 0.4, 0.8])
def test_whole_rewards_are_counted_in_whole_numbers(values: Any, drop: float) -> None:
    rng = np.random.default_rng(1)
    skill = rng.beta(0.7, 0.3, 24)
    now, then = drawn(values, skill * (1 - drop), 4, rng), drawn(values, skill, 12, rng)
    expected = counted_p(now.tolist(), then.tolist())
    assert permutation_p(now, then) == pytest.approx(expected, rel=1e-11)
    assert permutation_p(now / 10, then / 10) == pytest.approx(expected, rel=1e-11)
    assert expected < 1e-12 or drop < 0.8


@pytest.mark.parametrize("unit", [0.002, 0.05])
@pytest.mark.parametrize(("n", "drop"), [(6, 0.9), (12, 0.3), (12, 0.8)])
def test_accuracy_less_a_penalty_ties_where_the_sums_are_equal(
    n: int, drop: float, unit: float
) -> None:
    rng = np.random.default_rng(n)
    skill = rng.beta(0.7, 0.3, n)

    def rewards(skill: np.ndarray, k: int) -> np.ndarray:
        whole = round(1 / unit)
        return drawn((whole, -whole), skill, k, rng).astype(int) - rng.integers(0, 4, (n, k))

    now, then = rewards(skill * (1 - drop), 4), rewards(skill, 12)
    expected = counted_p(now.tolist(), then.tolist())
    assert permutation_p(now * unit, then * unit) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.9])
def test_any_numbers_are_as_random_permutations_say(shift: float) -> None:
    rng = np.random.default_rng(2)
    n, k, runs = 24, 4, 20_000
    now, then = rng.normal(size=(n, k)) - shift / 3, rng.normal(size=(n, 12)) ** 3 / 2
    pooled = np.concatenate([now, then], axis=1)
    hits = np.zeros(runs)
    for row in pooled:
        deal = rng.permuted(np.tile(row, (runs, 1)), axis=1)
        hits += deal[:, :k].mean(axis=1) - deal[:, k:].mean(axis=1)
    found = float((hits <= (now.mean(axis=1) - then.mean(axis=1)).sum()).mean())
    p = permutation_p(now, then)
    assert found == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / runs) + 1 / runs)


def test_one_problem_is_scipys_permutation_test() -> None:
    rng = np.random.default_rng(3)
    now, then = rng.normal(size=5) - 0.5, rng.normal(size=9)
    exact = permutation_test(
        (now, then), lambda a, b: a.mean() - b.mean(), alternative="less", n_resamples=np.inf
    )
    assert permutation_p([now], [then]) == pytest.approx(exact.pvalue, rel=0.01)


@pytest.mark.parametrize("n", [2, 3, 40])
def test_the_lowest_of_all_sums_is_one_deal(n: int) -> None:
    rng = np.random.default_rng(n)
    low, high = rng.normal(size=(n, 4)) - 20, rng.normal(size=(n, 16))
    assert permutation_p(low, high) == pytest.approx(math.comb(20, 4) ** -n, rel=0.01)
    assert permutation_p(high, low) == 1.0


def pmf(pooled: np.ndarray, k: int) -> np.ndarray:
    """The chance of every sum of k of these whole numbers."""
    rows = np.zeros((k + 1, int(np.sort(pooled)[-k:].sum()) + 1))
    rows[0, 0] = 1
    for value in pooled:
        for c in range(k, 0, -1):
            rows[c, value:] += rows[c - 1, : rows.shape[1] - value]
    return rows[k] / rows[k].sum()


@pytest.mark.parametrize("ratio", [math.sqrt(2), math.pi / 100])
@pytest.mark.parametrize("drop", [0.0, 0.6, 1.2, 1.8])
def test_sums_without_a_common_step_have_the_exact_tail(ratio: float, drop: float) -> None:
    # Half of the problems have whole rewards and half have multiples of an irrational number. No
    # term of the two convolutions is negative, so nothing cancels.
    rng = np.random.default_rng(4)
    now, then = (rng.normal(9 - m, 2, (64, k)).round().clip(0) for m, k in ((drop, 4), (0, 16)))
    units = np.where(np.arange(64) < 32, 1.0, ratio)[:, None]
    pooled = np.concatenate([now, then], axis=1).astype(int)
    one, other = (
        reduce(np.convolve, (pmf(row, 4) for row in half)) for half in (pooled[:32], pooled[32:])
    )
    seen = float((now * units).sum()) + 1e-9
    room = np.floor(seen - ratio * np.arange(len(other))).astype(int).clip(-1, len(one) - 1)
    expected = float(other @ np.append(np.cumsum(one), 0.0)[room])
    assert permutation_p(now * units, then * units) == pytest.approx(expected, rel=0.01)
    assert expected < 1e-9 or drop < 1.8


def far_off(now: np.ndarray, then: np.ndarray, p: float) -> None:
    """One value far off is either in or out: with chance 1/5 it is now's."""
    for value in (1e6, -1e6, 1e12):
        off = then.copy()
        off[3, 2] = value
        rest = [*np.delete(now, 3, axis=0), now[3]], [*np.delete(off, 3, axis=0), off[3]]
        assert permutation_p(*rest) == pytest.approx(permutation_p(now, off), rel=1e-6)
        kept = [*np.delete(then, 3, axis=0), np.delete(then[3], 2)]
        without = permutation_p([*np.delete(now, 3, axis=0), now[3]], kept)
        if value > 0:
            assert permutation_p(now, off) == pytest.approx(0.8 * without, rel=0.03)
        else:
            assert permutation_p(now, off) == pytest.approx(0.2 + 0.8 * without, rel=0.03)
        assert 0.3 * p < without < 3 * p


def test_a_value_far_off_is_dealt_by_itself() -> None:
    rng = np.random.default_rng(5)
    now, then = rng.normal(-0.3, 1, (64, 4)), rng.normal(0, 1, (64, 16))
    far_off(now, then, permutation_p(now, then))


def test_rewards_of_sizes_too_different_are_refused() -> None:
    rng = np.random.default_rng(6)
    now, then = rng.normal(size=(128, 4)), rng.normal(size=(128, 16))
    then[:20, 0] = 1e9 * rng.random(20)
    with pytest.raises(ValueError, match="sizes are too different"):
        permutation_p(now, then)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(-100, 100), st.floats(1e-3, 1e3), st.booleans())
def test_place_and_unit_are_nothing(seed: int, place: float, unit: float, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    now, then = rng.normal(-0.2, 1, (16, 3)), rng.normal(0, 1, (16, 8))
    if whole:
        now, then = now.round(), then.round()
    p = permutation_p(now, then)
    assert permutation_p(now * unit + place, then * unit + place) == pytest.approx(p, rel=1e-7)
    assert permutation_p(now, then) == p, "it is the same at every call"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_both_tails_overlap_in_the_observed_sum_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    now, then = rng.integers(0, 3, (8, 3)), rng.integers(0, 3, (8, 6))
    sides = permutation_p(now, then), permutation_p(-now, -then)
    ties = sum(sides) - 1
    below = permutation_p(np.where(np.arange(24).reshape(8, 3) == 0, now - 1e-3, now), then)
    assert 0 <= ties <= min(sides) + 1e-12
    assert below <= sides[0] * (1 + 1e-9)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: [pd.Series(r) for r in x]])
def test_rewards_come_in_any_container(kind: Any) -> None:
    now, then = [[1.0, 0.5], [0.0, 0.25]], [[1.0, 1.0, 0.5], [0.5, 0.0, 1.0]]
    assert permutation_p(kind(now), kind(then)) == permutation_p(now, then)


@pytest.mark.parametrize(
    ("now", "then", "message"),
    [
        ([[1.0], [math.nan]], [[1.0], [1.0]], "problem 1: now has the reward nan, not a number"),
        ([[1.0], [1.0]], [[1.0], [0, -math.inf]], "problem 1: then has the reward -inf"),
        ([[1.0], [None]], [[1.0], [1.0]], "problem 1: now has the reward None"),
        ([[1.0], ["1"]], [[1.0], [1.0]], "problem 1: now has the reward '1'"),
        ([[1.0], []], [[1.0], [1.0]], "problem 1: now has 0 rewards, not 1 to"),
        ([[1.0]], [[0.0] * (MOST_SAMPLES + 1)], "problem 0: then has 501 rewards"),
        ([1.0], [[1.0]], "problem 0: now is 1.0, not a sequence"),
        (["12"], [[1.0]], "problem 0: now is '12', not a sequence"),
        ([[1.0]], [[1.0], [1.0]], "problem 1 has no counterpart"),
        ([], [], "problem 0"),
        (None, [[1.0]], "problem 0: now is None"),
    ],
)
def test_invalid_rewards_are_refused_by_problem(now: Any, then: Any, message: str) -> None:
    for rule in (permutation_p, lambda a, b: judge_reward(a, b, same_policy=True)):
        with pytest.raises(ValueError, match=message):
            rule(now, then)


@pytest.mark.parametrize(("n", "k", "k_then", "seconds"), [(256, 4, 16, 2.0), (1024, 8, 64, 10.0)])
def test_it_takes_a_moment(n: int, k: int, k_then: int, seconds: float) -> None:
    rng = np.random.default_rng(7)
    now, then = rng.normal(size=(n, k)), rng.normal(size=(n, k_then))
    start = time.perf_counter()
    permutation_p(now, then)
    assert time.perf_counter() - start < seconds


N = 128


def measured(shift: float = 0.0, seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(n, 1))
    return place + rng.normal(-shift, 1, (n, 4)), place + rng.normal(0, 1, (n, 16))


@pytest.mark.parametrize("same_policy", [True, False])
def test_an_unchanged_reward_passes_and_a_drop_fails(same_policy: bool) -> None:
    assert judge_reward(*measured(n=512), same_policy=same_policy).verdict == "PASS"
    v = judge_reward(*measured(0.4), same_policy=same_policy)
    assert v.verdict == "FAIL"
    assert v.needed is None
    assert v.lower < v.delta < v.upper < 0
    assert (NOT_THE_POLICY in v.reason) == same_policy


def test_a_rise_fails_for_the_recorded_policy_alone() -> None:
    v = judge_reward(*measured(-0.4), same_policy=True)
    assert v.verdict == "FAIL"
    assert v.delta > 0
    assert NOT_THE_POLICY in v.reason
    assert judge_reward(*measured(-0.4), same_policy=False).verdict == "PASS"


def test_another_policys_drop_must_also_generalise() -> None:
    now, then = measured(n=256)
    now[:4] -= 30
    same, other = (judge_reward(now, then, same_policy=same) for same in (True, False))
    assert (same.verdict, other.verdict) == ("FAIL", "UNPROVEN")
    d = now.mean(axis=1) - then.mean(axis=1)
    assert other.p == pytest.approx(ttest_1samp(d, 0, alternative="less").pvalue)
    assert same.p < 1e-6 < other.p


def test_the_numbers_of_a_verdict_by_other_means() -> None:
    now, then = measured(0.05)
    v = judge_reward(now, then, same_policy=True)
    d = now.mean(axis=1) - then.mean(axis=1)
    reach = max(np.percentile(then, 99) - np.percentile(then, 1), abs(d).max())
    interval = ttest_1samp([*d, reach, -reach], 0).confidence_interval(0.9)
    assert (v.n, v.k) == (N, 4)
    assert (v.now, v.then, v.delta) == pytest.approx((now.mean(), then.mean(), d.mean()))
    assert (v.lower, v.upper) == pytest.approx((interval.low, interval.high))
    sides = permutation_p(now, then), permutation_p(-now, -then)
    assert v.p == min(1, 2 * min(sides))
    room = 0.1 * then.std() + min(d.mean(), 0)
    se = (interval.high - interval.low) / 2 / t.ppf(0.95, N + 1)
    assert v.needed == math.ceil(N * ((t.ppf(0.95, N + 1) + 1.2815515655446004) * se / room) ** 2)


def test_bounds_are_in_standard_deviations_or_in_the_rewards_own_unit() -> None:
    now, then = measured(0.1, n=512)
    usual = judge_reward(now, then, same_policy=False)
    for margin, minimum in ((0.1, 0.02), (0.2, 0.01)):
        own = Bounds(margin * then.std(), minimum * then.std())
        assert judge_reward(now, then, same_policy=False, scale=1, bounds=own) == judge_reward(
            now, then, same_policy=False, bounds=Bounds(margin, minimum)
        )
    assert usual == judge_reward(1 * now, then, same_policy=False, scale=float(then.std()))
    assert judge_reward(now, then, same_policy=False, bounds=Bounds(3, 1)).verdict == "PASS"


@pytest.mark.parametrize("factor", [100, 1e-3])
@pytest.mark.parametrize(
    ("drop", "n", "verdict"), [(0, 512, "PASS"), (0.05, 128, "UNPROVEN"), (0.4, 128, "FAIL")]
)
def test_the_unit_of_a_reward_does_not_matter(
    factor: float, drop: float, n: int, verdict: str
) -> None:
    now, then = measured(drop, n=n)
    usual = judge_reward(now, then, same_policy=False)
    other = judge_reward(factor * now, factor * then, same_policy=False)
    assert usual.verdict == other.verdict == verdict
    numbers = (usual.delta, usual.lower, usual.upper, usual.mde90)
    scaled = (other.delta, other.lower, other.upper, other.mde90)
    assert scaled == pytest.approx([factor * x for x in numbers])


@pytest.mark.parametrize("same_policy", [True, False])
def test_a_reward_of_0_and_1_is_judged_as_accuracy_is(same_policy: bool) -> None:
    rng = np.random.default_rng(8)
    skill = rng.beta(0.7, 0.3, N)
    a, b = rng.binomial(4, skill * 0.97), rng.binomial(16, skill)
    v = judge(a, 4, b, 16, same_policy=same_policy)
    reward = judge_reward(
        correct(a, 4), correct(b, 16), same_policy=same_policy, scale=1, bounds=RATE
    )
    assert replace(reward, reason="") == replace(v, reason="")


@pytest.mark.parametrize("same_policy", [True, False])
def test_a_record_without_spread_takes_the_same_reward(same_policy: bool) -> None:
    def verdict(values: list[float]) -> Any:
        now = [values] * 64
        return judge_reward(now, [[0.1] * 16] * 64, same_policy=same_policy)

    same = verdict([0.1] * 4)
    assert (same.verdict, same.delta, same.p) == ("PASS", 0, 1)
    assert "every recorded reward is 0.1, so any change counts" in same.reason
    assert verdict([0.0] * 4).verdict == "FAIL"
    assert verdict([0.2] * 4).verdict == ("FAIL" if same_policy else "PASS")


def test_one_other_reward_in_a_record_without_spread_is_not_accepted() -> None:
    now = [[0.0] * 4] * 63 + [[0.0] * 3 + [-1.0]]
    v = judge_reward(now, [[0.0] * 4] * 64, same_policy=False)
    assert v.verdict == "UNPROVEN"
    assert v.lower < 0
    assert "any change counts" in v.reason


def test_a_rare_reward_is_no_certainty() -> None:
    then = [[0.0] * 16] * 63 + [[0.0] * 15 + [1.0]]
    v = judge_reward([[0.0] * 4] * 64, then, same_policy=True)
    assert v.verdict == "UNPROVEN"
    assert v.lower < -0.03


def test_a_value_far_off_does_not_hide_a_drop() -> None:
    now, then = measured(0.5)
    then[0, 0] = 1e6
    assert judge_reward(now, then, same_policy=True).verdict == "FAIL"
    unchanged, _ = measured()
    v = judge_reward(unchanged, then, same_policy=True)
    assert v.verdict == "UNPROVEN", "the mean is lost, and nothing is accepted for it"


def test_below_the_floor_nothing_is_judged() -> None:
    assert judge_reward(*measured(n=63), same_policy=True).verdict == "ERROR"
    assert judge_reward([[1.0]], [[0.5]], same_policy=False).verdict == "ERROR"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"bounds": Bounds(0.02, 0.02)}, "minimum < margin"),
        ({"bounds": Bounds(-1, 0)}, "margin is -1"),
        ({"alpha": 0}, "alpha"),
        ({"same_policy": None}, "same_policy is None"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_reward(*measured(), **{"same_policy": True, "bounds": REWARD, **settings})
