"""Since when has a figure changed? A scan of its measurements, in their order, for a step.

The hypothesis is that the true value is the same at every point. For each place between two points
the likelihood-ratio statistic compares one value for all with one before and one after it; the
largest is judged. Its chance is bounded as by Worsley (Technometrics 25, 1983): the first place,
and at each other place what exceeds there and not at the one before. The bound is exact for two
points, never below the true chance, and needs no random numbers.

The noise is that of drawn completions, which is known, for one policy. Several policies differ by
more than that: their noise is estimated from the points, if it is larger, and the chance is that
of an unknown one (Student's t in place of the normal distribution), so few points prove little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
from scipy.special import ndtri, stdtrit

from grpo_harness.gate.inputs import Floats

FEWEST, FEWEST_POLICIES = 2, 4
"""Points that can prove a change: of one policy, and of several."""

_ANGLES = (np.arange(128) + 0.5) * (math.pi / 128)
"""Enough for four digits of a chance."""

_PLACE = -2 * math.log(1 - math.sqrt(0.95))
"""How far the statistic may lie below its maximum at the true place, in 95 % of all cases.

Siegmund, International Statistical Review 56 (1988): the statistic around the true place is a pair
of random walks that drift down, and each exceeds x by a chance of exp(-x / 2) at most.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement: the mean of a number of ``completions``, over a set of ``problems``.

    ``noise`` is its standard error if the same problems are asked again, and ``spread`` what the
    choice of the problems adds: all points of one set share that error.
    """

    value: float
    noise: float
    spread: float
    completions: int
    problems: str

    @classmethod
    def of(
        cls, means: Floats, variances: Floats, completions: int, reach: float, problems: str
    ) -> Self:
        """Make a point of the mean of each problem's completions, and the variance of that mean.

        The variance is NaN for a problem with one completion: its noise is then that of the
        problems. Two completions, ``reach`` off to either side, guard a variance that is zero
        because all completions are alike.
        """
        n, known = len(means), ~np.isnan(variances)
        whole = float(means.var(ddof=1)) / n if n > 1 else reach**2
        own = float(variances[known].mean()) / n if known.any() else whole
        own += 2 * (reach / completions) ** 2
        spread = math.sqrt(max(0.0, whole - own))
        return cls(float(means.mean()), math.sqrt(own), spread, completions, problems)


@dataclass(frozen=True, slots=True)
class Change:
    """A step between the points ``at - 1`` and ``at``; ``p`` is the chance of it without a change.

    The true place is in ``earliest..latest`` with 95 % confidence, and the difference of the means
    ``after`` and ``before`` in ``lower..upper`` with 90 %, if the place is right.
    """

    at: int
    earliest: int
    latest: int
    before: float
    after: float
    lower: float
    upper: float
    p: float


def share(alpha: float, series: int, runs: int) -> float:
    """Return a series' part of the risk, when it has its so-many-th run and is looked at again.

    The parts of all looks, 1 / (runs (runs - 1)) from the second on, sum up to one: ``alpha`` is
    the risk of all series together over the whole life of a history, looked at after every run.
    """
    return alpha / series / (runs * (runs - 1)) if runs > 1 else 0.0


def pooled(points: Sequence[Point]) -> Point:
    """Return measurements of the same problems as one, weighted by their completions."""
    if len(points) == 1:
        return points[0]
    weights = np.array([point.completions for point in points], dtype=np.float64)
    weights /= weights.sum()
    noise = np.array([point.noise for point in points])
    return Point(
        float(weights @ [point.value for point in points]),
        float(np.sqrt((weights**2) @ noise**2)),
        float(weights @ [point.spread for point in points]),
        sum(point.completions for point in points),
        points[0].problems,
    )


def changes(points: Sequence[Point], alpha: float, *, one_policy: bool) -> list[Change]:
    """Return every change that is proven at ``alpha``, in the order of the points.

    The points before and after a change are scanned for another one.
    """
    places: dict[int, float] = {}

    def search(start: int, end: int) -> None:
        found = likeliest(points[start:end], one_policy=one_policy)
        if found is not None and found.p <= alpha:
            places[start + found.at] = found.p
            search(start, start + found.at)
            search(start + found.at, end)

    search(0, len(points))
    ends = [0, *sorted(places), len(points)]
    # Each is described by the points between its neighbours.
    return [
        _moved(_change(points[start:end], one_policy, at - start, places[at]), start)
        for (start, at), (_, end) in pairwise(pairwise(ends))
    ]


def likeliest(points: Sequence[Point], *, one_policy: bool) -> Change | None:
    """Return the likeliest change, or ``None`` if there are too few points to prove any."""
    if len(points) < (FEWEST if one_policy else FEWEST_POLICIES):
        return None
    return _change(points, one_policy)


@dataclass(frozen=True, slots=True)
class _Scan:
    """Of each place its standardised step, its size and standard error; the sum of squares.

    ``correlation`` is that of the steps of a place and the next.
    """

    z: Floats
    size: Floats
    error: Floats
    squares: float
    correlation: Floats


def _change(
    points: Sequence[Point], one_policy: bool, place: int | None = None, p: float = 1.0
) -> Change:
    """Describe the change at a place, or else at the likeliest, whose chance is computed."""
    scan, m = _scan(points), len(points)
    i = int(np.abs(scan.z).argmax()) if place is None else place - 1
    rest, dispersion, quantile = m - 2, 1.0, -float(ndtri(0.05))
    if not one_policy and rest > 0:
        dispersion = max(1.0, (scan.squares - scan.z[i] ** 2) / rest)
        quantile = -float(stdtrit(rest, 0.05))
    statistic = scan.z**2 / dispersion
    if place is None:
        p = _chance(float(statistic[i]), scan.correlation, None if one_policy else rest)
    near = np.flatnonzero(statistic >= statistic[i] - _PLACE)
    reach = quantile * float(scan.error[i]) * math.sqrt(dispersion)
    weights = np.array([1 / point.noise**2 for point in points])
    values = np.array([point.value for point in points])
    before = float(np.average(values[: i + 1], weights=weights[: i + 1]))
    size = float(scan.size[i])
    return Change(
        at=i + 1,
        earliest=min(int(near[0]), i) + 1,
        latest=max(int(near[-1]), i) + 1,
        before=before,
        after=before + size,
        lower=size - reach,
        upper=size + reach,
        p=p,
    )


def _scan(points: Sequence[Point]) -> _Scan:
    m = len(points)
    whole = np.column_stack([[point.value for point in points], np.ones(m), np.tri(m, m - 1, -1)])
    white = np.linalg.solve(np.linalg.cholesky(_covariance(points)), whole)
    level = white[:, 1] / np.linalg.norm(white[:, 1])
    white -= np.outer(level, level @ white)  # what one value for all leaves
    y, steps = white[:, 0], white[:, 2:]
    norms = np.linalg.norm(steps, axis=0)
    steps = steps / norms
    z = steps.T @ y
    correlation = (steps[:, :-1] * steps[:, 1:]).sum(axis=0)
    return _Scan(z, z / norms, 1 / norms, float(y @ y), np.clip(correlation, -1.0, 1.0))


def _covariance(points: Sequence[Point]) -> Floats:
    """Return the covariance of the points: their own noise, and what sets of problems share.

    The noise of a single point is itself an estimate, and by chance too small where nearly all
    completions are alike: the larger of its own and that of all points is taken.
    """
    completions = np.array([point.completions for point in points], dtype=np.float64)
    noise = np.array([point.noise for point in points]) ** 2
    common = float((noise * completions**2).sum() / completions.sum())
    covariance = np.diag(np.maximum(noise, common / completions))
    sets = np.array([point.problems for point in points])
    spread = np.array([point.spread for point in points]) ** 2
    for name in np.unique(sets):
        own = sets == name
        covariance[np.ix_(own, own)] += spread[own].mean()
    return covariance


def _chance(statistic: float, correlation: Floats, rest: int | None) -> float:
    """Return the chance that the largest of all places exceeds ``statistic`` without a change.

    Any two steps are projections of one random direction: with their radius R, a step exceeds x if
    R |cos(angle)| does. For a known noise R has the chance exp(-r^2 / 2) to exceed r. For an
    unknown one with ``rest`` degrees of freedom, r is a share of the whole sum of squares.
    """
    beyond: Callable[[Floats], Floats]
    if rest is None:
        x = math.sqrt(statistic)

        def beyond(r: Floats) -> Floats:
            return np.asarray(np.exp(-(r**2) / 2))
    else:
        x = math.sqrt(statistic / (statistic + rest))

        def beyond(r: Floats) -> Floats:
            return np.asarray(np.maximum(0.0, 1 - r**2) ** ((rest - 1) / 2))

    first = np.abs(np.cos(_ANGLES))
    alone = beyond(x / first)
    second = np.abs(np.cos(_ANGLES - np.arccos(correlation)[:, None]))
    fresh = np.where(second > first, beyond(x / second) - alone, 0.0)
    return min(1.0, float(alone.mean() + fresh.mean(axis=1).sum()))


def _moved(change: Change, by: int) -> Change:
    places = {name: getattr(change, name) + by for name in ("at", "earliest", "latest")}
    return replace(change, **places)
