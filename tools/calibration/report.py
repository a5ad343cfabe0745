"""What the calibration shows: tables with a star for a broken promise, and the plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tabulate import tabulate

from tools.calibration.gates import reference
from tools.calibration.promises import CHANCE, NEAR, PowerBound, Row

MARKERS = {"spread": "o", "concentrated": "x"}

NARROW = re.compile(r", | (?=[<>]=)|(?<=[a-z]) (?=[0-9]+ pt|policy)")
"""Where the heading of a column may be broken."""

LEGEND = """\
Percent of simulated sessions, beside what the gate promises for them. A star is a broken promise:
off by more than chance. 256 x 4 is 256 problems with 4 samples each, against a reference of 16,
and mean 0.7 is the share of correct completions before. A drop, in points (pt), is spread over all
problems, concentrated in a few, or broken: each problem is lost entirely or not at all, by chance.
Another policy is reshuffled if it is as good as the old one, on other problems. The recorded
policy cannot have risen: something else has changed."""


def table(rows: Sequence[Row], *, by_rule: bool = False) -> tuple[str, set[str]]:
    """The share of every promise's event under every rule, and the rules that break a promise.

    One line a promise, or `by_rule` one line a rule, for many rules and few promises.
    """
    chance = CHANCE / len(rows)
    rules = list(dict.fromkeys(rule for _, outcomes in rows for rule in outcomes))
    broken = set()
    cells: list[list[str]] = []
    for promise, outcomes in rows:
        line = []
        for rule in rules:
            if rule not in outcomes:
                line.append("")
                continue
            star = promise.broken(outcomes[rule], chance)
            broken |= {rule} if star else set()
            line.append(f"{100 * outcomes[rule].mean():.1f}{'*' if star else ' '}")
        cells.append(line)
    if by_rule:
        heads = [NARROW.sub("\n", f"{promise.truth}, {promise}") for promise, _ in rows]
        body = [
            [rule, *column] for rule, column in zip(rules, zip(*cells, strict=True), strict=True)
        ]
        text = tabulate(
            body, ["", *heads], colalign=["left"] + ["right"] * len(rows), disable_numparse=True
        )
    else:
        body = [
            [promise.truth, str(promise), *line]
            for (promise, _), line in zip(rows, cells, strict=True)
        ]
        align = ["left", "left"] + ["right"] * len(rules)
        text = tabulate(
            body, ["simulated", "promise", *rules], colalign=align, disable_numparse=True
        )
    return text, broken


def plot(power: Sequence[PowerBound], path: Path) -> None:
    """Draw predicted against realised power as a PNG, in percent."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="predicted power: what a run of n problems announces for a drop (%)",
        ylabel="realised power: simulated drops that FAIL (%)",
        title="Does the gate catch what it says it catches?\n"
        "(above the band: small runs catch more than they say)",
        xlim=(-2, 102),
        ylim=(-2, 102),
        box_aspect=1,
    )
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    line = np.array([0.0, 100.0])
    axes.plot(line, line, color="0.4", linewidth=1)
    axes.fill_between(line, line - 100 * NEAR, line + 100 * NEAR, color="0.85")
    sizes = sorted({bound.batch.scenario.n for bound in power})
    for i, n in enumerate(sizes):
        for pattern, marker in MARKERS.items():
            points = [
                (100 * bound.predicted, 100 * bound.sessions(reference).mean())
                for bound in power
                if (bound.batch.scenario.n, bound.batch.scenario.pattern) == (n, pattern)
            ]
            axes.plot(*zip(*points, strict=True), marker, color=f"C{i}", markersize=7, mew=1.5)
    keys = [
        Line2D([], [], color="0.4", label="realised = predicted"),
        Patch(color="0.85", label=f"within {100 * NEAR:g} points"),
        *(Patch(color=f"C{i}", label=f"n = {n}") for i, n in enumerate(sizes)),
        *(
            Line2D([], [], color="0.2", marker=marker, linestyle="", label=f"{pattern} drop")
            for pattern, marker in MARKERS.items()
        ),
    ]
    figure.legend(handles=keys, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
