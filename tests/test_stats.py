"""The exact test and the intervals against oracles that share no code with them."""

import math
from array import array
from collections import Counter, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import combinations, product
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact, hypergeom, nchypergeom_fisher, norm, t, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar

from grpo_harness.gate.bounds import MOST_SAMPLES
from grpo_harness.gate.inputs import paired
from grpo_harness.gate.stats import (
    BETS,
    Counts,
    Estimate,
    drop_evidence,
    harmless_evidence,
    holm,
    odds_ratio_of_drop,
    stratified_p,
)


@st.composite
def measurements(draw: st.DrawFn) -> tuple[list[int], int, list[int], int]:
    k, k_then = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    n = draw(st.integers(1, 12))
    now = draw(st.lists(st.integers(0, k), min_size=n, max_size=n))
    then = draw(st.lists(st.integers(0, k_then), min_size=n, max_size=n))
    return now, k, then, k_then


def enumerated_p(now: list[int], k: int, then: list[int], k_then: int) -> Fraction:
    """Deal the samples of every problem anew in all possible ways, and count."""
    deals = []
    for c, b in zip(now, then, strict=True):
        samples = [1] * (c + b) + [0] * (k + k_then - c - b)
        deals.append(Counter(sum(hand) for hand in combinations(samples, k)))
    at_most = total = 0
    for sums in product(*deals):
        ways = math.prod(deal[c] for deal, c in zip(deals, sums, strict=True))
        total += ways
        at_most += ways * (sum(sums) <= sum(now))
    return Fraction(at_most, total)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_brute_force_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, k_then = (int(x) for x in rng.integers(1, 5, 2))
    n = int(rng.integers(1, 6))
    now, then = rng.integers(0, k + 1, n).tolist(), rng.integers(0, k_then + 1, n).tolist()
    expected = float(enumerated_p(now, k, then, k_then))
    assert stratified_p(now, k, then, k_then) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("n", [1, 10, 64, 512, 4000])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.65])
def test_at_one_sample_it_is_mcnemars_exact_test(n: int, rate: float) -> None:
    rng = np.random.default_rng(n)
    now, then = rng.binomial(1, rate, n), rng.binomial(1, 0.7, n)
    lost, gained = int((then > now).sum()), int((now > then).sum())
    two_sided = float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)
    if lost > gained:
        assert stratified_p(now, 1, then, 1) == pytest.approx(two_sided / 2, rel=1e-12)
    elif gained > lost:
        assert stratified_p(then, 1, now, 1) == pytest.approx(two_sided / 2, rel=1e-12)
    else:
        assert stratified_p(now, 1, then, 1) >= 0.5


@pytest.mark.parametrize(
    ("now", "k", "then", "k_then"), [(1, 4, 14, 16), (0, 1, 16, 16), (3, 5, 2, 7), (9, 30, 20, 30)]
)
def test_on_one_problem_it_is_fishers_exact_test(now: int, k: int, then: int, k_then: int) -> None:
    table = [[now, k - now], [then, k_then - then]]
    expected = fisher_exact(table, alternative="less").pvalue
    assert stratified_p([now], k, [then], k_then) == pytest.approx(expected, rel=1e-12)


def test_it_is_the_published_exact_test_of_the_penicillin_rabbits() -> None:
    # Agresti, Categorical Data Analysis (1990), p. 231-237; the p is that of R's mantelhaen.test
    # (exact = TRUE): 0.020 one-sided, 0.0399449 two-sided, twice as much by symmetry. One stratum
    # a dose: rabbits cured after a delay of 1.5 hours (now) and at once (then).
    p = stratified_p([0, 0, 2, 6, 5], [5, 6, 6, 6, 5], [0, 3, 6, 5, 2], [6, 6, 6, 6, 2])
    assert 2 * p == pytest.approx(0.0399449, abs=5e-8)


def test_a_tiny_p_keeps_its_relative_accuracy() -> None:
    # Each problem all right before and all wrong now: one deal in (20 over 4), 50 times.
    p = stratified_p([0] * 50, 4, [16] * 50, 16)
    assert p == pytest.approx(math.comb(20, 4) ** -50, rel=1e-12)
    assert 0 < p < 1e-180


def test_samples_may_differ_by_problem() -> None:
    one_by_one = stratified_p([1, 2, 0], [2, 4, 2], [3, 16, 4], [4, 16, 4])
    hands = [([1] * 4 + [0] * 2, 2), ([1] * 18 + [0] * 2, 4), ([1] * 4 + [0] * 2, 2)]
    dealt = [Counter(sum(hand) for hand in combinations(samples, k)) for samples, k in hands]
    total = math.prod(d.total() for d in dealt)
    at_most = sum(
        math.prod(d[c] for d, c in zip(dealt, sums, strict=True))
        for sums in product(*dealt)
        if sum(sums) <= 3
    )
    assert one_by_one == pytest.approx(at_most / total, rel=1e-13)


@settings(deadline=None)
@given(measurements())
def test_one_correct_answer_fewer_never_raises_p(m: tuple[list[int], int, list[int], int]) -> None:
    now, k, then, k_then = m
    p = stratified_p(now, k, then, k_then)
    assert 0 < p <= 1
    for i, c in enumerate(now):
        if c:
            fewer = [*now[:i], c - 1, *now[i + 1 :]]
            assert stratified_p(fewer, k, then, k_then) <= p * (1 + 1e-12)


@settings(deadline=None)
@given(measurements(), st.randoms(use_true_random=False))
def test_the_order_of_problems_is_nothing(
    m: tuple[list[int], int, list[int], int], random: Random
) -> None:
    now, k, then, k_then = m
    order = list(range(len(now)))
    random.shuffle(order)
    shuffled = stratified_p([now[i] for i in order], k, [then[i] for i in order], k_then)
    assert shuffled == pytest.approx(stratified_p(now, k, then, k_then), rel=1e-12)


@settings(deadline=None)
@given(measurements())
def test_counting_wrong_answers_in_exchanged_roles_is_the_same_test(
    m: tuple[list[int], int, list[int], int],
) -> None:
    now, k, then, k_then = m
    wrong_now, wrong_then = [k - c for c in now], [k_then - b for b in then]
    mirrored = stratified_p(wrong_then, k_then, wrong_now, k)
    assert mirrored == pytest.approx(stratified_p(now, k, then, k_then), rel=1e-12)


def test_identical_saturated_measurements_prove_nothing() -> None:
    assert stratified_p([4] * 100, 4, [16] * 100, 16) == 1
    assert stratified_p([0] * 100, 4, [0] * 100, 16) == 1


def test_half_of_the_symmetric_case_lies_on_either_side() -> None:
    now, then = [1, 0, 2, 1, 1], [1, 2, 0, 1, 1]
    below = stratified_p(now, 2, then, 2)
    at = below + stratified_p([2 - c for c in now], 2, [2 - b for b in then], 2) - 1
    assert below == pytest.approx(0.5 + at / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("now", "k", "then", "k_then", "message"),
    [
        ([1, 2], 4, [1], 16, "problem 1 has no counterpart"),
        ([1], 4, [1, 2, 3], 16, "problem 1 has no counterpart"),
        ([], 4, [], 16, "problem 0"),
        ([1, 5], 4, [1, 2], 16, "problem 1: now has 5 correct, not in 0..4"),
        ([1, -1], 4, [1, 2], 16, "problem 1: now is -1, not a whole number"),
        ([1, 2], 4, [17, 2], 16, "problem 0: then has 17 correct, not in 0..16"),
        ([1, math.nan], 4, [1, 2], 16, "problem 1: now is nan, not a whole number"),
        ([1, math.inf], 4, [1, 2], 16, "problem 1: now is inf"),
        ([1, 2], 4, [1, 2.5], 16, "problem 1: then is 2.5, not a whole number"),
        ([1, None], 4, [1, 2], 16, "problem 1: now is None"),
        ([1, "2"], 4, [1, 2], 16, "problem 1: now is '2'"),
        (np.array([1.0, np.nan]), 4, [1, 2], 16, "problem 1: now is"),
        (np.array([[1, 2]]), 4, [[1, 2]], 16, "problem 0: now is"),
        ([1, 2], 0, [1, 2], 16, "k is 0"),
        ([1, 2], 4, [1, 2], -1, "k_then is -1"),
        ([1, 2], 4.5, [1, 2], 16, "k is 4.5"),
        ([1, 2], 4, [1, 2], "16", "k_then is '16'"),
        ([1, 2], 4, [1, 2], [16], "problem 1 has no counterpart"),
        ([1, 2], 4, [1, 2], [16, 0], "problem 1: k_then is 0"),
        ([1, 2], 4, [1, 2], [16, 1], "problem 1: then has 2 correct, not in 0..1"),
        ([1, 2], None, [1, 2], 16, "problem 0: k is None, not real numbers"),
        ([1, 2], math.nan, [1, 2], 16, "problem 0: k is nan"),
        ([1, 2], 10**7, [1, 2], 16, "problem 0: k is 10000000, not a whole number from 1 to"),
        ([1, 2], [4, 10**19], [1, 2], 16, "problem 1: k is 10000000000000000000, not a whole"),
        ([1, 1e300], 4, [1, 2], 16, r"problem 1: now is 1e\+300, not a whole number"),
        ([1, Decimal(2)], 4, [1, 2], 16, r"problem 1: now is Decimal\('2'\)"),
        ([1, np.timedelta64(2, "ns")], 4, [1, 2], 16, r"problem 1: now is np.timedelta64\(2,'ns'"),
        (np.array([1, 2], "m8[ns]"), 4, [1, 2], 16, "problem 0: now is array.*not real numbers"),
        (np.array([1, 2], complex), 4, [1, 2], 16, "problem 0: now is array.*not real numbers"),
        (np.ma.array([1, 2], mask=[0, 1]), 4, [1, 2], 16, "problem 1: now is None"),
        (np.array([1, 2**63], np.uint64), 4, [1, 2], 16, "problem 1: now is 9223372036854775808"),
        (pd.Series([1, None]), 4, [1, 2], 16, "problem 1: now is nan"),
        (pd.Series([1, None], dtype="Int64"), 4, [1, 2], 16, "problem 1: now is <NA>"),
        (pd.DataFrame({"now": [1, 2]}), 4, [1, 2], 16, "problem 0: now is now 0 1 1 2, not real"),
        (torch.ones(2, 1), 4, [1, 2], 16, r"problem 0: now is \[1.0\]"),
        (torch.ones(2, device="meta"), 4, [1, 2], 16, "problem 0: now is tensor"),
        (b"12", 4, [1, 2], 16, "problem 0: now is b'12', not real numbers"),
        ({1, 2}, 4, [1, 2], 16, "problem 0: now is {1, 2}, not real numbers"),
        ((c for c in [1, 2]), 4, [1, 2], 16, "problem 0: now is <generator"),
        ("3" * 999, 4, [1, 2], 16, "problem 0: now is '3{1,20}...3{1,20}', not"),
    ],
)
def test_invalid_counts_are_refused_by_problem(
    now: Any, k: Any, then: Any, k_then: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_p(now, k, then, k_then)


def test_whole_numbers_of_any_type_are_counts() -> None:
    expected = stratified_p([1, 0], 1, [1, 1], 2)
    assert stratified_p([1.0, 0.0], 1, (True, 1), 2) == expected
    assert stratified_p(np.array([True, False]), 1, np.array([1, 1], dtype=np.uint8), 2) == expected


@pytest.mark.parametrize(
    "kind",
    [
        tuple,
        deque,
        lambda x: array("i", x),
        lambda x: memoryview(array("i", x)),
        lambda x: np.array(x, dtype=object),
        lambda x: np.array(x, dtype=np.float16),
        lambda x: np.array(x, dtype=np.uint64),
        lambda x: [np.float16(c) for c in x],
        lambda x: [np.longdouble(c) for c in x],
        lambda x: pd.Series(x, index=[7, 8, 9]),
        lambda x: pd.Series(x, dtype="Int64"),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.bfloat16, requires_grad=True),
        lambda x: [torch.tensor(c) for c in x],
    ],
)
def test_counts_and_samples_come_in_any_container(kind: Callable[[list[int]], Any]) -> None:
    expected = stratified_p([1, 0, 3], [4, 4, 3], [9, 5, 7], [16, 8, 16])
    columns = [kind(x) for x in ([1, 0, 3], [4, 4, 3], [9, 5, 7], [16, 8, 16])]
    assert stratified_p(*columns) == expected


@pytest.mark.parametrize("k", [4.0, np.int8(4), np.array(4), torch.tensor(4), np.float16(4)])
def test_one_number_of_samples_is_a_whole_number_of_any_type(k: Any) -> None:
    assert stratified_p([1, 0], k, [4, 3], k) == stratified_p([1, 0], 4, [4, 3], 4)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 16),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.decimals(),
    st.fractions(),
    st.timedeltas(),
    st.sampled_from(
        [10**400, np.timedelta64(3, "ns"), np.float16(3), np.complex64(3), pd.NA, np.ma.masked]
    ),
)
COLUMNS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(0, 4), max_size=2), max_size=2),
    st.sets(st.integers(0, 4)),
    st.dictionaries(st.integers(0, 4), st.integers(0, 4), max_size=2),
    st.tuples(
        st.lists(st.integers(0, 4), min_size=2, max_size=2),
        st.sampled_from(["?", "i1", "u8", "f2", "g", "c8", "m8[ns]", "M8[D]", "U", "S", "O"]),
    ).map(lambda pair: np.array(pair[0]).astype(pair[1])),
)


@settings(deadline=None)
@given(COLUMNS, COLUMNS, COLUMNS, COLUMNS)
def test_anything_is_tested_or_refused(now: Any, k: Any, then: Any, k_then: Any) -> None:
    for columns in ((now, k, then, k_then), (now, 4, [4, 4], 16), ([1, 3], k, [4, 3], 16)):
        refusal = "problem"
        try:
            assert 0 <= stratified_p(*columns) <= 1
        except ValueError as error:
            refusal = str(error)
        assert "problem" in refusal
        assert len(refusal) < 200


def test_the_most_samples_are_tested_in_a_moment() -> None:
    n = MOST_SAMPLES
    assert stratified_p([0], n, [n], n) == pytest.approx(1 / math.comb(2 * n, n), rel=1e-12, abs=0)
    assert stratified_p([n // 2] * 3, n, [n // 2] * 3, n) > 0.5


def test_logarithms_are_those_of_numbers_that_a_float_can_hold() -> None:
    with pytest.raises(ValueError, match="problem 2: then is -inf, not a logarithm from -700 to"):
        paired([1, 2, 3], [1, 2, -math.inf])
    with pytest.raises(ValueError, match="problem 0"):
        paired([], [])
    with pytest.raises(ValueError, match="problem 0: now is None"):
        paired([None], [1.0])
    with pytest.raises(ValueError, match=r"problem 0: now is 800\.0"):
        paired([800.0], [1.0])
    with pytest.raises(ValueError, match="problem 1: then is True"):
        paired([1.0, 1.0], [1.0, True])
    ours, theirs = paired(torch.tensor([1.0, 2.0]), pd.Series([1, 2]))
    assert ours.tolist() == theirs.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_an_estimate_is_students_t(seed: int) -> None:
    d = np.random.default_rng(seed).normal(0.1, 1, 30)
    estimate = Estimate.of(d)
    less, more = (ttest_1samp(d, 0.05, alternative=a) for a in ("less", "greater"))
    assert estimate.p_below(0.05) == pytest.approx(less.pvalue, rel=1e-10)
    assert estimate.p_above(0.05) == pytest.approx(more.pvalue, rel=1e-10)
    interval = ttest_1samp(d, 0).confidence_interval(0.9)
    assert (estimate.lower(0.95), estimate.upper(0.95)) == pytest.approx(tuple(interval))


def test_the_guard_is_two_more_problems() -> None:
    d = Counts.of([3, 4, 2], 4, [12, 16, 12], 16).differences
    assert d.tolist() == [0.0, 0.0, -0.25]
    assert Estimate.of(d, guarded=True) == Estimate.of(np.array([0.0, 0.0, -0.25, 1.0, -1.0]))


def test_saturation_is_no_certainty_under_the_guard() -> None:
    nothing = np.zeros(64)
    assert Estimate.of(nothing).lower(0.95) == 0
    assert Estimate.of(nothing, guarded=True).lower(0.95) < -0.03


def test_one_observation_proves_nothing() -> None:
    alone = Estimate.of(np.array([-1.0]))
    assert alone.p_below(0.0) == 0.5
    assert alone.lower(0.95) == -math.inf
    assert alone.problems_needed(1, 0.05, 0.05) is None


@pytest.mark.parametrize(("d", "p"), [(-0.25, 0.0), (0.0, 1.0), (0.25, 1.0)])
def test_without_variance_the_mean_decides(d: float, p: float) -> None:
    assert Estimate.of(np.full(64, d)).p_below(0.0) == p


def test_the_detectable_change_is_found_nine_times_in_ten() -> None:
    estimate = Estimate(0.0, 0.02, 200)
    drop = estimate.detectable(0.01)
    assert norm.cdf((drop - norm.ppf(0.99) * 0.02) / 0.02) == pytest.approx(0.9)
    # A rule that acts on observed changes of a tenth only must see that much nine times in ten.
    assert norm.cdf((estimate.detectable(0.01, at_least=0.1) - 0.1) / 0.02) == pytest.approx(0.9)


def test_the_problems_needed_give_a_bound_nine_times_in_ten() -> None:
    estimate = Estimate(0.0, 0.02, 199)
    needed = estimate.problems_needed(200, 0.05, 0.05)
    assert needed == math.ceil(200 * ((t.ppf(0.95, 199) + norm.ppf(0.9)) * 0.4) ** 2)
    assert estimate.problems_needed(200, 0.0, 0.05) is None


def test_the_residue_of_a_difference_is_no_room() -> None:
    estimate = Estimate(0.0, 0.02, 199)
    assert 0.3 - 0.1 - 0.2 != 0
    assert estimate.problems_needed(200, abs(0.3 - 0.1 - 0.2), 0.05) is None


@pytest.mark.parametrize("level", [0.05, 1e-6, 1e-17, 1e-100])
def test_quantiles_hold_at_tiny_levels(level: float) -> None:
    estimate = Estimate(0.0, 1.0, 200)
    assert estimate.quantile(level) == pytest.approx(t.isf(level, 200))
    assert estimate.detectable(level) == pytest.approx(norm.isf(level) + norm.ppf(0.9))


def test_holm_is_the_step_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-value 1 is nan"):
        holm([0.5, math.nan])


def test_the_odds_ratio_of_a_drop_causes_it() -> None:
    then = [0, 3, 8, 15, 16]
    ratio = odds_ratio_of_drop(then, 16, 0.05)
    before = (np.array(then) + 0.5) / 17
    odds = ratio * before / (1 - before)
    assert (before - odds / (1 + odds)).mean() == pytest.approx(0.05)
    assert ratio < 1
    assert odds_ratio_of_drop([16] * 5, 16, 0.05) > 0, "a perfect record can still be lost"
    with pytest.raises(ValueError, match=r"drop is 0\.0, not above 0"):
        odds_ratio_of_drop(then, 16, 0.0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=20), st.floats(1e-6, 0.999))
def test_half_of_a_rate_is_lost_where_no_more_can_be(then: list[int], drop: float) -> None:
    ratio = odds_ratio_of_drop(then, 16, drop)
    before = (np.array(then) + 0.5) / 17
    odds = ratio * before / (1 - before)
    assert 0 < ratio < 1
    lost = float((before - odds / (1 + odds)).mean())
    assert lost == pytest.approx(min(drop, before.mean() / 2), rel=1e-3)


def test_the_evidence_of_what_could_not_be_otherwise_is_none() -> None:
    # All samples right before and now: their sum leaves one deal, whatever has happened.
    n = MOST_SAMPLES
    ratio = odds_ratio_of_drop([n] * 4, n, 0.05)
    assert drop_evidence(Counts.of([n] * 4, n, [n] * 4, n), ratio) == pytest.approx([0.0] * 4)
    assert (np.diff(drop_evidence(Counts.of([0] * 4, n, [n] * 4, n), ratio)) > 100).all()


def test_the_evidence_of_a_drop_is_fishers_noncentral_likelihood_ratio() -> None:
    now, then = [0, 4, 2, 3, 1], [5, 16, 10, 0, 16]
    evidence = drop_evidence(Counts.of(now, 4, then, 16), 0.6)
    expected = [
        nchypergeom_fisher.logpmf(c, 20, b + c, 4, 0.6) - hypergeom.logpmf(c, 20, b + c, 4)
        for c, b in zip(now, then, strict=True)
    ]
    assert evidence == pytest.approx(np.cumsum(expected), abs=1e-9)


def test_the_evidence_of_harmlessness_is_the_wealth_of_the_bets() -> None:
    d = np.array([0.1, -1.0, 0.0, 1.0])
    wealth = [
        np.mean([np.prod(1 + g * (d[: n + 1] + 0.05) / 0.95) for g in BETS]) for n in range(len(d))
    ]
    assert np.exp(harmless_evidence(d, 0.05)) == pytest.approx(wealth)
