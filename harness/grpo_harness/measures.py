"""What a check looks at in one problem, then and now, and the problems that got worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_harness.baselines.file import Record
from grpo_harness.evaluation import Group
from grpo_harness.rewards.rule import Outcome
from grpo_harness.text import escape

Unit = Literal["%", "tokens"]

_SHOWN = 3
"""Problems that a message shows, and completions of each."""


@dataclass(frozen=True)
class Measure:
    """What a check looks at in one problem, then and now, and how to say that it got worse."""

    then: Callable[[Record], float]
    now: Callable[[Group], float]
    worse: Callable[[float, float], float]
    label: str
    unit: Unit = "%"

    def show(self, value: float) -> str:
        """Return a value of this measure as a person reads it."""
        return f"{value:.1f}" if self.unit == "tokens" else f"{value:.0%}"


def _share(outcome: Outcome) -> Callable[[Group], float]:
    return lambda group: group.count(outcome) / len(group.completions)


ACCURACY = Measure(
    then=lambda record: record.correct / record.k,
    now=_share("correct"),
    worse=lambda then, now: then - now,
    label="correct",
)
FAULTS = {
    "truncated": Measure(
        then=lambda record: record.truncated / record.k,
        now=_share("truncated"),
        worse=lambda then, now: now - then,
        label="truncated",
    ),
    "unparsable": Measure(
        then=lambda record: record.unparsable / record.k,
        now=_share("unparsable"),
        worse=lambda then, now: now - then,
        label="unparsable",
    ),
}
LENGTH = Measure(
    then=lambda record: math.exp(record.mean_log_length),
    now=lambda group: math.exp(group.log_length),
    worse=lambda then, now: abs(math.log(now / then)),
    label="tokens",
    unit="tokens",
)


def _quoted(text: str) -> str:
    # Not as Python writes it: what is escaped would be escaped once more.
    return f"'{escape(text, 40)}'"


def worst(groups: Sequence[Group], before: Sequence[float], measure: Measure) -> tuple[str, ...]:
    """Show the problems that got worse most since ``before``, with what is answered now."""
    # A sequential run may have asked fewer problems than the reference holds.
    sides = [(then, measure.now(group)) for group, then in zip(groups, before, strict=False)]
    harm = [measure.worse(then, now) for then, now in sides]
    most = sorted(range(len(sides)), key=lambda i: -harm[i])[:_SHOWN]
    return tuple(
        f"{groups[i].problem.id}: {measure.show(sides[i][0])} -> {measure.show(sides[i][1])} "
        f"{measure.label}, wanted {_quoted(str(groups[i].problem.answer))}, now "
        + " | ".join(_quoted(completion.text) for completion in groups[i].completions[:_SHOWN])
        for i in most
        if harm[i] > 0
    )
