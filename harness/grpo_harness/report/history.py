"""Runs over time: their tables, their pictures, and since when a drift is proven."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from markupsafe import Markup

from grpo_harness.checks import OF_CHANGES, change, side
from grpo_harness.gate.verdicts import WORST_FIRST, Verdict, chance
from grpo_harness.history.file import History, Reference, Run
from grpo_harness.history.series import Drift, Position, Series, series
from grpo_harness.report.figures import Moment, timeline
from grpo_harness.report.html import render
from grpo_harness.report.tables import Table
from grpo_harness.rules import RULES
from grpo_harness.text import escape, together

_Z90 = 1.6449
"""Half the width of a 90 % interval, in standard errors."""


def drifts(history: History) -> list[str]:
    """Return a sentence for each proven drift, with its commit; the names are escaped."""
    return [_sentence(one, drift) for one in series(history) for drift in one.drifts]


def measured(history: History) -> Table:
    """Return one row per series: its first and its last value, and what is proven."""
    rows = []
    for one in series(history):
        places = one.positions
        rows.append(
            {
                "task type": one.task_type,
                "policy": one.policy,
                "figure": RULES[one.figure].title,
                "runs": _counted_runs(one),
                "commits": str(len(places)),
                "first (90 % CI)": _value(one, places[0]) if places else "",
                "last (90 % CI)": _value(one, places[-1]) if places else "",
                "verdict": places[-1].verdict if places else "",
                "drift": together([_step(one, drift) for drift in one.drifts]) or "none proven",
            }
        )
    return Table.of(rows, ("first (90 % CI)", "runs", "verdict"))


def runs(history: History) -> Table:
    """Return one row per run: its commit, its verdicts, and what was recorded before it."""
    return Table.of(
        [
            {
                "run": run.started,
                "commit": _short(run.commit),
                "seed": str(run.seed),
                "verdicts": _counted(run),
                "baselines": marks,
            }
            for run, marks in zip(history.runs, _marks(history), strict=True)
        ],
        ("seed",),
    )


def pictures(history: History) -> list[tuple[str, Markup]]:
    """Return each series over its commits as a title and a picture.

    A picture has 90 % intervals of completions drawn anew on the same problems, verdicts as
    colours, the levels between proven drifts, and upright lines: a drift, a new baseline, a moved
    anchor. Titles are plain text, and not escaped for HTML.
    """
    return [(_title(one), _picture(one)) for one in series(history) if one.positions]


def most_telling(history: History) -> list[tuple[str, Markup]]:
    """Return those of `pictures` that show an accuracy, or a proven drift."""
    return [
        (_title(one), _picture(one))
        for one in series(history)
        if one.positions and (one.figure == "accuracy" or one.drifts)
    ]


def page(history: History) -> str:
    """Return a history as one HTML file that loads nothing."""
    return render(
        "history",
        history=history,
        said=[*drifts(history), *history.damaged],
        pictures=pictures(history),
        tables=[measured(history), runs(history)],
    )


def _title(one: Series) -> str:
    return f"{RULES[one.figure].title} of {escape(one.policy)} on {escape(one.task_type)}"


def _sentence(one: Series, drift: Drift) -> str:
    found, unit = drift.change, RULES[one.figure].measure.unit
    sides = " -> ".join(side(value, unit) for value in (found.before, found.after))
    ends = (found.lower, found.upper)
    lower, upper = (change(_relative(one, drift, value), unit) for value in ends)
    place = "" if found.earliest == found.latest else _between(drift)
    return (
        f"{_title(one)}: {sides} since {escape(drift.since)}{place}; changed by "
        f"{_size(one, drift)}, 90 % interval {lower} to {upper}, {chance(found.p)}"
    )


def _between(drift: Drift) -> str:
    return f" (95 %: {escape(drift.earliest)} to {escape(drift.latest)})"


def _step(one: Series, drift: Drift) -> str:
    return f"{_size(one, drift)} since {drift.since}"


def _size(one: Series, drift: Drift) -> str:
    unit = RULES[one.figure].measure.unit
    size = drift.change.after - drift.change.before
    return f"{change(_relative(one, drift, size), unit)}{OF_CHANGES[unit]}"


def _relative(one: Series, drift: Drift, size: float) -> float:
    """Return a change as it is shown: that of a length is a share of what it was."""
    in_tokens = RULES[one.figure].measure.unit == "tokens"
    return size / drift.change.before if in_tokens else size


def _ends(one: Series, position: Position) -> tuple[float, float, float]:
    point = position.point
    lower, upper = point.value - _Z90 * point.noise, point.value + _Z90 * point.noise
    if RULES[one.figure].measure.unit == "%":
        lower, upper = max(lower, 0.0), min(upper, 1.0)
    return lower, point.value, upper


def _value(one: Series, position: Position) -> str:
    lower, value, upper = (_number(one, end) for end in _ends(one, position))
    return f"{value} ({lower} to {upper})"


def _number(one: Series, value: float) -> str:
    return side(value, RULES[one.figure].measure.unit).removesuffix(" tokens")


def _tick(one: Series, value: float) -> str:
    """Write a value in the little room beside an axis."""
    is_reward = RULES[one.figure].measure.unit == "reward"
    return f"{value:.2g}" if is_reward else _number(one, value)


def _picture(one: Series) -> Markup:
    places = one.positions
    moments = [
        Moment(*_ends(one, place), place.verdict, escape(f"{place.name}: {_value(one, place)} "
        f"{place.verdict}")) for place in places
    ]  # fmt: skip
    turns = [drift.change.at for drift in one.drifts]
    ends = [0, *turns, len(places)]
    levels = [drift.change.before for drift in one.drifts[:1]]
    levels += [drift.change.after for drift in one.drifts]
    steps = [
        (start, end - 1, level) for (start, end), level in zip(pairwise(ends), levels, strict=False)
    ]
    marks = [(at - 0.5, kind, said) for at, kind, said in _recorded(places)]
    marks += [(d.change.at - 0.5, "margin", f"proven since {escape(d.since)}") for d in one.drifts]
    names = (escape(places[0].name), escape(places[-1].name))
    return timeline(moments, steps, marks, _title(one), names, partial(_tick, one))


def _recorded(places: Sequence[Position]) -> Iterator[tuple[int, str, str]]:
    """Yield where the baseline or its anchor is another one than before."""
    for at, (old, new) in enumerate(pairwise(places), 1):
        if said := _new(old.baseline, new.baseline):
            yield at, "axis" if "anchor" in said else "zero", said


def _new(old: Reference | None, new: Reference | None) -> str:
    """Say what was recorded between two runs, or nothing."""
    if old is None or new is None:
        return ""
    if old.anchor != new.anchor:
        return "the anchor moved"
    return "the baseline was recorded anew" if old.digest != new.digest else ""


def _marks(history: History) -> Iterator[str]:
    """Yield of each run what was recorded since the ones before, of all policies and task types."""
    before: dict[tuple[str, str], Reference | None] = {}
    for run in history.runs:
        found = []
        for row in run.rows:
            key = row.policy, row.task_type
            if said := _new(before.get(key), row.baseline):
                found.append(f"{row.policy} on {row.task_type}: {said}")
            before[key] = row.baseline or before.get(key)
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        yield ", ".join(found[:2]) + more


def _counted_runs(one: Series) -> str:
    """Return how many runs count, and how many do not, and why."""
    stopped = sum(not of.complete for of in one.measurements)
    otherwise = len(one.measurements) - stopped - len(one.evidence)
    left_out = {"stopped early": stopped, "asked otherwise": otherwise}
    more = "".join(f", {number} {why}" for why, number in left_out.items() if number)
    return f"{len(one.evidence)}{more}"


def _counted(run: Run) -> str:
    counts: Counter[Verdict] = Counter(check.verdict for check in run.checks)
    return ", ".join(f"{counts[name]} {name}" for name in WORST_FIRST if counts[name])


def _short(commit: str | None) -> str:
    return commit[:8] + commit[40:] if commit else ""
