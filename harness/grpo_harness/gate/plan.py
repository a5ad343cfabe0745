"""How many problems and samples find a drop: predicted from a recording, before anything is drawn.

The prediction is for the same policy, whose difference on a problem varies only by sampling. With a
variance v of one completion of the problem, that of the difference is v (1 / k + 1 / k_then).
Another policy also differs by problem, by an unknown amount.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from typing import Self

import numpy as np
from scipy.special import ndtri

from grpo_harness.gate.bounds import ALPHA, MINIMUM_PROBLEMS, MOST_PROBLEMS, RATE, Bounds
from grpo_harness.gate.inputs import Floats, Ints, Numbers, Samples, Table, level, sizes, whole
from grpo_harness.gate.permutation import Rewards
from grpo_harness.gate.stats import POWER_Z, PSEUDO_PROBLEMS, Counts

_GUARD = sum(d * d for d in PSEUDO_PROBLEMS)


@dataclass(frozen=True)
class Plan:
    """What a run can find.

    `then` is the recorded mean of its `n` problems, `mde90` the drop that `k` samples of each find
    nine times in ten, in the same unit, and `margin` the drop that is to be found. `needed` is the
    number of problems that find it, None if it is more than `MOST_PROBLEMS`.
    """

    n: int
    k: int
    then: float
    mde90: float
    margin: float
    needed: int | None

    @property
    def enough(self) -> bool:
        """Whether the margin is found nine times in ten."""
        return self.mde90 <= self.margin


@dataclass(frozen=True, eq=False)
class Noise:
    """What a recording says of its problems, in the order in which they are asked; shape (n,) each.

    `means` are the recorded means, `variances` those of one completion, `k_then` the numbers of
    recorded completions. `reach` is the greatest difference of a problem.
    """

    means: Floats
    variances: Floats
    k_then: Floats
    reach: float = 1.0

    @classmethod
    def of_counts(cls, then: Numbers, k_then: Samples) -> Self:
        """`then[i]` of `k_then` completions were correct. Raises ValueError as `judge` does.

        Rates are shrunk by half a success and half a failure for their variances; otherwise a
        problem that never failed would seem certain.
        """
        counts = Counts.of(then, k_then, then, k_then)
        rates = (counts.then + 0.5) / (counts.k_then + 1)
        return cls(counts.then / counts.k_then, rates * (1 - rates), counts.k_then.astype(float))

    @classmethod
    def of_rewards(cls, then: Table) -> Self:
        """`then[i]` are the rewards of problem i. Raises ValueError as `judge_reward` does.

        A problem with a single one has the mean variance of the others, or that of all rewards.
        """
        measured = Rewards.of(then, then)
        variances = np.array([v.var(ddof=1) if len(v) > 1 else np.nan for v in measured.then])
        known = variances[~np.isnan(variances)]
        usual = float(known.mean()) if len(known) else float(np.concatenate(measured.then).var())
        return cls(
            np.array([values.mean() for values in measured.then]),
            np.where(np.isnan(variances), usual, variances),
            measured.k.astype(float),
            measured.reach,
        )

    def __len__(self) -> int:
        return len(self.means)


@dataclass(frozen=True, eq=False)
class Planner:
    """Choose how many of the recorded problems to ask, and how many samples of each.

    `bounds` are those of the rule, or a function that returns them for a recorded mean. `alpha` is
    the check's part of the run's risk, of which each direction has half. A `sequential` run needs
    more: its likelihood ratio must reach `2 / alpha`.
    """

    noise: Noise
    bounds: Bounds | Callable[[float], Bounds] = RATE
    alpha: float = ALPHA
    sequential: bool = False

    def plan(self, k: int, n: int | None = None) -> Plan:
        """Return what the first `n` problems (default: all), `k` samples each, can find."""
        k = int(whole([k], "k", least=1)[0])
        n = len(self.noise) if n is None else n
        found, margin = self._found(np.array([n]), k), float(self._margins[n - 1])
        then = float(self.noise.means[:n].mean())
        return Plan(n, k, then, float(found[0]), margin, self._needed(k, margin))

    def cheapest(self, least: int, most: int, part: float = 1.0) -> Plan:
        """Return the plan with the fewest completions that finds `part` of the margin.

        `k` is from `least` to `most`, and `n` from `MINIMUM_PROBLEMS` to what was recorded; of
        equally many completions, those of more problems. If none finds it, the one that finds most.
        """
        floor = min(MINIMUM_PROBLEMS, len(self.noise))
        problems = np.arange(floor, len(self.noise) + 1)
        margins = self._margins[floor - 1 :] * part
        best: tuple[int, int, int] | None = None
        for k in range(least, most + 1):
            # More samples of each, of as few problems as may be, would cost as much.
            if best is not None and floor * k >= best[0]:
                break
            enough = np.flatnonzero(self._found(problems, k) <= margins)
            if len(enough):
                n = int(problems[enough[0]])
                best = min(best or (n * k, k, n), (n * k, k, n))
        return self.plan(*(best[1:] if best else (most, len(self.noise))))

    @cached_property
    def _margins(self) -> Floats:
        """The margin of each number of problems, from 1 to all that were recorded."""
        if isinstance(self.bounds, Bounds):
            return np.full(len(self.noise), sizes(self.bounds, most=1e300)[0])
        means = np.cumsum(self.noise.means) / np.arange(1, len(self.noise) + 1)
        return np.array([sizes(self.bounds(mean), most=1e300)[0] for mean in means.tolist()])

    @cached_property
    def _minimum(self) -> float:
        bounds = self.bounds
        own = bounds if isinstance(bounds, Bounds) else bounds(float(self.noise.means.mean()))
        return sizes(own, most=1e300)[1]

    def _found(self, n: Ints, k: int) -> Floats:
        """Return the drop that each of several numbers of problems finds nine times in ten."""
        noise, minimum = self.noise, self._minimum
        each = np.cumsum(noise.variances * (1 / k + 1 / noise.k_then))
        used = np.minimum(n, len(noise))
        spread = each[used - 1] * (n / used) + _GUARD * noise.reach**2
        both = n + len(PSEUDO_PROBLEMS)
        se = np.sqrt(spread / (both - 1) / both)
        return np.asarray(np.maximum(self._distance() * se, minimum) + POWER_Z * se)

    def _distance(self) -> float:
        """Return how many standard errors a drop must be observed to be proven, half of the time.

        A likelihood ratio against a drop of d standard errors grows to d²/2 in the mean, with a
        standard deviation of d.
        """
        each_side = level(self.alpha) / 2
        if self.sequential:
            return sqrt(POWER_Z**2 - 2 * log(each_side))
        return -float(ndtri(each_side))

    def _needed(self, k: int, margin: float) -> int | None:
        """Return the least number of problems that finds the margin: to 1 %, where not recorded."""
        recorded = np.arange(MINIMUM_PROBLEMS, len(self.noise) + 1)
        enough = np.flatnonzero(self._found(recorded, k) <= margin)
        if len(enough):
            return int(recorded[enough[0]])
        needed = max(MINIMUM_PROBLEMS, len(self.noise))
        while self._found(np.array([needed]), k)[0] > margin:
            needed += 1 + needed // 100
            if needed > MOST_PROBLEMS:
                return None
        return needed


def plan(
    then: Numbers, k_then: Samples, k: int, *, bounds: Bounds = RATE, alpha: float = ALPHA
) -> Plan:
    """Predict what `judge` will find on the problems of a reference, `k` samples each.

    Raises ValueError as `judge` does.
    """
    return Planner(Noise.of_counts(then, k_then), bounds, alpha).plan(k)
