"""Exact tests and intervals: numbers in, numbers out.

Everything is paired by problem. The k samples of one problem share its difficulty, so they are
never counted as independent problems: either the test conditions on the problem
(`stratified_p`), or the problem's difference is the one observation (`Estimate`).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from typing import Self

import numpy as np
from scipy.special import expit, logit, logsumexp, ndtri, stdtr, stdtrit

from grpo_harness.gate.bounds import NO_ROOM
from grpo_harness.gate.inputs import Floats, Ints, Numbers, Samples, same_length, samples, whole

POWER_Z = float(ndtri(0.9))
"""Standard normal quantile of 90 % power, the only power used in this package."""

PSEUDO_PROBLEMS = (1.0, -1.0)
"""Differences added to guard a variance: one problem fully gained, one fully lost.

A saturated suite often shows no difference at all, and its sample variance of zero would mean
certainty. The two cancel in the sum, so they widen the interval and pull the mean to zero.
"""

BETS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Shares of the wealth staked on every problem; small stakes win if gains are small."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Checked counts of two measurements of the same problems.

    All arrays have shape (n,): `now` of `k` samples against `then` of `k_then`.
    """

    now: Ints
    k: Ints
    then: Ints
    k_then: Ints

    @classmethod
    def of(cls, now: Numbers, k: Samples, then: Numbers, k_then: Samples) -> Self:
        """Check and pair two sequences of counts, one entry per problem.

        `k` and `k_then` are one number for all problems or one per problem, each at most
        `MOST_SAMPLES`. Sequences, arrays, series and tensors are accepted. Raises ValueError with
        the problem (by index) if a count is not a whole number in 0..k or has no counterpart, and
        if there are no problems.
        """
        ours, theirs = whole(now, "now"), whole(then, "then")
        same_length(len(ours), len(theirs))
        counts = cls(
            ours, samples(k, len(ours), "k"), theirs, samples(k_then, len(theirs), "k_then")
        )
        for who, correct, drawn in (
            ("now", counts.now, counts.k),
            ("then", counts.then, counts.k_then),
        ):
            for i in np.flatnonzero(correct > drawn)[:1]:
                raise ValueError(
                    f"problem {i}: {who} has {correct[i]} correct, not in 0..{drawn[i]}"
                )
        return counts

    def flipped(self) -> Self:
        """The complementary counts, `k - now` and `k_then - then`: a rise becomes a drop."""
        return type(self)(self.k - self.now, self.k, self.k_then - self.then, self.k_then)

    @property
    def means(self) -> tuple[float, float]:
        """The mean rates now and then."""
        return float((self.now / self.k).mean()), float((self.then / self.k_then).mean())

    @property
    def reach(self) -> float:
        """The greatest possible difference of a problem."""
        return 1.0

    @property
    def differences(self) -> Floats:
        """Rate now minus rate then of every problem, shape (n,), each in -1..1."""
        return np.asarray(self.now / self.k - self.then / self.k_then, dtype=np.float64)


def stratified_p(now: Numbers, k: Samples, then: Numbers, k_then: Samples) -> float:
    """Exact one-sided p of a drop from `then` to `now`, stratified by problem.

    `now[i]` of `k` samples of problem i are correct now, `then[i]` of `k_then` were before. Given
    their sum m_i, and if nothing has changed, `now[i]` follows Hypergeometric(k + k_then, m_i, k)
    whatever the problem's difficulty; p is P(sum of now <= the observed sum). This is the exact
    Cochran-Mantel-Haenszel test (Agresti, Categorical Data Analysis, 2013, section 7.3.5): Fisher's
    with one stratum, McNemar's with k = k_then = 1.

    The result is in 0..1 with a relative error near 1e-13 down to the smallest floats: all terms of
    the convolution are positive, so nothing cancels. Raises ValueError as `Counts.of` does.
    """
    return drop_p(Counts.of(now, k, then, k_then))


def drop_p(counts: Counts) -> float:
    """`stratified_p` of checked counts."""
    # One whole number per stratum: numpy groups those several times faster than rows.
    width = int((counts.k + counts.k_then).max()) + 1
    strata = (counts.k * width + counts.k_then) * width + counts.now + counts.then
    keys, repeats = np.unique(strata, return_counts=True)
    kinds = np.stack([keys // width**2, keys // width % width, keys % width])
    # The least possible sum is subtracted, so that pmfs have no leading zeros. Nothing above the
    # observed sum is computed.
    least = np.maximum(0, kinds[2] - kinds[1])
    size = int(counts.now.sum() - (least * repeats).sum()) + 1
    order = count()
    heap: list[tuple[int, int, Floats]] = []
    for (k, k_then, m), times in zip(kinds.T.tolist(), repeats.tolist(), strict=True):
        total = _convolution_power(_hypergeometric(k, k_then, m), times, size)
        heap.append((len(total), next(order), total))
    # The two shortest first, so that expensive long convolutions happen least often.
    heapq.heapify(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        both = np.convolve(a, b)[:size]
        heapq.heappush(heap, (len(both), next(order), both))
    return min(1.0, float(heap[0][2].sum()))


def odds_ratio_of_drop(then: Numbers, k_then: Samples, drop: float) -> float:
    """The odds ratio, below 1, that lowers the mean rate of these problems by `drop`.

    Rates are shrunk by half a success and half a failure; otherwise a problem without a failure
    could not lose anything at any odds ratio. If `drop` is more than half of the mean rate, half of
    the rate is used: a rate below `drop` cannot drop by it, and a single correct completion would
    refute the loss of nearly everything. Raises ValueError if `drop` is not positive.
    """
    counts = Counts.of(then, k_then, then, k_then)
    rates = (counts.then + 0.5) / (counts.k_then + 1)
    if not drop > 0.0:
        raise ValueError(f"drop is {drop!r}, not above 0")
    loss = min(drop, float(rates.mean()) / 2)
    # Imported late: only a sequential run needs it, and it slows down every start.
    from scipy.optimize import brentq

    def missing(log_ratio: float) -> float:
        return loss - float((rates - expit(logit(rates) + log_ratio)).mean())

    return math.exp(brentq(missing, -50.0, 0.0))


def drop_evidence(counts: Counts, odds_ratio: float) -> Floats:
    """Log-likelihood ratio of a drop by `odds_ratio` against no change, after each problem.

    Shape (n,), by Fisher's noncentral hypergeometric distribution of every `now[i]` given its sum
    with `then[i]`. If nothing has changed, the chance that it exceeds log(1 / a) at any n is at
    most a (Ville's inequality), so it may be looked at after every problem.
    """

    @cache
    def normaliser(k: int, k_then: int, m: int) -> float:
        pmf = _hypergeometric(k, k_then, m)
        # The least power is factored out: with many samples it is too small for a float.
        rest = math.log(float(pmf @ odds_ratio ** np.arange(len(pmf))))
        return max(0, m - k_then) * math.log(odds_ratio) + rest

    strata = zip(counts.k.tolist(), counts.k_then.tolist(), counts.now + counts.then, strict=True)
    constants = np.array([normaliser(k, k_then, int(m)) for k, k_then, m in strata])
    return np.cumsum(counts.now * math.log(odds_ratio) - constants)


def harmless_evidence(differences: Floats, margin: float) -> Floats:
    """Log-wealth of bets that the mean difference lies above `-margin`, after each problem.

    Shape (n,). The wealth is the mean over the stakes of `BETS`. If the mean lies at `-margin` or
    below, the chance that the wealth exceeds 1 / a at any n is at most a (Waudby-Smith and Ramdas,
    Estimating means of bounded random variables by betting, 2024), however skewed the differences
    are.
    """
    returns = (differences + margin) / (1 - margin)
    logs = np.cumsum(np.log1p(np.multiply.outer(np.array(BETS), returns)), axis=1)
    return np.asarray(logsumexp(logs, axis=0) - math.log(len(BETS)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: reject where the result is <= alpha.

    Holm, Scandinavian Journal of Statistics 6 (1979). The smallest of m p-values is multiplied by
    m, the next by m - 1, and so on; none becomes less than the one before it. A p-value outside
    0..1 raises ValueError.
    """
    for i, p in enumerate(p_values):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p-value {i} is {p!r}, not in 0..1")
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = greatest
    return adjusted


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its standard error, in the unit of the observations.

    `df` is the degrees of freedom of Student's t. With a single observation the standard error is
    infinite.
    """

    mean: float
    se: float
    df: int

    @classmethod
    def of(cls, observations: Floats, *, guarded: bool = False, reach: float = 1.0) -> Self:
        """The mean of one observation per problem, shape (n,).

        ``guarded`` adds `PSEUDO_PROBLEMS`, times the ``reach`` of the observations to either side.
        """
        if guarded:
            observations = np.append(observations, reach * np.array(PSEUDO_PROBLEMS))
        n = len(observations)
        if n < 2:
            return cls(float(observations.mean()), math.inf, 1)
        return cls(
            float(observations.mean()), float(observations.std(ddof=1)) / math.sqrt(n), n - 1
        )

    def quantile(self, level: float) -> float:
        """Student's t that is exceeded with chance `level`, in standard errors."""
        # From the lower tail: for a tiny level, 1 - level is 1.
        return -float(stdtrit(self.df, level))

    def lower(self, confidence: float) -> float:
        """The one-sided lower bound of the mean at `confidence`."""
        return self.mean - self.quantile(1 - confidence) * self.se

    def upper(self, confidence: float) -> float:
        """The one-sided upper bound of the mean at `confidence`."""
        return self.mean + self.quantile(1 - confidence) * self.se

    def p_below(self, bound: float) -> float:
        """One-sided p of the t test that the mean lies below `bound`."""
        distance = self.mean - bound
        if self.se == 0.0:
            return 0.0 if distance < 0.0 else 1.0
        return float(stdtr(self.df, distance / self.se))

    def p_above(self, bound: float) -> float:
        """One-sided p of the t test that the mean lies above `bound`."""
        return Estimate(-self.mean, self.se, self.df).p_below(-bound)

    def detectable(self, alpha: float, at_least: float = 0.0) -> float:
        """The change that a one-sided test at `alpha` finds nine times in ten (MDE90).

        `at_least` is the smallest observed change that the rule acts on: even if the test alone
        would find less, the observed change must exceed it nine times in ten.
        """
        return max(-float(ndtri(alpha)) * self.se, at_least) + POWER_Z * self.se

    def problems_needed(self, n: int, room: float, level: float) -> int | None:
        """Problems at which a one-sided bound at `level` clears `room` nine times in ten.

        `n` is the number of problems behind this estimate and `room` the distance from the expected
        mean to the limit. None if there is no room: no number would be enough.
        """
        if room < NO_ROOM:
            return None
        ratio = (self.quantile(level) + POWER_Z) * self.se / room
        needed = n * ratio * ratio
        return math.ceil(needed) if math.isfinite(needed) else None


@lru_cache(maxsize=4096)
def _hypergeometric(k: int, k_then: int, m: int) -> Floats:
    """P(c of the m correct fall among the k of now), c from its least to its greatest value."""
    ways = math.comb(k + k_then, m)
    least, most = max(0, m - k_then), min(k, m)
    # Python's integer division is correctly rounded, so each entry is exact to the last bit.
    pmf = [math.comb(k, c) * math.comb(k_then, m - c) / ways for c in range(least, most + 1)]
    return np.asarray(pmf, dtype=np.float64)


def _convolution_power(pmf: Floats, times: int, size: int) -> Floats:
    """The pmf of the sum of `times` independent draws, its first `size` entries only."""
    square, result = pmf[:size], np.ones(1)
    while times:
        if times & 1:
            result = np.convolve(result, square)[:size]
        times >>= 1
        if times:
            square = np.convolve(square, square)[:size]
    return result
