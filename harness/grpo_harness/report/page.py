"""``report.html``: everything of a report in one file that loads nothing else.

Completions are hostile text: `html.py` says what keeps them text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from grpo_harness.checks import OF_CHANGES, change, side
from grpo_harness.gate.verdicts import NOT_THE_POLICY
from grpo_harness.report import figures
from grpo_harness.report.flips import flip, share
from grpo_harness.report.history import drifts, most_telling
from grpo_harness.report.hostile import harmless
from grpo_harness.report.html import render
from grpo_harness.report.intervals import Anchors, anchor_of, forests
from grpo_harness.report.names import short_names, shortened
from grpo_harness.report.report import Report, Row
from grpo_harness.report.schema import Problem
from grpo_harness.report.sections import grouped, section
from grpo_harness.report.tables import Table
from grpo_harness.report.then import differences
from grpo_harness.text import together

_ROWS = 4
"""Rows of one rule that the first screen names."""

_BYTES = 9_000_000
"""Room for questions and completions. If they need more, the middle of long ones is left out."""


@dataclass(frozen=True)
class _Concern:
    """What to look at: the checks of one rule with one verdict, the worst rows first.

    ``more`` of them are not among the ``lines``, but in the part of the page called ``place``.
    """

    verdict: str
    title: str
    lines: Sequence[tuple[str, str]]
    more: int
    place: str
    of: int
    reason: str


def page(report: Report) -> str:
    """Return the page."""
    names = short_names([report.run["base"], *report.run["trained"], *report.policies])
    report = shortened(report, names)
    anchors = {key: f"e{number}" for number, key in enumerate(report.keys())}
    sections = [section(report, key, anchor) for key, anchor in anchors.items()]
    sizes = [len(text) for s in sections for p in s.problems for text in _texts(p)]
    # Short texts leave their room to long ones, so this is less than what fits.
    longest = None if sum(sizes) <= _BYTES else max(200, _BYTES // len(sizes))
    pairs = report.pairs()
    unchanged = [row for row in report.checks.values() if NOT_THE_POLICY in row["reason"]]
    return render(
        "page",
        report=report,
        counts=report.counts(),
        worst=report.worst(),
        concerns=list(_concerns(report, anchors)),
        tables=[
            ("Every two policies", pairs, pairs.columns if pairs else []),
            (
                "What was measured" if pairs else "Policies against their baselines",
                *_verdict_early(report.measured()),
            ),
            ("Trained against base", *_verdict_early(report.improvements())),
        ],
        names=names,
        pairs=pairs,
        then_and_now=differences(report),
        unchanged=unchanged,
        policies=together([*dict.fromkeys(row["policy"] for row in unchanged)]),
        references=together(_references(report)),
        forests=list(forests(report, anchors)),
        drifts=[harmless(line) for line in drifts(report.history)],
        history=most_telling(report.history),
        curves=[(row["training"], row["name"], _along(row)) for row in report.curves],
        sections=sections,
        outcomes=sorted({c.outcome for s in sections for p in s.problems for c in p.completions}),
        text=partial(harmless, longest=longest),
        grouped=grouped,
        flip=flip,
        share=share,
    )


def _texts(problem: Problem) -> Iterator[str]:
    yield problem.prompt
    yield problem.wanted or ""
    yield from (completion.text for completion in problem.completions)


def _verdict_early(table: Table) -> tuple[Table, list[str]]:
    """Return a table with its columns, the verdict before what a narrow screen does not show."""
    columns = [name for name in table.columns if name != "verdict"]
    place = 2 if "policy" in columns else 1
    return table, [*columns[:place], "verdict", *columns[place:]] if table else []


def _references(report: Report) -> list[str]:
    """Return whose baselines each policy was judged by."""
    found = {
        (row["policy"], row["reference"]): None
        for row in report.sorted_checks()
        if row["against"] == "baseline" and row["reference"].startswith("baseline of ")
    }
    return [f"{policy} is judged by the {reference}" for policy, reference in found]


def _concerns(report: Report, anchors: Anchors) -> Iterator[_Concern]:
    """Yield what did not pass, the worst verdict first, one entry a rule."""
    rows = [row for row in report.worst_first() if row["verdict"] != "PASS"]
    for verdict, title in dict.fromkeys((row["verdict"], row["title"]) for row in rows):
        own = [row for row in rows if (row["verdict"], row["title"]) == (verdict, title)]
        own.sort(key=_severity, reverse=True)
        shared = len({row["reason"] for row in own}) == 1
        lines = [(anchor_of(row, anchors), _line(row, shared)) for row in own[:_ROWS]]
        every = [row for row in report.checks.values() if row["title"] == title]
        numbers, reason = all(row["evidence"] for row in own), own[0]["reason"]
        yield _Concern(
            verdict, title, lines,
            more=len(own) - len(lines),
            place="Intervals" if numbers else "Table",
            of=len(every),
            reason=reason if shared else f"The first: {reason}" if own[0]["evidence"] else "",
        )  # fmt: skip


def _severity(row: Row) -> float:
    """Return by how many margins a row has changed."""
    e = row["evidence"]
    return abs(e["delta"]) / (e["margin"] or 1.0) if e and math.isfinite(e["delta"]) else math.inf


def _line(row: Row, shared: bool) -> str:
    """Return a row in a line; without numbers it has its reason, if that is not ``shared``."""
    of, e = f"{row['policy']} on {row['task_type']}", row["evidence"]
    if not e:
        return of if shared else f"{of}: {row['reason']}"
    then, now = side(e["then"], row["unit"]), side(e["now"], row["unit"])
    unit = OF_CHANGES[row["unit"]]
    return f"{of}: {then} → {now} ({change(e['delta'], row['unit'])}{unit})"


def _along(row: Row) -> Markup:
    """Draw a figure along a training."""
    now = [(x, y, y, y) for x, y in zip(row["steps"], row["now"], strict=True)]
    band = zip(row["then_steps"], row["lower"], row["mean"], row["upper"], strict=True)
    shown = [("then", [*band]), ("now", now)]
    finite = [
        (kind, [point for point in of if all(v is not None and math.isfinite(v) for v in point)])
        for kind, of in shown
    ]
    said = f"{row['name']} along the training {row['training']}"
    return figures.lines(finite, said, "step", "") if any(of for _, of in finite) else Markup()
