"""An evaluation on the page: its pictures, rates and rewards, its flips, its commonest texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from grpo_harness.report import figures
from grpo_harness.report.flips import Pair, flip, pair, share, worst_first
from grpo_harness.report.passes import Rate, majority, passes
from grpo_harness.report.report import Report, Row
from grpo_harness.report.schema import Completion, Problem

_FLIPS = 12
"""Flips of an evaluation that are shown side by side; the list of completions has all."""

_PASSES = 32
"""The greatest j of pass@j that is drawn."""


_COMMON = 5
"""Texts of an evaluation that are counted on the page."""


@dataclass(frozen=True)
class Common:
    """A text that was drawn ``times`` times, for ``problems`` problems, and how often it is right.

    White space at its ends does not count.
    """

    text: str
    times: int
    share: float
    problems: int
    correct: int


@dataclass(frozen=True)
class Section:
    """An evaluation: its pictures, its flips, and every completion."""

    anchor: str
    row: Row
    verdict: str
    problems: Sequence[Problem]
    pictures: Sequence[tuple[str, Markup]]
    rewards: Sequence[tuple[str, str, str]]
    passes: Sequence[tuple[str, str, str]]
    common: Sequence[Common]
    flips: Sequence[Pair]
    lost: int
    gained: int


def section(report: Report, key: tuple[str, str], anchor: str) -> Section:
    """Return what the page shows of the evaluation ``key``: a policy, and a task type."""
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
        rates.append((f"majority@{min(s.k for s in now)}", "not kept", _rate(majority(problems))))
        if most > 1:
            curves = [("now", _curve(reached)), *([("then", _curve(before))] if before else [])]
            drawn = figures.lines(curves, f"pass@j of {name}", "j", "pass@j", low=0.0, high=1.0)
            pictures.append(("pass@j, now and then" if before else "pass@j", drawn))
    return Section(
        anchor=anchor,
        row=row,
        verdict=report.verdict(key),
        problems=problems,
        pictures=pictures,
        rewards=_rewards(problems),
        passes=rates,
        common=commonest(problems),
        flips=[pair(problem) for problem in flipped[:_FLIPS]],
        lost=kinds.count("lost"),
        gained=kinds.count("gained"),
    )


def commonest(problems: Sequence[Problem]) -> list[Common]:
    """Return the texts that were drawn most often, if any was drawn for more than one problem."""
    times: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    of: dict[str, set[str]] = {}
    for problem in problems:
        for completion in problem.completions:
            text = completion.text.strip()
            times[text] += 1
            correct[text] += completion.outcome == "correct"
            of.setdefault(text, set()).add(problem.id)
    found = [
        Common(text, number, number / times.total(), len(of[text]), correct[text])
        for text, number in times.most_common(_COMMON)
    ]
    return found if any(one.problems > 1 for one in found) else []


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


def _rate(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.lower:.1%} to {rate.upper:.1%})"


def grouped(problem: Problem) -> list[tuple[Completion, int]]:
    """Return the different completions of a problem, with how often each was drawn."""
    found: dict[str, tuple[Completion, int]] = {}
    for completion in problem.completions:
        same = repr(completion)
        found[same] = completion, found.get(same, (completion, 0))[1] + 1
    return [*found.values()]
