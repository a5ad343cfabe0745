"""``report.html``: everything of a report in one file that loads nothing else.

Completions are hostile text. They are escaped once (`hostile.harmless`, or Jinja's autoescape), and
the page's Content-Security-Policy allows its own style and script alone, by their digests.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo_harness.checks import OF_CHANGES, change, side
from grpo_harness.gate.verdicts import NOT_THE_POLICY
from grpo_harness.report import figures
from grpo_harness.report.flips import Pair, flip, pair, share, worst_first
from grpo_harness.report.history import drifts, most_telling
from grpo_harness.report.hostile import harmless, line
from grpo_harness.report.passes import Rate, majority, passes
from grpo_harness.report.report import Report, Row
from grpo_harness.report.schema import Completion, Problem
from grpo_harness.report.tables import Table
from grpo_harness.rules import RULES, Rule
from grpo_harness.text import together

_FLIPS = 12
"""Flips of an evaluation that are shown side by side; the list of completions has all."""

_ROWS = 4
"""Rows of one rule that the first screen names."""

_PASSES = 32
"""The greatest j of pass@j that is drawn."""

_BYTES = 9_000_000
"""Room for questions and completions. If they need more, the middle of long ones is left out."""

_FILES = Path(__file__).parent


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


@dataclass(frozen=True)
class _Interval:
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
class _Forest:
    """The intervals of one rule; ``open`` if there is something to look at."""

    title: str
    asks: str
    unit: str
    rows: Sequence[_Interval]
    open: bool


@dataclass(frozen=True)
class _Section:
    """An evaluation: its pictures, its flips, and every completion."""

    anchor: str
    row: Row
    verdict: str
    problems: Sequence[Problem]
    pictures: Sequence[tuple[str, Markup]]
    rewards: Sequence[tuple[str, str, str]]
    passes: Sequence[tuple[str, str, str]]
    flips: Sequence[Pair]
    lost: int
    gained: int


def page(report: Report) -> str:
    """Return the page."""
    anchors = {key: f"e{number}" for number, key in enumerate(report.keys())}
    sections = [_section(report, key, anchor) for key, anchor in anchors.items()]
    sizes = [len(text) for s in sections for p in s.problems for text in _texts(p)]
    # Short texts leave their room to long ones, so this is less than what fits.
    longest = None if sum(sizes) <= _BYTES else max(200, _BYTES // len(sizes))
    files = {name: (_FILES / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    unchanged = [row for row in report.checks.values() if NOT_THE_POLICY in row["reason"]]
    made: str = _template().render(
        report=report,
        counts=report.counts(),
        worst=report.worst(),
        concerns=list(_concerns(report, anchors)),
        tables=[
            ("Policies against their baselines", *_verdict_early(report.measured())),
            ("Trained against base", *_verdict_early(report.improvements())),
        ],
        unchanged=unchanged,
        policies=together([*dict.fromkeys(row["policy"] for row in unchanged)]),
        references=together(_references(report)),
        forests=list(_forests(report, anchors)),
        drifts=[harmless(line) for line in drifts(report.history)],
        history=most_telling(report.history),
        curves=[(row["training"], row["name"], _along(row)) for row in report.curves],
        sections=sections,
        outcomes=sorted({c.outcome for s in sections for p in s.problems for c in p.completions}),
        text=partial(harmless, longest=longest),
        grouped=_grouped,
        flip=flip,
        share=share,
        css=Markup(files["css"]),  # noqa: S704 - our own files
        js=Markup(files["js"]),  # noqa: S704
        policy=_policy(files),
    )
    return made


def _texts(problem: Problem) -> Iterator[str]:
    yield problem.prompt
    yield problem.wanted or ""
    yield from (completion.text for completion in problem.completions)


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["harmless"] = harmless
    environment.filters["line"] = line
    environment.filters["value"] = _value
    return environment.get_template("page.html.jinja")


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


def _policy(files: dict[str, str]) -> str:
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in files.items()
    }
    return (
        f"default-src 'none'; style-src 'sha256-{digests['css']}'; "
        f"script-src 'sha256-{digests['js']}'; base-uri 'none'; form-action 'none'"
    )


def _anchor_of(row: Row, anchors: dict[tuple[str, str], str]) -> str:
    return anchors.get((row["policy"], row["task_type"]), "intervals")


def _concerns(report: Report, anchors: dict[tuple[str, str], str]) -> Iterator[_Concern]:
    """Yield what did not pass, the worst verdict first, one entry a rule."""
    rows = [row for row in report.worst_first() if row["verdict"] != "PASS"]
    for verdict, title in dict.fromkeys((row["verdict"], row["title"]) for row in rows):
        own = [row for row in rows if (row["verdict"], row["title"]) == (verdict, title)]
        own.sort(key=_severity, reverse=True)
        shared = len({row["reason"] for row in own}) == 1
        lines = [(_anchor_of(row, anchors), _line(row, shared)) for row in own[:_ROWS]]
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


def _forests(report: Report, anchors: dict[tuple[str, str], str]) -> Iterator[_Forest]:
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
        rows = [_interval(row, reach, _anchor_of(row, anchors)) for row in own]
        yield _Forest(
            title=own[0]["title"],
            asks=(rule.asks if rule else "")
            + (" Lengths are geometric means." if own[0]["unit"] == "tokens" else ""),
            unit=OF_CHANGES[own[0]["unit"]].strip() or "units of the reward",
            rows=rows,
            open=name in ("accuracy", "no_loss") or any(r["verdict"] != "PASS" for r in own),
        )


def _interval(row: Row, reach: float, anchor: str) -> _Interval:
    e, unit = row["evidence"], row["unit"]
    of = f"{change(e['delta'], unit)} ({change(e['lower'], unit)} to {change(e['upper'], unit)})"
    lower, delta, upper = (
        e[name] if math.isfinite(e[name]) else end
        for name, end in (("lower", -reach), ("delta", reach), ("upper", reach))
    )
    marks = tuple(_tolerated(row)), tuple(_ignored(row))
    bar = figures.Bar(lower, delta, upper, *marks, row["verdict"])
    return _Interval(
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


def _section(report: Report, key: tuple[str, str], anchor: str) -> _Section:
    row, problems = report.evaluations[key], report.problems.get(key, [])
    compared = [problem for problem in problems if problem.then]
    flipped = worst_first(problems)
    kinds = [flip(problem) for problem in flipped]
    name = f"{key[0]} on {key[1]}"
    judged = row["accuracy"] is not None
    pictures = [*_pictures(compared, name, judged)] if compared else []
    rates = []
    if problems and judged:
        now = [problem.now for problem in problems]
        then = [problem.then for problem in compared if problem.then]
        reached = passes(now, _PASSES)
        # A baseline may have fewer completions than this run.
        before = passes(then, len(reached)) if then else []
        most = len(reached)
        rates = [
            (f"pass@{j}", _rate(before[j - 1]) if j <= len(before) else "", _rate(reached[j - 1]))
            for j in sorted({1, *(2**i for i in range(6) if 2**i <= most), most})
        ]
        rates.append((f"majority@{min(s.k for s in now)}", "", _rate(majority(problems))))
        if most > 1:
            curves = [("now", _curve(reached)), *([("then", _curve(before))] if before else [])]
            drawn = figures.lines(curves, f"pass@j of {name}", "j", "pass@j", low=0.0, high=1.0)
            pictures.append(("pass@j, now and then" if before else "pass@j", drawn))
    return _Section(
        anchor=anchor,
        row=row,
        verdict=report.verdict(key),
        problems=problems,
        pictures=pictures,
        rewards=_rewards(problems),
        passes=rates,
        flips=[pair(problem) for problem in flipped[:_FLIPS]],
        lost=kinds.count("lost"),
        gained=kinds.count("gained"),
    )


def _pictures(compared: Sequence[Problem], name: str, judged: bool) -> Iterator[tuple[str, Markup]]:
    if judged:
        dots = [
            figures.Dot(
                share(problem, then=True),
                share(problem),
                flip(problem) or "",
                f"{problem.id}: {problem.then.correct}/{problem.then.k} then, "
                f"{problem.now.correct}/{problem.now.k} now",
            )
            for problem in compared
            if problem.then
        ]
        drawn = figures.scatter(dots, f"correct then and now, of each problem of {name}")
        yield "each problem, then and now", drawn
    then = [problem.then.tokens for problem in compared if problem.then]
    now = [problem.now.tokens for problem in compared]
    yield "length now (bars) and then (line)", figures.lengths(then, now, f"lengths of {name}")


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


def _curve(rates: Sequence[Rate]) -> list[tuple[float, float, float, float]]:
    return [(j, rate.lower, rate.value, rate.upper) for j, rate in enumerate(rates, 1)]


def _rewards(problems: Sequence[Problem]) -> list[tuple[str, str, str]]:
    """Return the mean of the total reward and of each function, then and now."""
    if not problems:
        return []
    rows = []
    for name in ("", *problems[0].now.rewards):
        values: list[str] = []
        for sides in ([p.then for p in problems], [p.now for p in problems]):
            each = [
                value
                for of in sides
                if of and (value := of.rewards.get(name) if name else of.reward) is not None
            ]
            values.append(f"{sum(each) / len(each):+.3f}" if each else "")
        rows.append((name or "total", values[0], values[1]))
    return rows


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rate(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.lower:.1%} to {rate.upper:.1%})"


def _grouped(problem: Problem) -> list[tuple[Completion, int]]:
    """Return the different completions of a problem, with how often each was drawn."""
    found: dict[str, tuple[Completion, int]] = {}
    for completion in problem.completions:
        same = repr(completion)
        found[same] = completion, found.get(same, (completion, 0))[1] + 1
    return [*found.values()]
