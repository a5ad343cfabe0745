"""Measurement against reference -> verdict. One rule a function, one engine behind them.

A verdict is FAIL only on proof of harm, PASS only on proof of the absence of harm, and UNPROVEN
between the two: a run that is too small says so instead of turning green. See
`grpo_harness.gate.stats` for the tests themselves.

Several checks share one risk of a false alarm: a rule that is told it is one of `checks` tests at
`alpha / checks` (Bonferroni). Every check of a run is a test of its own that asserts its own
verdict, whichever others were selected and wherever a parallel worker put them, so there is no
place where all the p-values are at hand, as Holm's step-down needs. The price is small: the
smallest p-value, which decides whether a run fails at all, meets the same threshold under both,
so a single drop among many checks is caught as often (`make calibrate` prints both).

A rerun judged on the pooled samples must halve `alpha` for every earlier attempt; the caller
knows of those, the rules do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, expm1, inf, log
from typing import Any, Literal, TypeAlias

import numpy as np

from grpo_harness.gate.inputs import (
    GREATEST_LOG,
    Numbers,
    Samples,
    brief,
    is_real,
    paired,
    plain,
    samples,
    whole,
)
from grpo_harness.gate.stats import (
    NO_ROOM,
    Counts,
    Estimate,
    drop_evidence,
    drop_p,
    harmless_evidence,
    odds_ratio_of_drop,
)

MINIMUM_PROBLEMS = 64
"""Fewer problems than this are not judged: the bounds are no longer to be trusted."""

PASS_CONFIDENCE = 0.95
"""One-sided confidence of the bounds that a verdict reports and that PASS rests on."""

PASS_LEVEL = 1 - PASS_CONFIDENCE
LEAST_LEVEL = 1e-300
"""No check is held to a stricter level: the p-values below it run out of floats."""

Name: TypeAlias = Literal["PASS", "FAIL", "UNPROVEN", "ERROR"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run can find before it has drawn a sample.

    `mde90` is the drop of the mean rate that `n` problems of `k` samples find nine times in ten,
    `needed` the number of problems that find one of `margin`.
    """

    n: int
    k: int
    then: float
    mde90: float
    needed: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check found, and the numbers it rests on.

    `now`, `then` and `delta` are mean rates in 0..1 and their difference; in `judge_length` they
    are geometric mean lengths and the relative change (0.1 is 10 % longer). `lower` and `upper`
    are guarded bounds of `delta`, one-sided at 95 % each: together they are a 90 % interval.
    `p` belongs to the proof of harm (in `judge_improvement` to the proof of gain, unless a loss
    is proven), before the correction for `checks`. `mde90` is the change, in the unit of
    `delta`, that this run would find nine times in ten. `needed` is the number of problems that
    would prove a PASS nine times in ten, None where no number would. `k` is the largest number of
    samples of a problem: they differ only where runs that stopped early are pooled.
    """

    name: Name
    reason: str
    n: int
    k: int
    now: float
    then: float
    delta: float
    lower: float
    upper: float
    p: float
    mde90: float
    needed: int | None


def plan(
    then: Numbers,
    k_then: Samples,
    k: int,
    *,
    margin: float = 0.05,
    minimum: float = 0.01,
    alpha: float = 0.01,
    checks: int = 1,
) -> Plan:
    """Predict what `judge` will find on the problems of a reference, `k` samples each.

    The prediction is of the same policy, where all that a problem's difference varies by is the
    drawing: with rate q its variance is q (1 - q) (1 / k + 1 / k_then). Rates are shrunk by half
    a success and half a failure, else a problem that never failed would seem to be certain.
    Another policy also differs by problem, by an amount that nobody knows beforehand.

    Raises ValueError as `judge` does.
    """
    margin, minimum = _sizes(margin, minimum)
    level = _level(alpha, checks)
    k = int(whole([k], "k", least=1)[0])
    counts = Counts.of(then, k_then, then, k_then)
    rates = (counts.then + 0.5) / (counts.k_then + 1)
    variance = float((rates * (1 - rates) * (1 / k + 1 / counts.k_then)).mean())

    def mde90(n: int) -> float:
        return Estimate.expected(variance, n).detectable(level, minimum)

    n = len(counts.then)
    needed = MINIMUM_PROBLEMS
    while mde90(needed) > margin:
        needed += 1 + needed // 100
    return Plan(n, k, float((counts.then / counts.k_then).mean()), mde90(n), needed)


def judge(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    same_policy: bool,
    margin: float = 0.05,
    minimum: float = 0.01,
    alpha: float = 0.01,
    checks: int = 1,
) -> Verdict:
    """Judge whether accuracy has dropped from `then` to `now`.

    `now[i]` of `k` completions of problem i are correct, in the reference `then[i]` of `k_then`
    (each one number, or one a problem). FAIL: the exact p is at most `alpha / checks` and the
    observed drop at least `minimum`. For another policy than the reference's
    (`same_policy=False`) a paired t test must agree, because the drop must also hold for problems
    outside the suite.
    PASS: not FAIL, and the guarded lower bound lies above `-margin`.

    Raises ValueError on invalid counts, naming the problem by index, and on invalid settings.
    """
    margin, minimum = _sizes(margin, minimum)
    level = _level(alpha, checks)
    if not isinstance(same_policy, (bool, np.bool_)):
        raise ValueError(f"same_policy is {brief(same_policy)}, neither True nor False")
    counts = Counts.of(now, k, then, k_then)
    return _no_harm(counts, counts, not same_policy, margin, minimum, level)


def judge_sequential(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    margin: float = 0.05,
    minimum: float = 0.01,
    alpha: float = 0.01,
    checks: int = 1,
    look: int = 16,
) -> Verdict:
    """Judge accuracy after every `look` problems, and stop at the first decision.

    The first look is at `MINIMUM_PROBLEMS` at the earliest, and the end of the plan is one even
    where `look` does not divide it. `then` holds all planned problems in the order they are
    sampled, `now` those sampled so far: call again with more until the verdict is not UNPROVEN or
    the plan is used up. `n` of the verdict says how many problems it used. FAIL: the likelihood
    ratio of a drop by `margin` reaches `checks / alpha`, and the observed drop is at least
    `minimum`. PASS: bets against a drop by `margin` have won twenty times the stake. Both hold
    however often one looks, unlike `lower` and `upper`, which are those of a run of this size.
    `p` is the smallest inverse likelihood ratio of all looks.

    Where the reference is below twice `margin`, the likelihood ratio is that of losing half of
    it, see `odds_ratio_of_drop`: whichever drop it supposes, false alarms are as rare.

    For the same policy only: another one differs by problem, which a likelihood ratio of one
    common change takes for evidence. Raises ValueError as `judge` does, and where `now` is longer
    than `then`.
    """
    margin, minimum = _sizes(margin, minimum)
    level = _level(alpha, checks)
    look = _positive("look", look)
    plan = Counts.of(then, k_then, then, k_then)
    ours = whole(now, "now")
    planned, drawn = len(plan.then), len(ours)
    if drawn > planned:
        raise ValueError(f"problem {planned} is not in the plan of {planned} problems")
    counts = Counts.of(ours, k, plan.then[:drawn], plan.k_then[:drawn])
    ratios = drop_evidence(counts, odds_ratio_of_drop(plan.then, plan.k_then, margin))
    wealth = harmless_evidence(counts.differences, margin)
    looks = [n for n in range(look, drawn + 1, look) if n >= MINIMUM_PROBLEMS]
    if drawn == planned:
        looks.append(drawn)
    used, failed, passed, strongest = drawn, False, False, 0.0
    for n in looks:
        strongest = max(strongest, float(ratios[n - 1]))
        drop = -float(counts.differences[:n].mean())
        failed = bool(ratios[n - 1] >= -log(level)) and drop >= minimum
        passed = bool(wealth[n - 1] >= -log(PASS_LEVEL))
        if failed or passed:
            used = n
            break
    seen = Counts(counts.now[:used], counts.k[:used], plan.then[:used], plan.k_then[:used])
    guarded = Estimate.of(seen.differences, guarded=True)
    return _conclude(
        _undecided(
            seen,
            p=exp(-strongest),
            mde90=guarded.detectable(level, minimum),
            needed=guarded.problems_needed(used, margin + min(guarded.mean, 0.0), PASS_LEVEL),
        ),
        failed=failed,
        passed=passed,
        planned=planned,
    )


def judge_rate(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    margin: float = 0.05,
    minimum: float = 0.01,
    alpha: float = 0.01,
    checks: int = 1,
) -> Verdict:
    """Judge whether the rate of a fault (truncated, unparsable) has risen.

    `judge` in the mirror: `now[i]` of `k` completions of problem i show the fault, FAIL is a
    proven rise of at least `minimum`, PASS a rise proven to stay below `margin`. By the exact
    test alone: completions that can no longer be read are a fault on these prompts already.

    Raises ValueError as `judge` does.
    """
    margin, minimum = _sizes(margin, minimum)
    level = _level(alpha, checks)
    counts = Counts.of(now, k, then, k_then)
    return _no_harm(counts, counts.flipped(), False, margin, minimum, level)


def judge_improvement(
    trained: Numbers,
    k: Samples,
    base: Numbers,
    k_base: Samples,
    *,
    margin: float = 0.0,
    minimum: float = 0.01,
    alpha: float = 0.01,
    checks: int = 1,
) -> Verdict:
    """Judge whether the trained policy is better than its base, on new problems too.

    PASS: the exact test and the paired t test both show a gain at `alpha / checks`, and the
    guarded lower bound lies above `margin`. FAIL: both show a loss, and it is at least `minimum`.
    UNPROVEN: everything else, so also a training that changed nothing.

    Raises ValueError as `judge` does.
    """
    margin, minimum = _below(1.0, "margin", margin), _below(1.0, "minimum", minimum)
    level = _level(alpha, checks)
    counts = Counts.of(trained, k, base, k_base)
    loss, gain = _drop_p(counts, True), _drop_p(counts.flipped(), True)
    delta = float(counts.differences.mean())
    lost = loss <= level and delta <= -minimum
    guarded = Estimate.of(counts.differences, guarded=True)
    return _conclude(
        _undecided(
            counts,
            p=loss if lost else gain,
            mde90=guarded.detectable(level, margin),
            # The test at `level` asks for more than the bound at 95 %, so it sets the price.
            needed=guarded.problems_needed(len(counts.now), delta - margin, level),
        ),
        failed=lost,
        passed=gain <= level and guarded.lower(PASS_CONFIDENCE) > margin,
    )


def judge_length(
    now: Numbers,
    k: Samples,
    then: Numbers,
    *,
    margin: float = 0.25,
    minimum: float = 0.05,
    alpha: float = 0.01,
    checks: int = 1,
) -> Verdict:
    """Judge whether completions have become longer or shorter.

    `now[i]` and `then[i]` are the mean natural logarithm of the lengths of problem i's
    completions, `k` of them now. Their mean difference is the logarithm of a ratio of lengths.
    FAIL: the two-sided interval of the ratio at `1 - alpha / checks` lies wholly outside
    [1 / (1 + minimum), 1 + minimum]. PASS: its 90 % interval lies inside
    [1 / (1 + margin), 1 + margin]. No bound is guarded: a log-ratio has no greatest value that a
    pseudo-problem could take.

    Raises ValueError naming the problem (by index) where there is no logarithm of a length, and on
    invalid settings.
    """
    margin, minimum = _sizes(margin, minimum, most=1e300)
    level = _level(alpha, checks)
    ours, theirs = paired(now, then)
    drawn = samples(k, len(ours), "k")
    ratio = Estimate.of(ours - theirs)
    lower, upper = ratio.lower(PASS_CONFIDENCE), ratio.upper(PASS_CONFIDENCE)
    outside, inside = log(1 + minimum), log(1 + margin)
    # An interval lies outside where one of two tests, each at half of alpha, says so.
    p = min(1.0, 2 * min(ratio.p_below(-outside), ratio.p_above(outside)))
    return _conclude(
        Verdict(
            name="UNPROVEN",
            reason="",
            n=len(ours),
            k=int(drawn.max()),
            now=exp(ours.mean()),
            then=exp(theirs.mean()),
            delta=_relative(ratio.mean),
            lower=_relative(lower),
            upper=_relative(upper),
            p=p,
            mde90=_relative(outside + ratio.detectable(level / 2)),
            needed=ratio.problems_needed(len(ours), inside - abs(ratio.mean), PASS_LEVEL),
        ),
        failed=p <= level,
        passed=-inside < lower and upper < inside,
    )


def _no_harm(
    counts: Counts,
    good: Counts,
    generalise: bool,
    margin: float,
    minimum: float,
    level: float,
) -> Verdict:
    """The rule that `good`, which is `counts` or its complement, has not dropped."""
    p = _drop_p(good, generalise)
    drop = -float(good.differences.mean())
    guarded = Estimate.of(good.differences, guarded=True)
    return _conclude(
        _undecided(
            counts,
            p=p,
            mde90=guarded.detectable(level, minimum),
            needed=guarded.problems_needed(len(counts.now), margin - max(drop, 0.0), PASS_LEVEL),
        ),
        failed=p <= level and drop >= minimum,
        passed=guarded.lower(PASS_CONFIDENCE) > -margin,
    )


def _drop_p(counts: Counts, generalise: bool) -> float:
    """The p of a drop on these problems, with `generalise` also on others like them."""
    p = drop_p(counts)
    return max(p, Estimate.of(counts.differences).p_below(0.0)) if generalise else p


def _undecided(counts: Counts, *, p: float, mde90: float, needed: int | None) -> Verdict:
    """The numbers of a check on counts, before anything is concluded from them."""
    guarded = Estimate.of(counts.differences, guarded=True)
    return Verdict(
        name="UNPROVEN",
        reason="",
        n=len(counts.now),
        k=int(counts.k.max()),
        now=float((counts.now / counts.k).mean()),
        then=float((counts.then / counts.k_then).mean()),
        delta=float(counts.differences.mean()),
        lower=guarded.lower(PASS_CONFIDENCE),
        upper=guarded.upper(PASS_CONFIDENCE),
        p=p,
        mde90=mde90,
        needed=needed,
    )


def _conclude(v: Verdict, *, failed: bool, passed: bool, planned: int = 0) -> Verdict:
    """The one place where evidence becomes a verdict, the same for every rule.

    `planned` is the number of problems of a run that may stop before it has seen them all.
    """
    needed = None if v.needed is None else max(v.needed, MINIMUM_PROBLEMS)
    n = planned or v.n
    if n < MINIMUM_PROBLEMS:
        reason = f"{n} problems are too few to judge, the floor is {MINIMUM_PROBLEMS}"
        return replace(v, name="ERROR", reason=reason, needed=needed)
    if failed:
        reason = f"the change of {v.delta:+.3f} is proven harm, p = {v.p:.2g}"
        return replace(v, name="FAIL", reason=reason, needed=needed)
    within = f"{v.lower:+.3f}..{v.upper:+.3f}"
    if passed:
        reason = f"the change of {v.delta:+.3f}, within {within}, is proven to be acceptable"
        return replace(v, name="PASS", reason=reason, needed=needed)
    wanted = "no number of" if needed is None else f"about {needed}"
    reason = f"{within} proves neither harm nor PASS; at this change {wanted} problems would pass"
    return replace(v, reason=reason, needed=needed)


def _relative(log_ratio: float) -> float:
    """The relative change that a log-ratio means, infinite where a float cannot hold it."""
    return expm1(log_ratio) if log_ratio < GREATEST_LOG else inf


def _sizes(margin: float, minimum: float, most: float = 1.0) -> tuple[float, float]:
    """The checked sizes of a change that is harmless and of one that may matter."""
    margin, minimum = _below(most, "margin", margin), _below(most, "minimum", minimum)
    if margin - minimum < NO_ROOM:
        raise ValueError(
            f"minimum is {minimum!r} and margin {margin!r}: need 0 <= minimum < margin"
        )
    return margin, minimum


def _level(alpha: float, checks: int) -> float:
    """The level of a check that is one of `checks`, which share `alpha`."""
    alpha, checks = _below(1.0, "alpha", alpha), _positive("checks", checks)
    if checks > alpha / LEAST_LEVEL:
        each = f"less than {LEAST_LEVEL:g} for each of {brief(checks)} checks"
        raise ValueError(f"alpha is {alpha!r}, {each}")
    return alpha / checks


def _below(most: float, name: str, value: Any) -> float:
    number = plain(value)
    if isinstance(number, bool) or not is_real(number, 0.0, most) or number == most:
        raise ValueError(f"{name} is {brief(number)}, not a number from 0 to below {most:g}")
    return float(number)


def _positive(name: str, value: Any) -> int:
    number = plain(value)
    if type(number) is not int or number < 1:
        raise ValueError(f"{name} is {brief(number)}, not a whole number from 1 on")
    return number
