"""The intervals of a report: the change of every row, rule by rule, with margin and minimum."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from grpo_harness.checks import OF_CHANGES, change, side
from grpo_harness.report import figures
from grpo_harness.report.report import Report, Row
from grpo_harness.rules import RULES, Rule

_LENGTHS = (
    " These lengths are geometric means, which single long completions hardly move; elsewhere a "
    "length is the arithmetic mean."
)

Anchors = Mapping[tuple[str, str], str]
"""Where the page has an evaluation, by policy and task type."""


@dataclass(frozen=True)
class Interval:
    """A row of a rule's intervals."""

    task_type: str
    policy: str
    verdict: str
    anchor: str
    then: str
    now: str
    change: str
    detectable: str
    svg: Markup


@dataclass(frozen=True)
class Forest:
    """The intervals of one rule; ``open`` if there is something to look at.

    ``ends`` are the changes at the ends of the pictures, whose middle is 0.
    """

    title: str
    asks: str
    unit: str
    ends: tuple[str, str]
    rows: Sequence[Interval]
    open: bool


def forests(report: Report, anchors: Anchors) -> Iterator[Forest]:
    """Yield the intervals of each rule that has numbers."""
    judged = [row for row in report.sorted_checks() if row["evidence"]]
    for name in dict.fromkeys(row["rule"] for row in judged):
        own = [row for row in judged if row["rule"] == name]
        rule = _rule_of(name)
        ends = [
            abs(value)
            for row in own
            for value in (*_tolerated(row), *(row["evidence"][n] for n in ("lower", "upper")))
            if math.isfinite(value)
        ]
        reach = 1.08 * max(ends, default=1.0) or 1.0
        rows = [_interval(row, reach, anchor_of(row, anchors)) for row in own]
        yield Forest(
            title=own[0]["title"],
            asks=(rule.asks if rule else "") + (_LENGTHS if own[0]["unit"] == "tokens" else ""),
            unit=OF_CHANGES[own[0]["unit"]].strip() or "units of the reward",
            ends=(change(-reach, own[0]["unit"]), change(reach, own[0]["unit"])),
            rows=rows,
            open=name in ("accuracy", "no_loss") or any(r["verdict"] != "PASS" for r in own),
        )


def _interval(row: Row, reach: float, anchor: str) -> Interval:
    e, unit = row["evidence"], row["unit"]
    of = f"{change(e['delta'], unit)} ({change(e['lower'], unit)} to {change(e['upper'], unit)})"
    lower, delta, upper = (
        e[name] if math.isfinite(e[name]) else end
        for name, end in (("lower", -reach), ("delta", reach), ("upper", reach))
    )
    marks = tuple(_tolerated(row)), tuple(_ignored(row))
    bar = figures.Bar(lower, delta, upper, *marks, row["verdict"])
    return Interval(
        task_type=row["task_type"],
        policy=row["policy"],
        verdict=row["verdict"],
        anchor=anchor,
        then=side(e["then"], unit),
        now=side(e["now"], unit),
        change=of,
        detectable=change(e["mde90"], unit).lstrip("+"),
        svg=figures.interval(bar, reach, f"{row['verdict']}: {of}{OF_CHANGES[unit]}"),
    )


def _rule_of(name: str) -> Rule | None:
    """Return the rule of a check; that of a slice or of one reward is a part of one."""
    return RULES.get(name.partition(".")[0])


def _tolerated(row: Row) -> list[float]:
    """Return where a change is too much: the margin, on the side or sides of harm."""
    margin, rule = row["evidence"]["margin"], _rule_of(row["rule"])
    if rule is None or rule.name == "improvement":
        return [margin]
    if row["unit"] == "tokens":
        return [_shorter(margin), margin]
    rises_are_harm = rule.measure.worse(0.25, 0.75) > 0
    return [margin if rises_are_harm else -margin]


def _ignored(row: Row) -> list[float]:
    """Return between which changes a check never fails."""
    minimum = row["evidence"]["minimum"]
    return [_shorter(minimum) if row["unit"] == "tokens" else -minimum, minimum]


def _shorter(longer: float) -> float:
    """Return the relative change that undoes another one."""
    return 1 / (1 + longer) - 1


def anchor_of(row: Row, anchors: Anchors) -> str:
    """Return where the page has the evaluation of a row, or else its intervals."""
    return anchors.get((row["policy"], row["task_type"]), "intervals")
