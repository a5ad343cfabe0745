"""The table of figures that a log is judged by. A new figure is one entry.

A figure is one number of a run. Most are means over the last fifth of the steps, where a run has
arrived; what is noisy is a mean over all steps, which differs less from run to run. With it comes
its standard error, from the differences of successive steps, which a trend does not enlarge.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median_high
from typing import Literal

from grpo_harness.logs.read import Log, reward_key

FIFTH = 5
"""A run is divided into this many equal parts; the first and the last are compared."""


@dataclass(frozen=True)
class Value:
    """A figure of a run: the number, and its standard error within the run."""

    number: float
    error: float = 0.0


@dataclass(frozen=True)
class Figure:
    """One number of a run, from the logged series ``key``.

    ``part`` is the gain (the last fifth less the first), the mean of the last fifth (``end``), or
    the mean, the median or the lowest tenth (``low``) of all steps. Figures of the scale ``log``
    change by factors. Changes below ``least`` are never a fault: in the figure's own unit, or as a
    part of it on the scale ``log``. A ``share`` is from 0 to 1.
    """

    name: str
    key: str
    part: Literal["gain", "end", "mean", "median", "low"] = "end"
    scale: Literal["linear", "log"] = "linear"
    least: float = 0.01
    of_the_machine: bool = False
    share: bool = False

    def show(self, number: float) -> str:
        """Return one of its values as text."""
        if self.key == PEAK_MEMORY:
            return f"{number / 2**20:.0f} MiB"
        return f"{number:.4g}"

    def of(self, log: Log) -> Value | None:
        """Measure a run; ``None`` if it did not log this."""
        if self.key == PEAK_MEMORY:
            return None if log.peak_memory is None else Value(log.peak_memory)
        values = [value for _, value in log.series(self.key)]
        if len(values) < 2:
            return None
        if self.part == "median":
            return Value(median_high(values))
        if self.part == "low":
            return Value(sorted(values)[len(values) // 10])
        if self.part == "mean":
            return _mean(values, values)
        n = max(len(values) // FIFTH, 1)
        last = _mean(values[-n:], values)
        if self.part == "end":
            return last
        first = _mean(values[:n], values)
        return Value(last.number - first.number, math.hypot(last.error, first.error))


PEAK_MEMORY = "peak memory"
"""The key of a figure that is not logged, but measured by `grpo-harness train`."""

FIGURES = (
    Figure("gain of reward", "reward", "gain"),
    Figure("reward", "reward"),
    Figure("reward of all steps", "reward", "mean"),
    Figure("entropy", "entropy", scale="log", least=0.02),
    Figure("kl", "kl", scale="log", least=0.1),
    Figure("clipped ratio", "completions/clipped_ratio", share=True),
    Figure("groups without spread", "frac_reward_zero_std", "mean", share=True),
    Figure("length", "completions/mean_length", scale="log", least=0.02),
    Figure("gradient norm", "grad_norm", "mean", "log", 0.05),
    Figure("seconds a step", "step_time", "low", "log", 0.25, of_the_machine=True),
    Figure("peak memory", PEAK_MEMORY, "median", "log", 0.05, of_the_machine=True),
)
"""The figures of every run."""


def figures(log: Log) -> Iterator[tuple[Figure, Value]]:
    """Yield every figure that a run has, with its value; rewards by function after the total."""
    for figure in FIGURES:
        own = [figure]
        if figure.name == "reward" and len(log.rewards) > 1:
            own += [
                replace(figure, name=f"reward {name}", key=reward_key(name)) for name in log.rewards
            ]
        for each in own:
            value = each.of(log)
            if value is not None:
                yield each, value


def _mean(part: Sequence[float], whole: Sequence[float]) -> Value:
    """Return the mean of a part of a series, with its standard error."""
    steps = part if len(part) > 2 else whole
    differences = [b - a for a, b in pairwise(steps)]
    variance = fmean(d * d for d in differences) / 2
    return Value(fmean(part), math.sqrt(variance / len(part)))
