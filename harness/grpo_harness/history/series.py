"""One figure of a policy on a task type over commits, and since which one it has changed."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.changepoint import Change, Point, changes, pooled, share
from grpo_harness.gate.verdicts import WORST_FIRST
from grpo_harness.history.file import History, Reference, Row, Run
from grpo_harness.history.measured import FIGURES


@dataclass(frozen=True)
class Measurement:
    """A figure in one run. ``complete`` is false if the run stopped before its plan ended.

    ``verdict`` is that of the rule that judges the figure, if it was asked, on the ``baseline``.
    """

    started: str
    commit: str | None
    fingerprint: str
    seed: int
    point: Point
    conditions: str = ""
    complete: bool = True
    verdict: str = ""
    baseline: Reference | None = None

    @property
    def name(self) -> str:
        """The commit, short; without one the time."""
        if self.commit is None:
            return self.started
        number, *more = self.commit.split("-")
        return "-".join([number[:8], *more])


@dataclass(frozen=True)
class Position:
    """One point of a series: the runs of a commit with the same policy and problems."""

    runs: Sequence[Measurement]

    @property
    def name(self) -> str:
        """The commit."""
        return self.runs[0].name

    @cached_property
    def point(self) -> Point:
        """The runs together."""
        return pooled([run.point for run in self.runs])

    @property
    def verdict(self) -> str:
        """The worst verdict of the runs, or an empty text."""
        found = {run.verdict for run in self.runs}
        return next((name for name in WORST_FIRST if name in found), "")

    @property
    def baseline(self) -> Reference | None:
        """The baseline of the last run."""
        return self.runs[-1].baseline


@dataclass(frozen=True)
class Drift:
    """A proven change, with the commits in place of numbers."""

    change: Change
    since: str
    earliest: str
    latest: str


@dataclass(frozen=True)
class Series:
    """The measurements of a figure, in their order. ``of`` series share the risk ``alpha``."""

    policy: str
    task_type: str
    figure: str
    measurements: Sequence[Measurement]
    of: int = 1
    alpha: float = ALPHA

    @cached_property
    def evidence(self) -> list[Measurement]:
        """The measurements that count: none that stopped by what it saw, or was asked otherwise.

        What is asked, and how it is sampled, is that of the last one.
        Runs with one seed draw the same completions, as far as the machine allows. Together they
        count as one run: each has its share of the completions, and its noise is that of so few.
        """
        last = self.measurements[-1].conditions
        whole = [one for one in self.measurements if one.complete and one.conditions == last]
        times = Counter(map(_draw, whole))
        return [_part(one, times[_draw(one)]) for one in whole]

    @cached_property
    def positions(self) -> list[Position]:
        """The points that are scanned. Runs of one commit are one point, however many there are.

        A run without a commit, or with changed files, is a point of its own.
        """
        found: dict[tuple[str, ...], list[Measurement]] = {}
        for one in self.evidence:
            clean = one.commit and not one.commit.endswith("-dirty")
            place = one.commit if clean and one.commit else f"{one.commit} {one.started}"
            found.setdefault((place, one.fingerprint, one.point.problems), []).append(one)
        return [Position(runs) for runs in found.values()]

    @property
    def one_policy(self) -> bool:
        """Tell whether all runs were of the same policy."""
        return len({one.fingerprint for one in self.evidence}) == 1

    @cached_property
    def drifts(self) -> list[Drift]:
        """The proven changes, in their order."""
        alpha = share(self.alpha, self.of, len(self.evidence))
        names = [position.name for position in self.positions]
        points = [position.point for position in self.positions]
        return [
            Drift(change, *(names[i] for i in (change.at, change.earliest, change.latest)))
            for change in changes(points, alpha, one_policy=self.one_policy)
        ]


def _draw(one: Measurement) -> tuple[str, int, str]:
    return one.fingerprint, one.seed, one.point.problems


def _part(one: Measurement, of: int) -> Measurement:
    if of == 1:
        return one
    noise, completions = one.point.noise * math.sqrt(of), max(1, one.point.completions // of)
    return replace(one, point=replace(one.point, noise=noise, completions=completions))


@lru_cache(maxsize=1)
def series(history: History) -> list[Series]:
    """Return every series of a history, each with its part of the risk.

    The last history's are kept: its views share what they compute.
    """
    found: dict[tuple[str, str, str], list[Measurement]] = {}
    for run in history.runs:
        for row in run.rows:
            for key, one in _measurements(run, row):
                found.setdefault(key, []).append(one)
    order = list(FIGURES)
    keys = sorted(found, key=lambda key: (key[1], key[0], order.index(key[2])))
    return [Series(*key, found[key], len(keys)) for key in keys]


def _measurements(run: Run, row: Row) -> Iterator[tuple[tuple[str, str, str], Measurement]]:
    verdicts = {(of.policy, of.task_type, of.rule): of.verdict for of in run.checks}
    for name, of in row.figures.items():
        if name in FIGURES:
            point = Point(of.value, of.noise, of.spread, of.completions, row.problems)
            own = Measurement(
                run.started, run.commit, row.fingerprint, row.seed, point, row.conditions,
                row.n == row.planned,
                verdicts.get((row.policy, row.task_type, name), ""), row.baseline,
            )  # fmt: skip
            yield (row.policy, row.task_type, name), own
