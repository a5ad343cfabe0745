"""The exact test for rewards: a real number per completion, now against then.

The samples of a problem are dealt anew, as in `stratified_p`; what is summed are real numbers. The
distribution of their sum is the inverse Fourier transform of the product of the problems'
characteristic functions. Before, every chance is weighted by exp(theta * sum) such that the
observed sum is a central one: rounding errors are then small beside the tail, however far out.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft

from grpo_harness.gate.inputs import Floats, Ints, Table, rewards, same_length
from grpo_harness.gate.stats import Counts, drop_p

POINTS = 2**13
"""Points of the sum's distribution that show whether it is as good as continuous."""

MOST_POINTS = 2**20
"""Points of the distribution if it is not and the values are rounded."""

MOST_CELLS = 2**31
"""Chances that are computed at most for the problems' distributions: some seconds."""

FAR = 16.0
"""Standard deviations of the other values' sum beyond which a value is dealt by itself."""

MOST_FAR = 8
"""Maximum of values that are dealt by themselves: each doubles the work at most."""

NEGLIGIBLE = 1e-18
"""Frequencies and tails below this are left out."""

UNHEARD = 1e-10
"""Frequencies below this are left out where the sum may be as good as continuous."""

EDGE = 16
"""Points beyond either end of the distribution, for what is added to the sums."""

COARSE = 0.01
"""Values are rounded at most by this part of how far the farthest of a hundred lies off."""

CELLS = 2**15
"""Complex numbers that are computed at once, so that they stay in a processor's cache."""

ROUNDING = 1e-14
"""Relative error of a sum of values, the greatest of which is 1."""

TOO_DIFFERENT = (
    "the rewards' sizes are too different to be tested: some are so large that the differences of "
    "all others would be lost. Limit them in the reward function"
)

ROUNDED_APART = 4
"""Standard deviations of the error of a sum of rounded values that count as no difference."""

Bools: TypeAlias = npt.NDArray[np.bool_]
Waves: TypeAlias = npt.NDArray[np.complex128]
Pool: TypeAlias = tuple[Floats, Bools, int]
"""Values of one problem, ascending; which of them were drawn; how many are to be drawn anew."""


@dataclass(frozen=True, eq=False)
class Rewards:
    """Checked rewards of two measurements of the same problems, one array per problem."""

    now: list[Floats]
    then: list[Floats]

    @classmethod
    def of(cls, now: Table, then: Table) -> Self:
        """Check and pair rewards: one sequence per problem, of 1 to `MOST_SAMPLES` numbers.

        Sequences, arrays, series and tensors are accepted. Raises ValueError with the problem (by
        index) that has no counterpart, no reward, or one that is not a real number.
        """
        sides = rewards(now, "now"), rewards(then, "then")
        same_length(*map(len, sides))
        return cls(*sides)

    def flipped(self) -> Self:
        """The negative rewards: a rise becomes a drop."""
        return type(self)([-values for values in self.now], [-values for values in self.then])

    @cached_property
    def k(self) -> Ints:
        """The number of rewards of every problem now, shape (n,)."""
        return np.array([len(values) for values in self.now])

    @cached_property
    def means(self) -> tuple[float, float]:
        """The mean over problems of their mean rewards, now and then."""
        now, then = (
            float(np.mean([values.mean() for values in side])) for side in (self.now, self.then)
        )
        return now, then

    @cached_property
    def differences(self) -> Floats:
        """Mean now minus mean then of every problem, shape (n,)."""
        # About one of the values: equal rewards then differ by 0 and not by a rounding error.
        pairs = zip(self.now, self.then, strict=True)
        return np.array([(a - b[0]).mean() - (b - b[0]).mean() for a, b in pairs])

    @cached_property
    def spread(self) -> float:
        """From the 1st to the 99th percentile of the rewards then, whatever their problem.

        Where these are equal, from the least to the greatest of all rewards, now's included: what
        is rare is not to be taken for impossible.
        """
        low, high = np.percentile(np.concatenate(self.then), [1, 99])
        return float(high - low) or float(np.ptp(np.concatenate(self.now + self.then)))

    @cached_property
    def scale(self) -> float:
        """The standard deviation of single rewards then, at most half of `spread`.

        No distribution within the spread has a greater one: few rewards far outside, as by a
        division by nearly 0, do not make every other change look small. 0 if all are equal.
        """
        then = np.concatenate(self.then)
        return min(float(then.std()), self.spread / 2) if np.ptp(then) else 0.0

    @cached_property
    def reach(self) -> float:
        """The greatest difference of a problem that is to be expected: the spread, or one seen."""
        return max(self.spread, float(np.abs(self.differences).max()))

    def drop_p(self) -> float:
        """`permutation_p` of checked rewards, or `drop_p` of counts if they have two values."""
        values = np.unique(np.concatenate(self.now + self.then))
        if len(values) != 2:
            return _dealt(self)
        now, then = (
            np.array([np.count_nonzero(rewards == values[1]) for rewards in side])
            for side in (self.now, self.then)
        )
        return drop_p(Counts(now, self.k, then, np.array([len(values) for values in self.then])))


def permutation_p(now: Table, then: Table) -> float:
    """Exact one-sided p of a drop of rewards from `then` to `now`, stratified by problem.

    `now[i]` and `then[i]` are the rewards of problem i's completions. If nothing has changed, any
    of the pooled rewards are now's with equal chance; p is P(S <= the observed S), where S is the
    sum over problems of the mean now minus the mean then. With 0 and 1 that is `stratified_p` if
    all problems have equally many samples; otherwise that one sums counts, which weighs a problem
    by its samples, and this one weighs all problems alike, as the change that is reported does.

    Where all values are multiples of a step that is not too fine, the result is exact to a relative
    error near 1e-12, ties included; a step of 0.001 of the greatest difference never is too fine.
    Other values are either as good as continuous, or they are rounded, at most to a 30,000th of the
    standard deviation of the sum, which makes sums tie that are nearly as close. Both are right to
    1 % down to p = 1e-8 and beyond, unless such small differences decide among many ties. Values
    beyond `FAR` are dealt by themselves and cost no accuracy. Nothing is random.

    Raises ValueError as `Rewards.of` does, and if rewards are of sizes too different: more than
    `MOST_FAR` values so large that the differences of all others are lost in the rounding.
    """
    return _dealt(Rewards.of(now, then))


def _dealt(measured: Rewards) -> float:
    pools: list[Pool] = []
    for now, then in zip(measured.now, measured.then, strict=True):
        # Fewer of one side mean more of the other: the smaller side is cheaper to draw.
        drawn, left = (now, then) if len(now) <= len(then) else (-then, -now)
        values = np.concatenate([drawn, left])
        order = np.argsort(values, kind="stable")
        values = (values - values[order[0]]) * (1 / len(now) + 1 / len(then))
        pools.append((values[order], order < len(drawn), len(drawn)))
    unit = max(float(values[-1]) for values, _, _ in pools) or 1.0
    pools = [(values / unit, drawn, k) for values, drawn, k in pools]
    return min(1.0, _split(pools, 0.0, _far(pools)))


def _far(pools: list[Pool]) -> list[tuple[int, int]]:
    """Problem and place of the values that outweigh all smaller ones together, if they are few.

    A problem's later places come first, so that a removal leaves the others where they are.
    """
    sizes = [len(values) for values, _, _ in pools]
    owners = np.repeat(np.arange(len(pools)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes])
    chances = np.array([k / len(values) for values, _, k in pools])[owners]
    off = np.concatenate([np.abs(values - np.median(values)) for values, _, _ in pools])
    order = np.argsort(-off, kind="stable")
    parts = (off**2 * chances * (1 - chances))[order]
    rest = np.append(np.cumsum(parts[:0:-1])[::-1], 0.0)
    beyond = np.flatnonzero((off[order] ** 2 > FAR**2 * rest) & (rest > 0))
    at = order[: max(beyond[beyond < MOST_FAR], default=-1) + 1]
    return sorted(zip(owners[at].tolist(), places[at].tolist(), strict=True), reverse=True)


def _split(pools: list[Pool], more: float, far: list[tuple[int, int]]) -> float:
    """P(the sum <= the observed one + `more`), by the cases of each of the `far` values."""
    if not far:
        return _tail(pools, more)
    (i, place), *rest = far
    values, drawn, k = pools[i]
    chance, value = k / len(values), float(values[place])

    def case(left: int, more: float) -> float:
        others = np.delete(values, place), np.delete(drawn, place), left
        return _split([*pools[:i], others, *pools[i + 1 :]], more, rest)

    if drawn[place]:
        more += value
    return (chance * case(k - 1, more - value) if k else 0.0) + (
        (1 - chance) * case(k, more) if k < len(values) else 0.0
    )


def _tail(pools: list[Pool], more: float) -> float:
    """P(the sum of all values drawn <= the observed sum + `more`)."""
    kept: list[Pool] = []
    for values, drawn, k in pools:
        # Only what differs within a problem is dealt anew.
        if 0 < k < len(values) and values[0] < values[-1]:
            more += float(values[0]) * (int(drawn.sum()) - k)
            kept.append((values - values[0], drawn, k))
        else:
            more += float(values[drawn].sum() - values[:k].sum())
    if not kept:
        return float(more >= -ROUNDING)
    urns = _Urns.of(kept)
    seen = urns.seen + more
    error = ROUNDING * (1 + urns.ends[1])
    if not urns.ends[0] - error <= seen < urns.ends[1] - error:
        return float(seen >= urns.ends[1] - error)
    tilt = urns.tilted_to(max(seen, urns.ends[0]))
    # Bernstein's inequality: farther from the mean than this lies less than NEGLIGIBLE.
    bits = -math.log(NEGLIGIBLE)
    far = bits * float(urns.values.max()) * int(urns.k.max()) / 3
    reach = far + math.sqrt(far * far + 2 * bits * float(tilt.variances.sum()))
    low, high = max(urns.ends[0], tilt.mean - reach), min(urns.ends[1], tilt.mean + reach)
    if seen >= high:
        return 1.0
    fine = _step(urns.values)
    exact = fine * (POINTS - 2 * EDGE) > high - low
    step = fine if exact else (high - low) / (POINTS - 2 * EDGE)
    points = next_fast_len(math.ceil((high - low) / step) + 2 * EDGE, real=True)
    urns, bound = urns.over(step, more, whole=exact)
    tilt = urns.tilted(tilt.theta * step)
    waves = urns.characteristic(tilt, points, bound, NEGLIGIBLE if exact else UNHEARD)
    if exact or not waves[points // 4 :].any():
        sums = np.arange(math.ceil(low / step - bound) - EDGE, 1)
        chances = irfft(waves, points)[sums % points]
        # An atom counts in full, the end of an integral by half, and between them a part.
        chances[-1] *= (1 + fine / step) / 2
    else:
        cells, width, unit = urns.cells * step, high - low, step
        if fine and width / fine <= 8 * MOST_POINTS and cells / fine <= MOST_CELLS:
            step = fine
        else:
            step = max(width / MOST_POINTS, cells / MOST_CELLS)
            off = np.concatenate([np.abs(values - np.median(values)) for values, _, _ in kept])
            if step > COARSE * np.percentile(off, 99):
                raise ValueError(TOO_DIFFERENT)
        urns, bound = urns.over(step / unit, more / unit, whole=True)
        if step != fine:
            # Sums that are equal may be rounded apart: those as near as that count as equal.
            draws = float(urns.k.sum())
            bound += math.ceil(min(draws / 2, ROUNDED_APART * math.sqrt(draws / 12)))
        tilt = urns.tilted(tilt.theta * step / unit)
        least, chances = urns.atoms(tilt)
        sums = np.arange(least, min(least + len(chances), round(bound) + 1)) - round(bound)
        chances = chances[: len(sums)]
    chances = chances * np.exp(-tilt.theta * sums)
    return math.exp(tilt.log_mean - tilt.theta * bound) * float(chances.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Tilt:
    """All draws weighted by exp(theta * sum).

    Shapes: `means` and `variances` of the problems' sums (n,); `taken` (m, k, n), the chance that
    the last of c + 1 values drawn from the first j + 1 is number j. `log_mean` is the logarithm of
    the mean weight of all draws.
    """

    theta: float
    log_mean: float
    means: Floats
    variances: Floats
    taken: Floats

    @property
    def mean(self) -> float:
        return float(self.means.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Urns:
    """Values of all problems, ascending from 0, shape (n, m); `k` of the first `size` are drawn.

    `drawn`, shape (n, m), are those that were drawn, `ends` the least and the greatest sum.
    """

    values: Floats
    drawn: Bools
    size: Ints
    k: Ints
    ends: tuple[float, float]

    @classmethod
    def of(cls, pools: list[Pool]) -> Self:
        size = np.array([len(values) for values, _, _ in pools])
        padded = np.zeros((len(pools), size.max()))
        mask = np.zeros(padded.shape, dtype=np.bool_)
        for i, (values, drawn, _) in enumerate(pools):
            padded[i, : size[i]], mask[i, : size[i]] = values, drawn
        least = sum(float(values[:k].sum()) for values, _, k in pools)
        greatest = sum(float(values[-k:].sum()) for values, _, k in pools)
        return cls(padded, mask, size, np.array([k for _, _, k in pools]), (least, greatest))

    @property
    def seen(self) -> float:
        return float(self.values[self.drawn].sum())

    @property
    def cells(self) -> float:
        """The chances that `atoms` computes for values in steps of 1."""
        return float((self.size * self.k**2 * self.values.max(axis=1)).sum()) / 2

    def over(self, step: float, more: float, *, whole: bool) -> tuple[Self, float]:
        """The values in steps, rounded if `whole`, and the greatest sum up to `seen` + `more`."""
        values = self.values / step
        scaled = replace(self, values=np.rint(values) if whole else values)
        more = math.floor(more / step + 1e-3) if whole else more / step
        return scaled, scaled.seen + more

    def tilted(self, theta: float) -> _Tilt:
        n, m = self.values.shape
        drawn = np.arange(1, int(self.k.max()) + 1)[:, None]
        # By number of values drawn: the logarithm of the mean weight, and the sum's mean, variance.
        logs = np.full((len(drawn) + 1, n), -np.inf)
        logs[0] = 0.0
        means, variances = np.zeros_like(logs), np.zeros_like(logs)
        taken = np.zeros((m, len(drawn), n))
        with np.errstate(divide="ignore", invalid="ignore"):
            for j, values in enumerate(self.values.T):
                share = np.where(j < self.size, np.minimum(1.0, drawn / (j + 1)), 0.0)
                take = np.log(share) + theta * values + logs[:-1]
                both = np.logaddexp(np.log1p(-share) + logs[1:], take)
                q = taken[j] = np.where(both > -np.inf, np.exp(take - both), 0.0)
                apart = means[:-1] + values - means[1:]
                variances[1:] += q * (variances[:-1] - variances[1:] + (1 - q) * apart**2)
                means[1:] += q * apart
                logs[1:] = both
        own = self.k, np.arange(n)
        return _Tilt(theta, float(logs[own].sum()), means[own], variances[own], taken)

    def tilted_to(self, seen: float) -> _Tilt:
        """The least tilt downwards at which `seen` is within half a standard deviation."""
        low, high, theta = -math.inf, 0.0, 0.0
        while True:
            tilt = self.tilted(theta)
            off, variance = tilt.mean - seen, float(tilt.variances.sum())
            if abs(off) <= math.sqrt(variance) / 2 or (off < 0 and theta == 0):
                return tilt
            low, high = (low, theta) if off > 0 else (theta, high)
            theta = theta - off / variance if variance else -math.inf
            if not low < theta < high:
                theta = (low + high) / 2 if low > -math.inf else 2 * high

    def characteristic(self, tilt: _Tilt, points: int, at: float, least: float) -> Waves:
        """The sum's characteristic function, shape (points // 2 + 1,), conjugate and about `at`.

        Problems that vary most come first: most frequencies are negligible after a few of them.
        """
        found = np.zeros(points // 2 + 1, dtype=np.complex128)
        active = np.arange(len(found))
        product = np.exp(2j * np.pi / points * ((active * at) % points))
        order, width = np.argsort(-tilt.variances, kind="stable"), 1
        while len(order) and len(active):
            batch, order = order[:width], order[width:]
            chunk = max(1, CELLS // (width * (tilt.taken.shape[1] + 1)))
            for i in range(0, len(active), chunk):
                angles = np.multiply(active[i : i + chunk], -2 * np.pi / points)
                product[i : i + chunk] *= self._waves(batch, tilt.taken[:, :, batch], angles)
            heard = np.abs(product) > least
            active, product, width = active[heard], product[heard], 2 * width
        found[active] = product
        return found

    def _waves(self, batch: Ints, taken: Floats, angles: Floats) -> Waves:
        waves = np.zeros((taken.shape[1] + 1, len(batch), len(angles)), dtype=np.complex128)
        waves[0] = 1.0
        for j, q in enumerate(taken[..., None]):
            turned = waves[:-1] * np.exp(1j * np.multiply.outer(self.values[batch, j], angles))
            turned -= waves[1:]
            turned *= q
            waves[1:] += turned
        return np.asarray(waves[self.k[batch], np.arange(len(batch))].prod(axis=0))

    def atoms(self, tilt: _Tilt) -> tuple[int, Floats]:
        """The least sum of whole values, and the chances of it and of those that follow."""
        parts = []
        for i, (row, size, k) in enumerate(
            zip(self.values.astype(np.int64), self.size, self.k, strict=True)
        ):
            sums = np.zeros((k + 1, k * row[size - 1] + 1))
            sums[0, 0] = 1.0
            for value, q in zip(row[:size].tolist(), tilt.taken[:, :k, i, None], strict=False):
                # In ascending order: no sum of k values so far is greater than k times this one.
                end = k * value + 1
                taken = q * sums[:-1, : end - value]
                sums[1:, :end] *= 1 - q
                sums[1:, value:end] += taken
            parts.append(_trimmed(0, sums[k]))
        while len(parts) > 1:
            parts.sort(key=lambda part: len(part[1]))
            pairs = list(zip(parts[::2], parts[1::2], strict=False))
            rest = parts[len(pairs) * 2 :]
            parts = [_trimmed(a + b, _convolved(x, y)) for (a, x), (b, y) in pairs] + rest
        return parts[0]


def _convolved(a: Floats, b: Floats) -> Floats:
    size = len(a) + len(b) - 1
    points = next_fast_len(size, real=True)
    both = irfft(rfft(a, points) * rfft(b, points), points)[:size]
    return np.asarray(np.maximum(both, 0.0))


def _trimmed(least: int, chances: Floats) -> tuple[int, Floats]:
    """The chances without negligible ends."""
    kept = np.flatnonzero(chances > 1e-14 * chances.max())
    return least + int(kept[0]), chances[kept[0] : kept[-1] + 1]


def _step(values: Floats) -> float:
    """The greatest step of which all values are whole multiples, 0.0 if it is too fine to use."""
    distances = np.unique(values)[::-1]
    step = most = float(distances[0])
    for distance in distances[:-1].tolist():
        while distance > 1e-9 * most:
            step, distance = distance, abs(step - distance * round(step / distance))
        if step * MOST_POINTS < most:
            return 0.0
        # It divides the greatest distance: without this, rounding errors grow from one to the next.
        step = most / round(most / step)
    times = np.round(distances / step)
    step = float(distances @ times / (times @ times))
    return step if np.abs(distances / step - times).max() < 1e-6 else 0.0
