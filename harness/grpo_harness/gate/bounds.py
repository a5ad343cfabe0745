"""The gate's limits, and the sizes of change that each rule tolerates or acts on."""

import re
from dataclasses import dataclass
from typing import TypeAlias

ALPHA = 0.01
"""The risk that an unchanged policy turns a run red, over all checks of the run together."""

PASS_CONFIDENCE = 0.95
"""One-sided confidence of the bounds that a verdict reports and that PASS rests on."""

EARLY_CONFIDENCE = 0.99
"""The same before the end of a sequential run's plan, so that all its looks together keep 95 %."""

PASS_LEVEL = 1 - PASS_CONFIDENCE

MINIMUM_PROBLEMS = 64
"""Fewer problems than this are not judged: the bounds would not be reliable."""

MOST_SAMPLES = 500
"""Maximum of samples per problem: every probability of the exact tests then fits into a float."""

MOST_PROBLEMS = 1_000_000
"""Maximum of problems: more than anyone needs, and still computable."""

LEAST_LEVEL = 1e-300
"""The strictest level of a check: smaller p-values do not fit into a float."""

NO_ROOM = 1e-9
"""Differences of rates below this are rounding errors."""

LOOK = 16
"""Problems between two looks of a sequential run."""


Size: TypeAlias = float | str
"""A size of change: a number in the rule's own unit, ``"10%"`` of the recorded value, or
``"0.1 sd"``, of the standard deviation of the recorded rewards.
"""

LEAST_PART = 1e-3
"""The least size that a percentage can mean."""

RELATIVE = re.compile(r"([0-9]*\.?[0-9]+) ?(%|sd)")
"""The form of a size that is not a number."""


@dataclass(frozen=True)
class Bounds:
    """PASS rules out a change of ``margin`` or more; a change below ``minimum`` never fails.

    Both are in the unit of the rule: a share of completions, a relative length (0.25 is a quarter
    longer, or shorter by the same factor), or that of a reward.
    """

    margin: float
    minimum: float


@dataclass(frozen=True)
class Sizes:
    """Bounds as a rule or a project states them, which may depend on what was recorded."""

    margin: Size
    minimum: Size

    def of(self, recorded: float, sd: float = 0.0) -> Bounds:
        """Return the bounds for the recorded value and standard deviation.

        A part of nearly nothing is at least `LEAST_PART`. If either size depends on what was
        recorded, and that makes the minimum no less than the margin, it becomes a fifth of it.
        """
        margin, minimum = (_number(size, recorded, sd) for size in (self.margin, self.minimum))
        depends = isinstance(self.margin, str) or isinstance(self.minimum, str)
        return Bounds(margin, margin / 5 if depends and minimum >= margin else minimum)


def _number(size: Size, recorded: float, sd: float) -> float:
    if not isinstance(size, str):
        return size
    found = RELATIVE.fullmatch(size)
    if found is None:
        raise ValueError(f"{size!r} is no size of change, such as '10%'")
    number = float(found[1])
    return max(number / 100 * abs(recorded), LEAST_PART) if found[2] == "%" else number * sd


RATE = Bounds(margin=0.05, minimum=0.01)
"""For accuracy and the shares of truncated and unparsable completions."""

LENGTH = Bounds(margin=0.25, minimum=0.05)
"""For the geometric mean length in tokens."""

REWARD = Bounds(margin=0.1, minimum=0.02)
"""For a mean reward, in standard deviations of the recorded completions' rewards."""

LENIENT = Bounds(margin=0.1, minimum=0.05)
"""For the share of answers that are correct by the reward's lenient reading alone."""

IMPROVEMENT = Bounds(margin=0.0, minimum=0.01)
"""For a gain, which must be above 0."""
