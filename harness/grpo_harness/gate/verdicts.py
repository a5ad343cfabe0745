"""Measurement against reference -> evidence and verdict. One function per rule.

FAIL needs proof of harm, PASS needs proof that there is no harm, and everything between is
UNPROVEN: a run that is too small says so instead of turning green. The tests are in
`grpo_harness.gate.stats`.

The recorded policy fails in both directions: only changed code can have made it better. A PASS
means the same for every policy: a loss of the margin or more is ruled out.

The checks of a run share one false-alarm risk; `alpha` is the part of one check. Every check is a
test that asserts its own verdict, whichever others were selected and in whichever process it runs.
So all p-values are never together in one place, as Holm's step-down would need. The price is small:
the smallest p-value, which decides whether a run fails at all, meets the same threshold in both, so
a single drop among many checks is caught as often (`make calibrate` prints both).
"""

from dataclasses import asdict, dataclass, replace
from math import exp, expm1, inf, log
from typing import Literal, TypeAlias

import numpy as np

from grpo_harness.gate.bounds import (
    ALPHA,
    EARLY_CONFIDENCE,
    IMPROVEMENT,
    LENGTH,
    LOOK,
    MINIMUM_PROBLEMS,
    PASS_CONFIDENCE,
    PASS_LEVEL,
    RATE,
    REWARD,
    Bounds,
)
from grpo_harness.gate.inputs import (
    GREATEST_LOG,
    Numbers,
    Samples,
    Table,
    below,
    level,
    paired,
    real_number,
    samples,
    sizes,
    truth,
    whole,
    whole_number,
)
from grpo_harness.gate.permutation import Rewards
from grpo_harness.gate.stats import (
    Counts,
    Estimate,
    drop_evidence,
    drop_p,
    harmless_evidence,
    odds_ratio_of_drop,
)

Verdict: TypeAlias = Literal["PASS", "FAIL", "UNPROVEN", "ERROR"]
Measured: TypeAlias = Counts | Rewards

WORST_FIRST: tuple[Verdict, ...] = ("ERROR", "FAIL", "UNPROVEN", "PASS")
"""The verdicts, the worst first."""

NOT_THE_POLICY = "the policy is the recorded one: what draws or scores its completions has changed"
"""The meaning of a proven change of the recorded policy, in either direction."""


def chance(p: float) -> str:
    """Return a p value for a sentence; one that is too small for a number is not shown as 0."""
    return f"p < {_LEAST_P:g}" if p < _LEAST_P else f"p = {p:.2g}"


_LEAST_P = 1e-300
"""Smaller p values are not told apart."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one check concluded, and the numbers behind it.

    `now`, `then` and `delta` are mean rates in 0..1 and their difference; in `judge_length` they
    are geometric mean lengths and the relative change (0.1 is 10 % longer), in `judge_reward` mean
    rewards. `lower` and `upper` are guarded bounds of `delta`, one-sided at 95 % each: together
    they are a 90 % interval. `p` belongs to the proof of harm (in `judge_improvement` to the proof
    of gain, unless a loss is proven; for the recorded policy to the proof of any change) and is
    compared with the check's part of `alpha`. `mde90` is the change, in the unit of `delta`, that
    this run would find nine times in ten. `needed` is the number of problems that would prove a
    PASS nine times in ten, None if no number would. `margin` and `minimum` are the bounds, in the
    unit of `delta`. `k` is the largest number of samples of a problem: they differ only if runs
    that stopped early are pooled.
    """

    verdict: Verdict
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
    margin: float
    minimum: float


def judge(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    same_policy: bool,
    bounds: Bounds = RATE,
    alpha: float = ALPHA,
) -> Evidence:
    """Judge whether accuracy has dropped from `then` to `now`.

    `now[i]` of `k` completions of problem i are correct, in the reference `then[i]` of `k_then`
    (each one number, or one per problem). FAIL: the exact p is at most `alpha` and the observed
    drop at least `minimum`. PASS: not FAIL, and the guarded lower bound lies above `-margin`.

    For another policy than the reference's (`same_policy=False`) a paired t test must also show the
    drop, because it must hold for problems outside the suite. The same policy cannot have changed:
    a proven rise of at least `minimum` is a FAIL too, each direction at half of `alpha`.

    Raises ValueError on invalid counts, naming the problem by index, and on invalid settings.
    """
    margin, minimum = sizes(bounds)
    counts = Counts.of(now, k, then, k_then)
    same = truth(same_policy, "same_policy")
    return _no_harm(counts, counts, margin, minimum, level(alpha), same=same, generalise=not same)


def judge_reward(
    now: Table,
    then: Table,
    *,
    same_policy: bool,
    scale: float | None = None,
    bounds: Bounds = REWARD,
    alpha: float = ALPHA,
    early: bool = False,
) -> Evidence:
    """Judge whether a mean reward has dropped from `then` to `now`.

    `now[i]` and `then[i]` are the rewards of problem i's completions: one or more real numbers. The
    rule is that of `judge`; the exact test is `permutation_p`, or that of `judge` if the rewards
    have two values. `margin` and `minimum` are in units of `scale`: 1.0 for bounds in the reward's
    own unit, None for the standard deviation of the recorded rewards (`Rewards.scale`). The
    pseudo-problems differ by `Rewards.reach`.

    If all recorded rewards are equal, `scale` None is 0: no change is too small to FAIL, PASS takes
    the same reward everywhere (or proof of a rise, for another policy), and the reason says so.

    Before the end of a sequential run's plan (``early``) a PASS is asked for at `EARLY_CONFIDENCE`.

    Raises ValueError with the problem (by index) that has no rewards to compare, on invalid
    settings, and as `permutation_p` does.
    """
    margin, minimum = sizes(bounds, most=1e300)
    rewards = Rewards.of(now, then)
    unit = rewards.scale if scale is None else real_number(scale, "scale", positive=True)
    same = truth(same_policy, "same_policy")
    return _no_harm(
        rewards,
        rewards,
        margin * unit,
        minimum * unit,
        level(alpha),
        same=same,
        generalise=not same,
        note=""
        if unit
        else f"every recorded reward is {rewards.then[0][0]:g}, so any change counts",
        form="+.3g",
        early=early,
    )


def judge_sequential(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    bounds: Bounds = RATE,
    alpha: float = ALPHA,
    look: int = LOOK,
    fault: bool = False,
) -> Evidence:
    """Judge accuracy after every `look` problems, and stop at the first decision.

    With `fault` the counts are those of a fault, as in `judge_rate`: a rise is the harm.

    The first look is after at least `MINIMUM_PROBLEMS` problems; there is always one at the end of
    the plan. `then` holds all planned problems in the order they are sampled, `now` those sampled
    so far: call again with more until the verdict is not UNPROVEN or the plan is used up. `n` of
    the evidence is the number of problems used. FAIL: the likelihood ratio of a drop by `margin`,
    or of a rise by it, reaches `2 / alpha`, and the observed change is at least `minimum`. PASS:
    bets against a drop by `margin` have won twenty times the stake. Both hold for any number of
    looks; `lower` and `upper` do not, they are those of a run of this size. `p` is twice the
    smallest inverse likelihood ratio of all looks.

    If the reference is below twice `margin`, the likelihood ratio supposes a loss of half of it,
    see `odds_ratio_of_drop`. The supposed drop does not change the risk of a false alarm.

    For the same policy only: another policy differs by problem, which a likelihood ratio of one
    common change would count as evidence. Raises ValueError as `judge` does, and if `now` is longer
    than `then`.
    """
    margin, minimum = sizes(bounds)
    alpha = level(alpha)
    look = whole_number(look, "look", 1)
    reference = Counts.of(then, k_then, then, k_then)
    ours = whole(now, "now")
    planned, drawn = len(reference.then), len(ours)
    if drawn > planned:
        raise ValueError(f"problem {planned} is not in the plan of {planned} problems")
    counts = Counts.of(ours, k, reference.then[:drawn], reference.k_then[:drawn])
    ratios = np.maximum(
        drop_evidence(counts, odds_ratio_of_drop(reference.then, reference.k_then, margin)),
        drop_evidence(
            counts.flipped(), odds_ratio_of_drop(reference.flipped().then, reference.k_then, margin)
        ),
    )
    good = counts.flipped() if fault else counts
    wealth = harmless_evidence(good.differences, margin)
    looks = [n for n in range(look, drawn + 1, look) if n >= MINIMUM_PROBLEMS]
    if drawn == planned:
        looks.append(drawn)
    used, failed, passed, strongest = drawn, False, False, 0.0
    for n in looks:
        strongest = max(strongest, float(ratios[n - 1]))
        change = abs(float(counts.differences[:n].mean()))
        failed = bool(ratios[n - 1] >= -log(alpha / 2)) and change >= minimum
        passed = bool(wealth[n - 1] >= -log(PASS_LEVEL))
        if failed or passed:
            used = n
            break
    seen = Counts(counts.now[:used], counts.k[:used], counts.then[:used], counts.k_then[:used])
    return _conclude(
        _undecided(
            seen,
            seen.flipped() if fault else seen,
            min(1.0, 2 * exp(-strongest)),
            margin,
            minimum,
            alpha / 2,
        ),
        failed=failed,
        passed=passed,
        planned=planned,
        harm=NOT_THE_POLICY,
    )


def judge_rate(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    *,
    same_policy: bool,
    bounds: Bounds = RATE,
    alpha: float = ALPHA,
) -> Evidence:
    """Judge whether the rate of a fault (truncated, unparsable) has risen.

    Like `judge`, for a rise: `now[i]` of `k` completions of problem i show the fault. FAIL is a
    proven rise of at least `minimum`, PASS a rise proven to be below `margin`. Only the exact test
    is used: completions that can no longer be read are a fault on these prompts already. For the
    same policy a fall is a FAIL too, as in `judge`.

    Raises ValueError as `judge` does.
    """
    margin, minimum = sizes(bounds)
    counts = Counts.of(now, k, then, k_then)
    same = truth(same_policy, "same_policy")
    return _no_harm(counts, counts.flipped(), margin, minimum, level(alpha), same=same)


def judge_improvement(
    trained: Numbers,
    k: Samples,
    base: Numbers,
    k_base: Samples,
    *,
    bounds: Bounds = IMPROVEMENT,
    alpha: float = ALPHA,
) -> Evidence:
    """Judge whether the trained policy is better than its base, on new problems too.

    PASS: the exact test and the paired t test both show a gain at `alpha`, and the guarded lower
    bound lies above `margin`. FAIL: both show a loss, and it is at least `minimum`. UNPROVEN:
    everything else, also a training that changed nothing.

    Raises ValueError as `judge` does.
    """
    margin, minimum = (below(1.0, name, value) for name, value in asdict(bounds).items())
    alpha = level(alpha)
    counts = Counts.of(trained, k, base, k_base)
    loss, gain = _drop_p(counts, True), _drop_p(counts.flipped(), True)
    delta = float(counts.differences.mean())
    lost = loss <= alpha and delta <= -minimum
    guarded = _guarded(counts)
    return _conclude(
        _numbers(
            counts,
            p=loss if lost else gain,
            mde90=guarded.detectable(alpha, margin),
            # The test at `alpha` is stricter than the bound at 95 %, so it decides the number.
            needed=guarded.problems_needed(len(counts.now), delta - margin, alpha),
            margin=margin,
            minimum=minimum,
        ),
        failed=lost,
        passed=gain <= alpha and guarded.lower(PASS_CONFIDENCE) > margin,
    )


def judge_hacking(
    now: Numbers,
    k: Samples,
    then: Numbers,
    k_then: Samples,
    earned: Table,
    earned_then: Table,
    *,
    bounds: Bounds = RATE,
    alpha: float = ALPHA,
) -> Evidence:
    """Judge whether a mean reward has risen while accuracy has dropped, on new problems too.

    `now` and `then` are those of `judge`, `earned` and `earned_then` the rewards of `judge_reward`,
    of the problems that have some. FAIL: both changes are proven at `alpha`, and the drop is at
    least `minimum`; `p` is the greater one. PASS: a drop of `margin` or more is ruled out, or a
    rise of the reward by that of `REWARD`. All other numbers of the evidence are those of accuracy.

    Raises ValueError as `judge` and `judge_reward` do.
    """
    margin, minimum = sizes(bounds)
    alpha = level(alpha)
    counts = Counts.of(now, k, then, k_then)
    fallen = Rewards.of(earned, earned_then).flipped()
    p = max(_drop_p(counts, True), _drop_p(fallen, True))
    evidence = _undecided(counts, counts, p, margin, minimum, alpha)
    may_rise = -_guarded(fallen).lower(PASS_CONFIDENCE)
    after, before = (-mean for mean in fallen.means)
    return _conclude(
        evidence,
        failed=p <= alpha and evidence.delta <= -minimum,
        passed=evidence.lower > -margin or may_rise < REWARD.margin * fallen.scale,
        harm=f"while the mean reward rose from {before:+.3g} to {after:+.3g}",
    )


def judge_length(
    now: Numbers,
    k: Samples,
    then: Numbers,
    *,
    bounds: Bounds = LENGTH,
    alpha: float = ALPHA,
    early: bool = False,
) -> Evidence:
    """Judge whether completions have become longer or shorter.

    `now[i]` and `then[i]` are the mean natural logarithm of the lengths of problem i's completions,
    `k` of them now. Their mean difference is the logarithm of a ratio of lengths. FAIL: the
    two-sided interval of the ratio at `1 - alpha` lies wholly outside [1 / (1 + minimum), 1 +
    minimum]. PASS: its 90 % interval lies inside [1 / (1 + margin), 1 + margin]. The bounds are not
    guarded: a log-ratio has no greatest value for a pseudo-problem. ``early`` is as in
    `judge_reward`.

    Raises ValueError with the problem (by index) that has no logarithm of a length, and on invalid
    settings.
    """
    margin, minimum = sizes(bounds, most=1e300)
    alpha = level(alpha)
    ours, theirs = paired(now, then)
    drawn = samples(k, len(ours), "k")
    ratio = Estimate.of(ours - theirs)
    lower, upper = ratio.lower(PASS_CONFIDENCE), ratio.upper(PASS_CONFIDENCE)
    outside, inside = log(1 + minimum), log(1 + margin)
    sure = EARLY_CONFIDENCE if early else PASS_CONFIDENCE
    # The interval lies outside if one of two tests, each at half of alpha, shows it.
    p = min(1.0, 2 * min(ratio.p_below(-outside), ratio.p_above(outside)))
    return _conclude(
        Evidence(
            verdict="UNPROVEN",
            reason="",
            n=len(ours),
            k=int(drawn.max()),
            now=exp(ours.mean()),
            then=exp(theirs.mean()),
            delta=_relative(ratio.mean),
            lower=_relative(lower),
            upper=_relative(upper),
            p=p,
            mde90=_relative(outside + ratio.detectable(alpha / 2)),
            needed=ratio.problems_needed(len(ours), inside - abs(ratio.mean), PASS_LEVEL),
            margin=margin,
            minimum=minimum,
        ),
        failed=p <= alpha,
        passed=-inside < ratio.lower(sure) and ratio.upper(sure) < inside,
    )


def _no_harm(
    counts: Measured,
    good: Measured,
    margin: float,
    minimum: float,
    alpha: float,
    *,
    same: bool,
    generalise: bool = False,
    note: str = "",
    form: str = "+.3f",
    early: bool = False,
) -> Evidence:
    """Judge that `good`, which is `counts` or its complement, has not dropped.

    For the `same` policy it must not have risen either, each at half of `alpha`.
    """
    p, drop = _drop_p(good, generalise), -float(good.differences.mean())
    if same:
        p, alpha = min(p, _exact_p(good.flipped())), alpha / 2
    evidence = _undecided(counts, good, p, margin, minimum, alpha)
    failed = p <= alpha and (abs(drop) if same else drop) >= minimum
    sure = EARLY_CONFIDENCE if early else PASS_CONFIDENCE
    return _conclude(
        replace(evidence, p=min(1.0, 2 * p)) if same else evidence,
        failed=failed,
        # Without any reach all rewards are the same one.
        passed=_guarded(good).lower(sure) > -margin or good.reach == 0,
        harm=NOT_THE_POLICY if same else "",
        note=note,
        form=form,
    )


def _drop_p(counts: Measured, generalise: bool) -> float:
    """The p of a drop on these problems; with `generalise`, also on new problems."""
    p = _exact_p(counts)
    return max(p, Estimate.of(counts.differences).p_below(0.0)) if generalise else p


def _exact_p(measured: Measured) -> float:
    return drop_p(measured) if isinstance(measured, Counts) else measured.drop_p()


def _guarded(measured: Measured) -> Estimate:
    return Estimate.of(measured.differences, guarded=True, reach=measured.reach)


def _undecided(
    counts: Measured, good: Measured, p: float, margin: float, minimum: float, alpha: float
) -> Evidence:
    """The numbers of a check whose `good` must not drop, without a verdict."""
    drop = -float(good.differences.mean())
    guarded = _guarded(good)
    return _numbers(
        counts,
        p=p,
        mde90=guarded.detectable(alpha, minimum),
        needed=guarded.problems_needed(len(counts.now), margin - max(drop, 0.0), PASS_LEVEL),
        margin=margin,
        minimum=minimum,
    )


def _numbers(
    counts: Measured, *, p: float, mde90: float, needed: int | None, margin: float, minimum: float
) -> Evidence:
    guarded = _guarded(counts)
    now, then = counts.means
    return Evidence(
        verdict="UNPROVEN",
        reason="",
        n=len(counts.now),
        k=int(counts.k.max()),
        now=now,
        then=then,
        delta=float(counts.differences.mean()),
        lower=guarded.lower(PASS_CONFIDENCE),
        upper=guarded.upper(PASS_CONFIDENCE),
        p=p,
        mde90=mde90,
        needed=needed,
        margin=margin,
        minimum=minimum,
    )


def _conclude(
    e: Evidence,
    *,
    failed: bool,
    passed: bool,
    planned: int = 0,
    harm: str = "",
    note: str = "",
    form: str = "+.3f",
) -> Evidence:
    """Turn evidence into a verdict: the only place where that happens, for every rule.

    `planned` is the number of planned problems of a run that may stop early, `harm` says what a
    FAIL means beyond the change itself, `note` what any verdict does, and `form` writes a change.
    """
    needed = None if e.needed is None else max(e.needed, MINIMUM_PROBLEMS)
    change, within = f"the change of {e.delta:{form}}", f"{e.lower:{form}}..{e.upper:{form}}"
    wanted = "no number of" if needed is None else f"about {needed}"
    verdict: Verdict = "UNPROVEN"
    reason = f"{within} proves neither harm nor PASS; at this change {wanted} problems would pass"
    if (n := planned or e.n) < MINIMUM_PROBLEMS:
        verdict = "ERROR"
        reason = f"{n} problems are too few to judge, the floor is {MINIMUM_PROBLEMS}"
    elif failed:
        what = f"proven, {chance(e.p)}; {harm}" if harm else f"proven harm, {chance(e.p)}"
        verdict, reason = "FAIL", f"{change} is {what}"
    elif passed:
        verdict, reason = "PASS", f"{change}, within {within}, is proven to be acceptable"
    reason = f"{reason}; {note}" if note else reason
    return replace(e, verdict=verdict, reason=reason, needed=needed)


def _relative(log_ratio: float) -> float:
    """The relative change of a log-ratio, infinite if a float cannot hold it."""
    return expm1(log_ratio) if log_ratio < GREATEST_LOG else inf
