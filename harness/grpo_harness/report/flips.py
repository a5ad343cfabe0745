"""Flips: problems that went from mostly right to mostly wrong, or back, with both texts."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from markupsafe import Markup

from grpo_harness.report.hostile import harmless
from grpo_harness.report.schema import Problem

Flip = Literal["lost", "gained"]

_LONGEST = 1_500
"""Characters of a text that are shown beside another one."""

_QUESTION = 400
"""Characters of a question that are shown there."""

_PARTS = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Pair:
    """A flip: the end of its question, and the commonest completions of both sides.

    What differs in them is marked. ``then`` is None if no completion of the recording was kept.
    """

    problem: Problem
    flip: Flip
    question: Markup
    then: Markup | None
    now: Markup
    times: int


def flip(problem: Problem) -> Flip | None:
    """Tell whether a problem has flipped."""
    if problem.then is None:
        return None
    then, now = share(problem, then=True), share(problem)
    if then > 0.5 > now:
        return "lost"
    return "gained" if then < 0.5 < now else None


def share(problem: Problem, *, then: bool = False) -> float:
    """Return a problem's share of correct completions, now or then."""
    side = problem.then if then and problem.then else problem.now
    return side.correct / side.k


def worst_first(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems that have flipped, the largest drop first and the largest rise last."""
    flipped = [problem for problem in problems if flip(problem)]
    return sorted(flipped, key=lambda p: share(p) - share(p, then=True))


def pair(problem: Problem) -> Pair:
    """Put the commonest completion then beside the commonest now, each of the side's majority."""
    kind = flip(problem)
    assert kind is not None
    now_is_right = kind == "gained"
    texts = Counter(c.text for c in problem.completions if (c.outcome == "correct") == now_is_right)
    now, times = texts.most_common(1)[0]
    kept = [k.text for k in problem.kept if (k.outcome == "correct") != now_is_right]
    # A prompt ends with what is asked, after the system message and any examples.
    asked = problem.prompt.strip()
    left = len(asked) - _QUESTION
    question = harmless(asked if left <= 0 else f"… {asked[left:]}")
    if not kept:
        return Pair(problem, kind, question, None, harmless(now, _LONGEST), times)
    return Pair(problem, kind, question, *_marked(kept[0], now), times)


def _marked(then: str, now: str) -> tuple[Markup, Markup]:
    """Return both texts, with what only one of them has marked."""
    old_parts: list[str] = _PARTS.findall(then[:_LONGEST])
    new_parts: list[str] = _PARTS.findall(now[:_LONGEST])
    before, after = [], []
    for kind, a, b, c, d in SequenceMatcher(None, old_parts, new_parts, False).get_opcodes():
        old, new = harmless("".join(old_parts[a:b])), harmless("".join(new_parts[c:d]))
        before.append(old if kind == "equal" or not old else Markup("<del>%s</del>") % old)
        after.append(new if kind == "equal" or not new else Markup("<ins>%s</ins>") % new)
    return (
        Markup("").join([*before, _rest(then, _LONGEST)]),
        Markup("").join([*after, _rest(now, _LONGEST)]),
    )


def _rest(text: str, shown: int) -> Markup:
    left = len(text) - shown
    return Markup("<i>… %d more characters</i>") % left if left > 0 else Markup()
