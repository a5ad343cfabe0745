"""Judge a run by the recorded runs of its training: does it look like one more of them?

The band of a figure is the prediction interval for one more run (Student's t, from the mean and
spread of the recorded runs). A run leaves at least one band by chance with a probability of `RISK`
at most, over all figures together. Few runs may show a spread that is too small by chance: it is at
least half the standard error that the runs have within themselves, which also has what differs from
step to step and not from run to run, such as the prompts. The judged run's own counts too: what
happens once in a few runs, such as a group without spread, may be in none of them. Nor is it less
than a fifth of the way that the figure goes in a run: some runs get there earlier, or go further,
and few recorded ones may all be of one kind. A band that is wider than the figure has moved in the
recorded runs is blind, and said to be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Literal

from scipy.special import ndtri, stdtrit
from tabulate import tabulate

from grpo_harness.gate.inputs import GREATEST_LOG
from grpo_harness.logs.figures import FIGURES, Figure, Value, figures
from grpo_harness.logs.read import Log
from grpo_harness.logs.recorded import Recorded, RecordedRun, Window, difference, summed_up
from grpo_harness.text import escape

RISK = 0.05
"""The probability that an unchanged run leaves a band, over all its figures together."""

_PACE = 0.22
"""Runs differ at least by this part of the way that a figure goes in a run (standard deviation)."""


@dataclass(frozen=True)
class Band:
    """Where the figure of one more run lies; ``mean`` is that of the recorded ones."""

    lower: float
    mean: float
    upper: float

    def possible(self, figure: Figure) -> "Band":
        """Return the part of it in which the figure can be."""
        if not figure.share:
            return self
        return replace(self, lower=max(self.lower, 0.0), upper=min(self.upper, 1.0))


@dataclass(frozen=True)
class Finding:
    """One judged figure. ``left`` is the first step at which its curve was outside, if it was.

    ``moved`` is how much the recorded curves move in all, a logarithm on the scale ``log``; 0 if
    that is not known.
    """

    figure: Figure
    value: float
    band: Band
    left: int | None = None
    moved: float = 0.0

    @property
    def least(self) -> float:
        """The least change that is found, a logarithm on the scale ``log``."""
        if self.figure.scale == "log" and self.band.lower > 0:
            return math.log(self.band.upper / self.band.mean)
        return self.band.upper - self.band.mean

    @property
    def blind(self) -> bool:
        """Tell whether the band is wider than all that the figure moves in a run."""
        wider = self.least > max(self.moved, 1.01 * self.figure.least)
        return wider and not self.figure.of_the_machine

    @property
    def outside(self) -> bool:
        """Tell whether the figure is outside its band; less time and memory is no fault."""
        below = self.value < self.band.lower and not self.figure.of_the_machine
        return below or self.value > self.band.upper

    def sees(self) -> str:
        """Return what the band would find."""
        name, least, moved = escape(self.figure.name, 60), self.least, self.moved
        change, by = f"a change of more than {least:.2g}", "by"
        if self.figure.scale == "log" and self.band.lower > 0:
            least, moved = math.exp(min(least, GREATEST_LOG)), math.exp(min(moved, GREATEST_LOG))
            change, by = f"a change by more than a factor of {least:.3g}", "by a factor of"
        return f"{name}: only {change} would be seen, and the recorded runs move {by} {moved:.2g}"

    def row(self) -> tuple[str, str, str]:
        """Return its row of the message: the figure, its value, and its band."""
        show, possible = self.figure.show, self.band.possible(self.figure)
        line = f"recorded runs {show(possible.lower)} to {show(possible.upper)}"
        if self.outside:
            where = "" if self.left is None else f", outside from step {self.left} on"
            line += f": {'above' if self.value > self.band.upper else 'below'} the band{where}"
        return f"{escape(self.figure.name, 60)}:", show(self.value), line


@dataclass(frozen=True)
class Judgement:
    """The verdict of a run. ``reason`` says why it cannot be judged, if so.

    ``left_out`` has a sentence for each figure that was not judged.
    """

    training: str
    runs: int
    findings: tuple[Finding, ...] = ()
    left_out: tuple[str, ...] = ()
    reason: str = ""

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "UNPROVEN", "ERROR"]:
        """FAIL if a figure is outside its band, ERROR if the run cannot be compared.

        UNPROVEN if the band of the gain of reward is blind: it may hold a run that learned nothing.
        """
        if self.reason:
            return "ERROR"
        if any(finding.outside for finding in self.findings):
            return "FAIL"
        gain = (f for f in self.findings if f.figure.part == "gain")
        return "UNPROVEN" if any(finding.blind for finding in gain) else "PASS"

    @property
    def blind(self) -> list[str]:
        """What the bands that are too wide would find, a sentence each."""
        return [finding.sees() for finding in self.findings if finding.blind]

    def message(self) -> str:
        """Return the result in a line for each figure, those outside first."""
        lines = [f"{self.verdict}: {escape(self.training)} against {self.runs} recorded runs"]
        if self.reason:
            return f"{lines[0]}\n  {self.reason}"
        rows = [finding.row() for finding in sorted(self.findings, key=lambda f: not f.outside)]
        table = tabulate(rows, tablefmt="plain", disable_numparse=True)
        lines += [f"  {line.rstrip()}" for line in table.splitlines()]
        lines += [f"  not judged: {why}" for why in self.left_out]
        lines += [f"  blind: {why}" for why in self.blind]
        if self.blind:
            lines.append(f"  {self.runs} recorded runs make these bands too wide: record more")
        if self.verdict == "FAIL":
            lines.append("  if it is meant: train again with other seeds, and --record the runs")
        return "\n".join(lines)


def judge(log: Log, recorded: Recorded, risk: float = RISK) -> Judgement:
    """Judge a run; ``risk`` is shared by its figures."""
    now, runs = summed_up(log), recorded.runs
    if why := _unlike(now, runs):
        return Judgement(recorded.training, len(runs), reason=f"not comparable: {why}")
    judged: list[tuple[Figure, Value, list[Value]]] = []
    left_out = []
    for figure, value in figures(log):
        then = [Value(*run.figures[figure.name]) for run in runs if figure.name in run.figures]
        if len(then) < len(runs):
            left_out.append(f"{figure.name}, which not all recorded runs have")
        elif figure.of_the_machine and {run.hardware for run in runs} != {now.hardware or ""}:
            left_out.append(f"{figure.name}, since not all runs were on hardware known as the same")
        else:
            judged.append((figure, value, then))
    if not judged:
        why = "no figure of this run is in all recorded ones: record this training anew"
        return Judgement(recorded.training, len(runs), reason=f"not comparable: {why}")
    found = []
    for figure, value, then in judged:
        log_scale = figure.scale == "log" and value.number > 0
        error = value.error / value.number if log_scale else value.error
        moved = _moved(runs, figure, log_scale)
        pace = _PACE * moved if log_scale and math.isfinite(moved) else 0.0
        limits = band(then, figure, risk / len(judged), error / 2, pace)
        finding = Finding(figure, value.number, limits, moved=moved)
        if finding.outside:
            finding = replace(finding, left=_left(now, runs, figure, risk))
        found.append(finding)
    return Judgement(recorded.training, len(runs), tuple(found), tuple(left_out))


def band(
    then: Sequence[Value], figure: Figure, risk: float, spread: float = 0.0, known: float = 0.0
) -> Band:
    """Return the prediction interval for one more run; it leaves it with the probability risk.

    The ``spread`` is another estimate of what these few show. ``known`` is the least one, which is
    no estimate: few runs do not make it less certain.
    """
    log = figure.scale == "log" and all(value.number > 0 for value in then)
    numbers = [math.log(value.number) if log else value.number for value in then]
    errors = [value.error / value.number if log else value.error for value in then]
    mean, m = fmean(numbers), len(numbers)
    within = fmean(error**2 for error in errors) / 4
    spread = math.sqrt(max(variance(numbers), within, spread**2))
    quantile = float(stdtrit(m - 1, 1 - risk / 2))
    noise = max(quantile * spread, float(ndtri(1 - risk / 2)) * known)
    half = max(noise * math.sqrt(1 + 1 / m), figure.least)
    ends = mean - half, mean, mean + half
    return Band(*(math.exp(min(end, GREATEST_LOG)) for end in ends)) if log else Band(*ends)


def bands(runs: Sequence[RecordedRun], key: str, figure: Figure, risk: float) -> list[Band]:
    """Return a band for each window of a curve, which share the risk.

    The spread is at least that of the whole curve: few runs agree in some window by chance.
    """
    curves = [[window.mean for window in run.curves[key]] for run in runs]
    columns = [*zip(*curves, strict=True)]
    common = math.sqrt(fmean(variance(column) for column in columns))
    plain = replace(figure, scale="linear")
    return [
        band([Value(number) for number in column], plain, risk / len(columns), common)
        for column in columns
    ]


def _moved(runs: Sequence[RecordedRun], figure: Figure, log_scale: bool) -> float:
    """Return how much the mean of the recorded curves moves in all."""
    curves = [[window.mean for window in run.curves.get(figure.key, [])] for run in runs]
    if len({len(curve) for curve in curves}) != 1 or not curves[0]:
        return 0.0
    means = [fmean(column) for column in zip(*curves, strict=True)]
    if log_scale:
        return math.log(max(means) / min(means)) if min(means) > 0 else math.inf
    return max(means) - min(means)


def _left(now: RecordedRun, runs: Sequence[RecordedRun], figure: Figure, risk: float) -> int | None:
    """Return the first step at which a curve is outside the band of the recorded curves."""
    curve = now.curves.get(figure.key, [])
    if any(_steps(run.curves.get(figure.key, [])) != _steps(curve) for run in runs) or not curve:
        return None
    pairs = zip(curve, bands(runs, figure.key, figure, risk), strict=True)
    outside = (w.first for w, band in pairs if not band.lower <= w.mean <= band.upper)
    return next(outside, None)


def _steps(curve: Sequence[Window]) -> list[tuple[int, int]]:
    return [(window.first, window.last) for window in curve]


def _unlike(now: RecordedRun, runs: Sequence[RecordedRun]) -> str:
    """Return why a run cannot be compared with recorded ones, or an empty text."""
    if why := difference(now, runs[0]):
        return f"recorded were {why} now. Train as recorded, or record this training anew"
    measured = {figure.name for figure in FIGURES if figure.of_the_machine}
    for name in runs[0].figures.keys() - now.figures.keys() - measured:
        return (
            f"the recorded runs logged {escape(name)}, and this one did not: log it, or record "
            "this training anew"
        )
    return ""
