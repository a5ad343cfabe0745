"""pass@j and majority@k of an evaluation, with intervals over its problems."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np

from grpo_harness.gate.bounds import PASS_CONFIDENCE
from grpo_harness.gate.stats import Estimate
from grpo_harness.report.schema import Completion, Problem, Side


@dataclass(frozen=True)
class Rate:
    """A mean rate over problems, and its 90 % interval."""

    lower: float
    value: float
    upper: float


def passes(sides: Sequence[Side], most: int) -> list[Rate]:
    """Return pass@1 to pass@``most``: the chance that one of j completions is correct.

    The estimate is unbiased (Chen et al. 2021, arXiv 2107.03374): 1 - C(k - c, j) / C(k, j) for c
    correct completions of k. It ends at the least k, if that is less than ``most``.
    """
    most = min(most, *(side.k for side in sides))
    return [_rate(pass_at(j, side.k, side.correct) for side in sides) for j in range(1, most + 1)]


def pass_at(j: int, k: int, correct: int) -> float:
    """Return the share of the sets of ``j`` of ``k`` completions with a correct one among them."""
    return 1 - comb(k - correct, j) / comb(k, j)


def majority(problems: Sequence[Problem]) -> Rate:
    """Return how often the commonest completion of a problem is correct.

    Completions are the same if their texts are, but for white space at the ends. Those that are cut
    off, unreadable or failed have no vote. Of equally common ones each counts in part.
    """
    return _rate(_majority(problem.completions) for problem in problems)


def _majority(completions: Iterable[Completion]) -> float:
    votes: Counter[str] = Counter()
    right: dict[str, list[bool]] = defaultdict(list)
    for completion in completions:
        if completion.outcome in ("correct", "wrong"):
            text = completion.text.strip()
            votes[text] += 1
            right[text].append(completion.outcome == "correct")
    most = max(votes.values(), default=0)
    return fmean(fmean(right[text]) for text in votes if votes[text] == most) if votes else 0.0


def _rate(values: Iterable[float]) -> Rate:
    """Return the mean with its bounds, guarded by one problem fully right and one fully wrong."""
    each = np.fromiter(values, dtype=np.float64)
    guarded = Estimate.of(each - 0.5, guarded=True, reach=0.5)
    lower, upper = guarded.lower(PASS_CONFIDENCE) + 0.5, guarded.upper(PASS_CONFIDENCE) + 0.5
    value = float(each.mean())
    return Rate(max(0.0, min(lower, value)), value, min(1.0, max(upper, value)))
