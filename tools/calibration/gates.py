"""The rules under test: the gate as it is, and mutants of it that each get one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from grpo_harness.gate.bounds import ALPHA, LOOK, PASS_CONFIDENCE
from grpo_harness.gate.stats import Counts, drop_evidence, odds_ratio_of_drop
from grpo_harness.gate.verdicts import Evidence, judge
from tools.calibration.simulation import K_THEN, MARGIN, MINIMUM, Batch, Floats, Ints, Names

Gate: TypeAlias = Callable[[Batch], Names]
Bools: TypeAlias = npt.NDArray[np.bool_]

REJUDGED = 100


def decide(failed: Bools, passed: Bools) -> Names:
    """Verdict names of mutants, which replace one part of the rule and keep the rest."""
    return np.where(failed, "FAIL", np.where(passed, "PASS", "UNPROVEN"))


def _failed(b: Batch, p: Floats, level: float = ALPHA) -> Bools:
    return np.asarray((p <= level) & (b.column("delta") <= -MINIMUM))


def _passed(b: Batch) -> Bools:
    return np.asarray(b.column("lower") > -MARGIN)


def reference(b: Batch) -> Names:
    """The gate as it is."""
    return b.names


def sequential(b: Batch) -> Names:
    """The gate that stops at the first decision."""
    return np.array([v.verdict for v in b.sequential])


def no_guard(b: Batch) -> Names:
    """PASS by a bound without the two pseudo-problems."""
    d, n = b.differences, b.scenario.n
    lower = d.mean(axis=1) - t.ppf(PASS_CONFIDENCE, n - 1) * d.std(axis=1, ddof=1) / n**0.5
    return decide(b.names == "FAIL", lower > -MARGIN)


def pass_is_not_fail(b: Batch) -> Names:
    """No third verdict: what is not FAIL is PASS."""
    return decide(b.names == "FAIL", b.names != "FAIL")


def tolerance(limit: float) -> Gate:
    """Compare the means, and allow them to differ by `limit`."""

    def gate(b: Batch) -> Names:
        failed = b.column("delta") < -limit
        return decide(failed, ~failed)

    return gate


def unpaired(b: Batch) -> Names:
    """FAIL by a z test that treats the two measurements as independent samples."""
    now, then = b.now / b.scenario.k, b.then / K_THEN
    se = np.sqrt((now.var(axis=1, ddof=1) + then.var(axis=1, ddof=1)) / b.scenario.n)
    with np.errstate(divide="ignore", invalid="ignore"):  # all are correct, then and now
        z = (now.mean(axis=1) - then.mean(axis=1)) / se
    return decide(_failed(b, norm.cdf(z)), _passed(b))


def alpha_of_five_percent(b: Batch) -> Names:
    """FAIL at alpha = 0.05, with five times the false alarms."""
    return decide(_failed(b, b.column("p"), 0.05), _passed(b))


def drops_alone(b: Batch) -> Names:
    """A recorded policy that rose passes, as another policy would."""
    rose = b.column("delta") > 0
    return np.where((b.names == "FAIL") & rose, "PASS", b.names)


def no_t_test(b: Batch) -> Names:
    """Another policy judged by the exact test alone."""
    return (
        b.names
        if b.scenario.same_policy
        else replace(b, scenario=replace(b.scenario, same_policy=True)).names
    )


def sign_flipped(b: Batch) -> Names:
    """Now and then exchanged."""
    return _rejudged(b, lambda now, then: judge(then, K_THEN, now, b.scenario.k, same_policy=True))


def failing_problems_dropped(b: Batch) -> Names:
    """Problems without a correct completion are left out."""
    k = b.scenario.k
    return _rejudged(
        b, lambda now, then: judge(now[now > 0], k, then[now > 0], K_THEN, same_policy=True)
    )


def _rejudged(b: Batch, rule: Callable[[Ints, Ints], Evidence]) -> Names:
    # These mutants are far off, and a judgement takes milliseconds: a hundred are enough.
    pairs = zip(b.now[:REJUDGED], b.then[:REJUDGED], strict=True)
    return np.array([rule(now, then).verdict for now, then in pairs])


MUTANTS: dict[str, Gate] = {
    "no variance guard": no_guard,
    "PASS = not FAIL": pass_is_not_fail,
    "tolerance .02": tolerance(0.02),
    "tolerance .05": tolerance(0.05),
    "unpaired z": unpaired,
    "sign flipped": sign_flipped,
    "alpha = .05": alpha_of_five_percent,
    "failing problems dropped": failing_problems_dropped,
    "no t test": no_t_test,
    "drops alone": drops_alone,
}


def likelihood_alone(b: Batch) -> Names:
    """Wald's test of two odds ratios: PASS also by the likelihood ratio of a common change."""

    def name(now: Ints, then: Ints) -> str:
        ratio = odds_ratio_of_drop(then, K_THEN, MARGIN)
        evidence = drop_evidence(Counts.of(now, b.scenario.k, then, K_THEN), ratio)
        for seen in evidence[LOOK - 1 :: LOOK]:
            if seen >= -log(ALPHA):
                return "FAIL"
            if seen <= log(1 - PASS_CONFIDENCE):
                return "PASS"
        return "UNPROVEN"

    return np.array([name(now, then) for now, then in zip(b.now, b.then, strict=True)])
