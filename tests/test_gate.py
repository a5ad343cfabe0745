"""Each rule on runs whose verdict is known, and the numbers of a verdict by other means."""

import dataclasses
import math
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm, t, ttest_1samp, ttest_rel

from grpo_harness.gate.bounds import IMPROVEMENT, LENGTH, RATE, Bounds
from grpo_harness.gate.plan import plan
from grpo_harness.gate.stats import stratified_p
from grpo_harness.gate.verdicts import (
    Evidence,
    judge,
    judge_improvement,
    judge_length,
    judge_rate,
    judge_sequential,
)

N = 256


def skills(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).beta(0.7, 0.3, n)


def counts(skill: np.ndarray, k: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(k, skill)


def bounded(usual: Bounds, **settings: Any) -> dict[str, Any]:
    """The arguments of a rule: a margin and a minimum become its bounds."""
    sizes = {name: settings.pop(name) for name in ("margin", "minimum") if name in settings}
    return {**settings, "bounds": dataclasses.replace(usual, **sizes)}


def accuracy(now: Any, then: Any, **settings: Any) -> Evidence:
    return judge(now, 4, then, 16, **{"same_policy": True, **bounded(RATE, **settings)})


def accuracy_rule(now: Any, then: Any) -> Evidence:
    return accuracy(now, then)


def rate_rule(now: Any, then: Any) -> Evidence:
    return judge_rate(now, 4, then, 16, same_policy=True)


def sequential_rule(now: Any, then: Any) -> Evidence:
    return judge_sequential(now, 4, then, 16)


def test_an_unchanged_policy_passes() -> None:
    v = accuracy(counts(skills(0), 4, 1), counts(skills(0), 16, 2))
    assert v.verdict == "PASS"
    assert v.lower < v.delta < v.upper
    assert v.lower > -0.05


@pytest.mark.parametrize("same_policy", [True, False])
def test_a_large_drop_fails(same_policy: bool) -> None:
    now, then = counts(skills(0) * 0.8, 4, 1), counts(skills(0), 16, 2)
    v = accuracy(now, then, same_policy=same_policy)
    assert v.verdict == "FAIL"
    assert v.delta < -0.1
    assert v.p < 1e-6
    assert v.needed is None, "no number of problems would prove this drop harmless"


def test_between_the_two_nothing_is_proven() -> None:
    v = accuracy(counts(skills(0, 64) * 0.96, 4, 1), counts(skills(0, 64), 16, 2))
    assert v.verdict == "UNPROVEN"
    assert v.needed is not None
    assert v.needed > 64


def test_a_gain_passes_but_of_the_recorded_policy() -> None:
    now, then = counts(skills(0) ** 0.5, 4, 1), counts(skills(0), 16, 2)
    assert accuracy(now, then, same_policy=False).verdict == "PASS"
    same = accuracy(now, then)
    assert same.verdict == "FAIL"
    assert "what draws or scores its completions has changed" in same.reason
    assert same.delta > 0.05
    assert same.p == 2 * stratified_p(then, 16, now, 4)


@pytest.mark.parametrize("rise", [0.05, 0.1])
def test_a_rise_of_the_recorded_policy_is_found_as_a_drop_is(rise: float) -> None:
    runs, skill = range(100), np.full(N, 0.5)
    found = {
        sign: sum(
            accuracy(counts(skill + sign * rise, 4, i), counts(skill, 16, i + 1)).verdict == "FAIL"
            for i in runs
        )
        for sign in (1, -1)
    }
    assert abs(found[1] - found[-1]) <= 25
    assert min(found.values()) >= (30 if rise == 0.05 else 95)


@pytest.mark.parametrize("rule", [accuracy_rule, rate_rule, sequential_rule])
def test_false_alarms_of_both_directions_together_are_rare(rule: Any) -> None:
    runs = range(300)
    red = sum(
        rule(counts(skills(i), 4, i + 1), counts(skills(i), 16, i + 2)).verdict == "FAIL"
        for i in runs
    )
    assert red <= binom.ppf(0.999, len(runs), 0.01)


def test_below_the_floor_nothing_is_judged() -> None:
    v = accuracy([0] * 63, [16] * 63)
    assert v.verdict == "ERROR"
    assert "63 problems" in v.reason
    assert "64" in v.reason
    assert accuracy([0] * 64, [16] * 64).verdict == "FAIL"


def test_one_problem_is_an_error_without_a_crash() -> None:
    assert accuracy([0], [16], same_policy=False).verdict == "ERROR"
    assert judge_length([1.0], 4, [2.0]).verdict == "ERROR"
    assert judge_rate([4], 4, [0], 16, same_policy=True).verdict == "ERROR"
    assert judge_improvement([4], 4, [0], 16).verdict == "ERROR"


def test_the_numbers_of_a_verdict_by_other_means() -> None:
    now, then = counts(skills(0), 4, 1), counts(skills(0), 16, 2)
    v = accuracy(now, then, alpha=0.01 / 12)
    d = now / 4 - then / 16
    guarded = np.concatenate([d, [1, -1]])
    interval = ttest_1samp(guarded, 0).confidence_interval(0.9)
    se = guarded.std(ddof=1) / math.sqrt(N + 2)
    assert (v.n, v.k) == (N, 4)
    assert v.now == pytest.approx((now / 4).mean())
    assert v.then == pytest.approx((then / 16).mean())
    assert v.delta == pytest.approx(d.mean())
    assert (v.lower, v.upper) == pytest.approx((interval.low, interval.high))
    sides = stratified_p(now, 4, then, 16), stratified_p(4 - now, 4, 16 - then, 16)
    assert v.p == min(1, 2 * min(sides))
    assert v.mde90 == pytest.approx((norm.ppf(1 - 0.01 / 24) + norm.ppf(0.9)) * se)
    room = 0.05 + min(d.mean(), 0)
    assert v.needed == math.ceil(N * ((t.ppf(0.95, N + 1) + norm.ppf(0.9)) * se / room) ** 2)


def test_another_policys_drop_must_also_generalise() -> None:
    # Four problems lost completely: certain on this suite, but four problems are no population.
    now, then = [0] * 4 + [4] * 252, [16] * N
    same, other = accuracy(now, then), accuracy(now, then, same_policy=False)
    assert same.verdict == "FAIL"
    assert other.verdict != "FAIL"
    d = np.array(now) / 4 - 1
    assert other.p == pytest.approx(ttest_1samp(d, 0, alternative="less").pvalue)
    assert same.p < 1e-9 < other.p


def test_a_drop_too_small_to_matter_does_not_fail() -> None:
    # Certain, but one problem in 200: the verdict is about size as much as about certainty.
    now, then = [0] * 2 + [4] * 398, [16] * 400
    assert accuracy(now, then).p < 0.01
    assert accuracy(now, then).verdict == "PASS"
    assert accuracy(now, then, minimum=0.005).verdict == "FAIL"


def test_saturation_alone_is_no_pass() -> None:
    v = accuracy([4] * 64, [16] * 64)
    assert (v.delta, v.p, v.verdict) == (0, 1, "PASS")
    assert v.lower < -0.03, "64 perfect problems still leave room for a loss"
    assert accuracy([4] * 64, [16] * 64, margin=0.03).verdict == "UNPROVEN"


def test_a_smaller_part_of_the_risk_asks_for_more_proof() -> None:
    now, then = counts(skills(0) * 0.93, 4, 6), counts(skills(0), 16, 2)
    alone = accuracy(now, then)
    assert 0.0001 < alone.p < 0.01, "the example must lie between the two thresholds"
    assert alone.verdict == "FAIL"
    shared = accuracy(now, then, alpha=0.0001)
    assert shared.verdict != "FAIL"
    assert shared.p == alone.p
    assert shared.mde90 > alone.mde90


def test_a_reference_may_have_another_number_of_samples_a_problem() -> None:
    now, then = counts(skills(0), 4, 1), counts(skills(0), 16, 2)
    assert judge(now, 4, then, [16] * N, same_policy=True) == accuracy(now, then)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 63))
def test_one_correct_answer_fewer_never_helps(seed: int, i: int) -> None:
    skill = skills(seed, 64)
    now, then = counts(skill, 4, seed + 1), counts(skill, 16, seed + 2)
    flipped = stratified_p(4 - now, 4, 16 - then, 16)
    if now[i] == 0 or stratified_p(now, 4, then, 16) > flipped:
        return  # a rise of the recorded policy is told by the other direction
    fewer = now.copy()
    fewer[i] -= 1
    before, after = accuracy(now, then), accuracy(fewer, then)
    assert after.p <= before.p * (1 + 1e-12)
    assert after.delta < before.delta
    assert (before.verdict, after.verdict) not in {("FAIL", "UNPROVEN"), ("FAIL", "PASS")}


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_a_rate_is_the_mirror_of_an_accuracy(seed: int) -> None:
    skill = skills(seed, 64)
    now, then = counts(skill, 4, seed + 1), counts(skill, 16, seed + 2)
    drop, rise = accuracy(now, then), judge_rate(4 - now, 4, 16 - then, 16, same_policy=True)
    same = ("verdict", "p", "mde90", "needed", "n", "k")
    assert [getattr(rise, field) for field in same] == [getattr(drop, field) for field in same]
    assert (rise.delta, rise.lower, rise.upper) == pytest.approx(
        (-drop.delta, -drop.upper, -drop.lower)
    )
    assert (rise.now, rise.then) == pytest.approx((1 - drop.now, 1 - drop.then))


def test_a_rising_rate_fails_and_a_falling_one_passes() -> None:
    few, many = counts(np.full(N, 0.02), 4, 0), counts(np.full(N, 0.2), 4, 0)
    few_then, many_then = counts(np.full(N, 0.02), 16, 1), counts(np.full(N, 0.2), 16, 1)
    worse = judge_rate(many, 4, few_then, 16, same_policy=False)
    assert worse.verdict == "FAIL"
    assert worse.delta > 0.1
    assert f"{worse.delta:+.3f}" in worse.reason
    assert judge_rate(few, 4, few_then, 16, same_policy=False).verdict == "PASS"
    assert judge_rate(few, 4, many_then, 16, same_policy=False).verdict == "PASS"
    assert judge_rate(few, 4, many_then, 16, same_policy=True).verdict == "FAIL"


def test_a_better_policy_is_proven_better() -> None:
    v = judge_improvement(counts(skills(0) ** 0.5, 4, 1), 4, counts(skills(0), 16, 2), 16)
    assert v.verdict == "PASS"
    assert v.delta > 0.05
    assert 0 < v.lower < v.delta
    assert v.p <= 0.01


def test_a_worse_policy_is_proven_worse() -> None:
    v = judge_improvement(counts(skills(0) * 0.8, 4, 1), 4, counts(skills(0), 16, 2), 16)
    assert v.verdict == "FAIL"
    assert v.p <= 0.01
    assert v.needed is None


def test_training_that_did_nothing_is_unproven() -> None:
    v = judge_improvement(counts(skills(0), 4, 1), 4, counts(skills(0), 16, 2), 16)
    assert v.verdict == "UNPROVEN"
    same = judge_improvement([4] * N, 4, [16] * N, 16)
    assert (same.verdict, same.p, same.needed) == ("UNPROVEN", 1, None)


def test_an_improvement_on_a_handful_of_problems_does_not_generalise() -> None:
    trained, base = [4] * 4 + [0] * 252, [0] * N
    v = judge_improvement(trained, 4, base, 16)
    assert stratified_p(base, 16, trained, 4) < 1e-6
    assert v.verdict == "UNPROVEN"


def test_an_improvement_may_have_to_be_large() -> None:
    trained, base = counts(skills(0) ** 0.5, 4, 1), counts(skills(0), 16, 2)
    assert judge_improvement(trained, 4, base, 16, bounds=Bounds(0.02, 0.01)).verdict == "PASS"
    assert judge_improvement(trained, 4, base, 16, bounds=Bounds(0.5, 0.01)).verdict == "UNPROVEN"


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(1.0, "PASS"), (1.5, "FAIL"), (1 / 1.5, "FAIL"), (1.04, "PASS"), (1.15, "FAIL")],
)
def test_lengths_are_judged_in_both_directions(ratio: float, name: str) -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(3, 0.5, 128)
    now = difficulty + rng.normal(math.log(ratio), 0.15, 128)
    then = difficulty + rng.normal(0, 0.08, 128)
    v = judge_length(now, 4, then)
    assert v.verdict == name
    assert v.delta == pytest.approx(ratio - 1, abs=0.05)
    assert v.now / v.then == pytest.approx(1 + v.delta)
    interval = ttest_rel(now, then).confidence_interval(0.9)
    assert (1 + v.lower, 1 + v.upper) == pytest.approx(
        (math.exp(interval.low), math.exp(interval.high))
    )


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.7, 1.4), st.integers(1, 20))
def test_a_length_fails_where_its_interval_lies_outside(
    seed: int, ratio: float, checks: int
) -> None:
    now = np.random.default_rng(seed).normal(3 + math.log(ratio), 0.4, 64)
    then = np.full(64, 3.0)
    v = judge_length(now, 4, then, alpha=0.01 / checks)
    wide = ttest_rel(now, then).confidence_interval(1 - 0.01 / checks)
    outside = wide.low > math.log(1.05) or wide.high < -math.log(1.05)
    assert (v.verdict == "FAIL") == outside
    narrow = ttest_rel(now, then).confidence_interval(0.9)
    inside = -math.log(1.25) < narrow.low and narrow.high < math.log(1.25)
    assert (v.verdict == "PASS") == (inside and not outside)


def test_a_length_too_noisy_to_tell_is_unproven() -> None:
    rng = np.random.default_rng(0)
    v = judge_length(rng.normal(3, 2, 64), 1, rng.normal(3, 2, 64))
    assert v.verdict == "UNPROVEN"
    assert v.needed is not None
    assert v.needed > 64


def test_lengths_a_quarter_apart_by_chance_are_told_from_a_shift() -> None:
    rng = np.random.default_rng(0)
    names = {
        ratio: [
            judge_length(rng.normal(math.log(ratio), 0.25, 128), 4, np.zeros(128)).verdict
            for _ in range(400)
        ]
        for ratio in (1.0, 1.15)
    }
    assert names[1.0].count("FAIL") == 0
    assert names[1.15].count("FAIL") >= 0.9 * 400


def test_a_sequential_run_stops_at_the_first_decision_and_keeps_it() -> None:
    now, then = counts(skills(0), 4, 1), counts(skills(0), 16, 2)
    drawn = range(16, N + 1, 16)
    names = [judge_sequential(now[:n], 4, then, 16).verdict for n in drawn]
    first = names.index("PASS")
    assert first > 3, "not before the floor"
    assert set(names[:first]) == {"UNPROVEN"}
    assert set(names[first:]) == {"PASS"}
    v = judge_sequential(now, 4, then, 16)
    assert v.n == drawn[first]
    assert v.now == pytest.approx((now[: v.n] / 4).mean())


def test_a_sequential_run_fails_a_large_drop_early() -> None:
    now, then = counts(skills(0) * 0.7, 4, 1), counts(skills(0), 16, 2)
    v = judge_sequential(now, 4, then, 16)
    assert v.verdict == "FAIL"
    assert v.p <= 0.01
    assert v.n == 64, "no look before the floor, and the decision rests on all that was drawn"
    assert v.delta == pytest.approx((now[:64] / 4 - then[:64] / 16).mean())
    assert v.n < judge_sequential(now, 4, then, 16, alpha=1e-42).n


def test_the_end_of_the_plan_is_a_look() -> None:
    # Level until the last look, and then nothing right any more.
    now, then = [4, 4, 4, 2] * 16 + [0] * 15, [14] * 79
    assert judge_sequential(now[:64], 4, then, 16).verdict == "UNPROVEN"
    early, late = judge_sequential(now[:78], 4, then, 16), judge_sequential(now, 4, then, 16)
    assert (early.verdict, early.n, early.p) == ("UNPROVEN", 78, 1)
    assert (late.verdict, late.n) == ("FAIL", 79)
    assert late.p <= 0.01


@settings(deadline=None)
@given(st.floats(0, 0.08), st.floats(0, 1), st.integers(0, 2**32))
def test_a_reference_that_has_no_margin_to_lose_is_judged_all_the_same(
    rate: float, left: float, seed: int
) -> None:
    now, then = counts(np.full(80, rate * left), 4, seed), counts(np.full(80, rate), 16, seed + 1)
    v = judge_sequential(now, 4, then, 16)
    assert v.verdict in ("PASS", "FAIL", "UNPROVEN")
    assert v.verdict != "FAIL" or abs(v.delta) >= 0.01
    assert judge_sequential([0] * 80, 4, [0] * 80, 16).verdict != "FAIL"


def test_false_alarms_on_a_poor_reference_are_rare_and_its_loss_is_found() -> None:
    runs = range(400)

    def fails(rate: float) -> int:
        return sum(
            judge_sequential(
                counts(np.full(512, rate), 8, i), 8, counts(np.full(512, 0.045), 16, i + 1), 16
            ).verdict
            == "FAIL"
            for i in runs
        )

    assert fails(0.045) <= binom.ppf(0.999, len(runs), 0.01)
    assert judge_sequential([0] * 64, 8, [1] * 64, 16).verdict == "FAIL"


def test_a_sequential_run_does_not_fail_a_drop_too_small_to_matter() -> None:
    now, then = [3, 4] * 128, [15] * N
    assert judge_sequential(now, 4, then, 16).delta == pytest.approx(-0.0625)
    assert judge_sequential(now, 4, then, 16).verdict == "FAIL"
    assert judge_sequential(now, 4, then, 16, bounds=Bounds(0.08, 0.07)).verdict != "FAIL"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 16)), min_size=64, max_size=120))
def test_a_sequential_fault_is_the_accuracy_of_those_without_it(
    pairs: list[tuple[int, int]],
) -> None:
    now, then = ([pair[side] for pair in pairs] for side in (0, 1))
    fault = judge_sequential(now, 4, then, 16, fault=True)
    good = judge_sequential([4 - x for x in now], 4, [16 - x for x in then], 16)
    assert (fault.verdict, fault.n, fault.p) == (good.verdict, good.n, pytest.approx(good.p))
    assert (fault.now, fault.delta) == (pytest.approx(1 - good.now), pytest.approx(-good.delta))


def test_early_looks_at_a_length_pass_a_change_of_the_margin_as_rarely_as_one_look_does() -> None:
    """A change that lies at the margin is let pass at most 1 time in 20."""
    rng, passed, runs = np.random.default_rng(3), 0, 300
    for _ in range(runs):
        now = rng.normal(math.log(1 + LENGTH.margin), 1.0, 400)
        looks = range(64, 401, 16)
        passed += any(
            judge_length(now[:n], 4, [0.0] * n, early=n < 400).verdict == "PASS" for n in looks
        )
    assert passed <= binom.ppf(0.999, runs, 0.05)


def test_a_sequential_run_is_held_to_its_plan() -> None:
    with pytest.raises(ValueError, match="problem 2 is not in the plan"):
        judge_sequential([1, 1, 1], 4, [1, 1], 16)
    with pytest.raises(ValueError, match="look is 0"):
        judge_sequential([4] * 64, 4, [16] * 64, 16, look=0)
    assert judge_sequential([4] * 63, 4, [16] * 63, 16).verdict == "ERROR"
    assert judge_sequential([4] * 8, 4, [16] * 64, 16).verdict == "UNPROVEN", (
        "before the first look"
    )


def test_a_sequential_run_saves_two_problems_in_five() -> None:
    runs = range(150)
    unchanged = [
        judge_sequential(counts(skills(i), 4, i + 1), 4, counts(skills(i), 16, i + 2), 16)
        for i in runs
    ]
    assert np.mean([v.n for v in unchanged]) < 0.6 * N
    assert sum(v.verdict == "FAIL" for v in unchanged) <= binom.ppf(0.999, len(runs), 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"margin": 0.005}, "margin 0.005"),
        ({"minimum": -0.1}, "minimum is -0.1"),
        ({"margin": math.nan}, "margin is nan"),
        ({"margin": 1}, "margin is 1, not a number from 0 to below 1"),
        ({"margin": None}, "margin is None"),
        ({"margin": [0.05]}, r"margin is \[0\.05\]"),
        ({"margin": np.array([0.05, 0.06])}, r"margin is \[0\.05, 0\.06\]"),
        ({"minimum": "0.01"}, r"minimum is '0\.01'"),
        ({"minimum": 0.01j}, r"minimum is 0\.01j"),
        ({"minimum": False}, "minimum is False"),
        ({"alpha": Decimal("0.01")}, "alpha is Decimal"),
        ({"alpha": 1e-310}, "alpha is 1e-310, less than 1e-300"),
        ({"same_policy": "False"}, "same_policy is 'False'"),
        ({"same_policy": None}, "same_policy is None"),
        ({"same_policy": 1}, "same_policy is 1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy([4] * 64, [16] * 64, **settings)


SETTINGS = st.one_of(
    st.floats(),
    st.integers(),
    st.floats(0, 1),
    st.sampled_from(
        [None, "0.05", [0.02], 1j, Decimal("0.02"), np.array([1, 2]), np.float16(0.02), 10**400]
    ),
)


@settings(deadline=None)
@given(st.sampled_from(["margin", "minimum", "alpha", "look"]), SETTINGS)
def test_any_setting_is_used_or_refused(name: str, value: Any) -> None:
    now, then, given = [3, 4] * 32, [14] * 64, bounded(RATE, **{name: value})
    lengths = [2.0, 3.0] * 32
    rules: list[Callable[[], Any]] = [lambda: judge_sequential(now, 4, then, 16, **given)]
    if name != "look":
        rules += [
            lambda: plan(then, 16, 4, **given),
            lambda: accuracy(now, then, **{name: value}),
            lambda: judge_rate(now, 4, then, 16, same_policy=True, **given),
            lambda: judge_improvement(now, 4, then, 16, **bounded(IMPROVEMENT, **{name: value})),
            lambda: judge_length(lengths, 4, lengths, **bounded(LENGTH, **{name: value})),
        ]
    for rule in rules:
        refusal = name
        try:
            assert math.isfinite(rule().mde90)
        except ValueError as error:
            refusal = str(error)
        assert name in refusal


def test_settings_of_numpy_and_torch_are_numbers() -> None:
    expected = accuracy([3] * 64, [12] * 64, margin=0.25, alpha=0.5)
    assert expected == accuracy([3] * 64, [12] * 64, margin=np.float16(0.25), alpha=np.float16(0.5))
    assert expected == accuracy([3] * 64, [12] * 64, margin=torch.tensor(0.25), alpha=0.5)
    assert expected == accuracy([3] * 64, [12] * 64, margin=0.25, alpha=0.5, same_policy=np.True_)


@pytest.mark.parametrize("tiny", [{"alpha": 1e-17}, {"alpha": 1e-299}])
def test_tiny_levels_ask_for_more_but_are_judged(tiny: dict[str, Any]) -> None:
    now, then = counts(skills(0) ** 0.5, 4, 1), counts(skills(0), 16, 2)
    level = tiny["alpha"] / 2
    found, usual = plan(then, 16, 4, **tiny), plan(then, 16, 4)
    assert found.needed > usual.needed
    z = norm.isf(level) + norm.ppf(0.9)
    assert found.mde90 / usual.mde90 == pytest.approx(z / (norm.isf(0.005) + norm.ppf(0.9)))
    v = judge_improvement(now, 4, then, 16, **tiny)
    assert v.needed is not None
    assert v.needed > N
    assert accuracy([0] * N, [16] * N, **tiny).verdict == "FAIL"
    assert judge_sequential([0] * N, 4, [16] * N, 16, **tiny).verdict == "FAIL"
    assert judge_length([3.0, 3.1] * 64, 4, [2.0] * 128, **tiny).verdict in ("FAIL", "UNPROVEN")


def test_the_residue_of_a_difference_needs_no_number_of_problems() -> None:
    v = judge_improvement([4, 1] * 50, 5, [6, 9] * 50, 15)
    assert v.delta == pytest.approx(0, abs=1e-12)
    assert v.needed is None


@pytest.mark.parametrize("k", [math.nan, 4.5, "4", None, 0, [4]])
def test_a_plan_is_of_a_whole_number_of_samples(k: Any) -> None:
    with pytest.raises(ValueError, match="k is"):
        plan([12] * 64, 16, k)


@pytest.mark.parametrize("look", [1.5, math.nan, "a", None, True])
def test_looks_are_whole_numbers_of_problems_apart(look: Any) -> None:
    with pytest.raises(ValueError, match="look is"):
        judge_sequential([3] * 64, 4, [12] * 64, 16, look=look)


@pytest.mark.parametrize(
    ("now", "k", "message"),
    [
        ([1.0] * 64, 0, "problem 0: k is 0"),
        ([1.0] * 64, -3, "problem 0: k is -3"),
        ([1.0] * 64, None, "problem 0: k is None"),
        ([1.0] * 64, [4, 4], "problem 2 has no counterpart"),
        ([1.0] * 64, [], "problem 0 has no counterpart"),
        ([800.0] * 64, 4, r"problem 0: now is 800\.0"),
        ([1.0] * 63 + [True], 4, "problem 63: now is True"),
        (None, 4, "problem 0: now is None"),
    ],
)
def test_lengths_are_checked_with_their_samples(now: Any, k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_length(now, k, [1.0] * 64)


def test_the_samples_of_lengths_may_differ_by_problem() -> None:
    lengths = [1.0] * 64
    assert judge_length(lengths, np.int64(4), lengths).k == 4
    assert judge_length(lengths, [4, 8] * 32, lengths).k == 8


@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_an_improvement_by_less_than_nothing_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin is"):
        judge_improvement([4] * 64, 4, [16] * 64, 16, bounds=Bounds(margin, 0.01))


@pytest.mark.parametrize(
    "rule",
    [
        lambda now, then: judge(now, 4, then, 16, same_policy=True),
        lambda now, then: judge_rate(now, 4, then, 16, same_policy=True),
        lambda now, then: judge_improvement(now, 4, then, 16),
        lambda now, then: judge_length(now, 4, then),
    ],
)
def test_every_rule_refuses_invalid_input_by_problem(rule: Callable[[Any, Any], Evidence]) -> None:
    with pytest.raises(ValueError, match="problem 2"):
        rule([1, 1, math.nan], [1, 1, 1])
    with pytest.raises(ValueError, match="problem 3 has no counterpart"):
        rule([1, 1, 1], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="problem 0"):
        rule([], [])


def test_a_verdict_is_a_value() -> None:
    v = accuracy([4] * 64, [16] * 64)
    assert v == accuracy([4] * 64, [16] * 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        v.verdict = "FAIL"  # type: ignore[misc]


def test_a_session_of_24_checks_is_judged_in_two_seconds() -> None:
    start = time.perf_counter()
    for seed in range(24):
        now, then = counts(skills(seed, 512), 8, 1), counts(skills(seed, 512), 16, 2)
        judge(now, 8, then, 16, same_policy=False, alpha=0.01 / 24)
    assert time.perf_counter() - start < 2
