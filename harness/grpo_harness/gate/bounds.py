"""What the gate is held to: its limits, and how large a change each rule tolerates and acts on."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = 0.01
"""The risk that an unchanged policy turns a run red, over all checks of the run together."""

PASS_CONFIDENCE = 0.95
"""One-sided confidence of the bounds that a verdict reports and that PASS rests on."""

PASS_LEVEL = 1 - PASS_CONFIDENCE

MINIMUM_PROBLEMS = 64
"""Fewer problems than this are not judged: the bounds are no longer to be trusted."""

MOST_SAMPLES = 500
"""Samples of one problem at most: none of the exact tests' probabilities is then too small for a
float.
"""

MOST_PROBLEMS = 1_000_000
"""Problems at most: more than anybody asks, and few enough to be counted with."""

LEAST_LEVEL = 1e-300
"""No check is held to a stricter level: the p-values below it run out of floats."""

NO_ROOM = 1e-9
"""Differences of rates below this are what floating point left over, not differences."""

LOOK = 16
"""Problems between two looks of a run that stops at a decision."""


@dataclass(frozen=True)
class Bounds:
    """A change of ``margin`` or more is what PASS rules out; one below ``minimum`` never fails.

    Both are in the unit of the rule: a share of completions, or a relative length (0.25 is a
    quarter longer, or shorter by the same factor).
    """

    margin: float
    minimum: float


RATE = Bounds(margin=0.05, minimum=0.01)
"""Of accuracy and of the shares of truncated and unparsable completions."""

LENGTH = Bounds(margin=0.25, minimum=0.05)
"""Of the geometric mean length in tokens."""

IMPROVEMENT = Bounds(margin=0.0, minimum=0.01)
"""Of a gain: one is asked that lies above 0."""
