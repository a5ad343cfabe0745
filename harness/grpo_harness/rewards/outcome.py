"""The outcome of a completion: exactly one, read by the source of its problem.

Standard library only. Nothing is parsed from the prompt: a source reads its own problem.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from grpo_harness.errors import user_code
from grpo_harness.tasks.task import Problem, Reading, Source
from grpo_harness.text import escape, one_line

Outcome = Literal["correct", "wrong", "unparsable", "truncated", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "unparsable", "truncated", "error")


def outcome(
    source: Source,
    problem: Problem,
    completion: str | None,
    *,
    truncated: bool,
    reading: Reading | None = None,
) -> Outcome:
    """Return exactly one outcome for a completion. Raises what the source's ``read`` raises.

    ``None`` (the engine failed) is an error. A completion that the token limit cut off is
    truncated, whatever its text, and counts as not correct. ``reading`` is the judgement of the
    reward that decides, if one does. What nothing can judge counts as wrong.
    """
    if completion is None:
        return "error"
    if truncated:
        return "truncated"
    return reading or source.reading(problem, completion) or "wrong"


def strictly_correct(source: Source, problem: Problem, completion: str) -> bool:
    """Tell whether the completion is exactly the required answer and nothing else.

    The reward is more lenient; the difference is what its rule accepts in addition.
    """
    return completion.strip() == source.wanted(problem)


def check_answers(source: Source, problems: Iterable[Problem]) -> None:
    """Raise ``ValueError`` if a problem's true answer in the required form is not read as correct.

    With such a type the accuracy of any policy would be 0 %.
    """
    for problem in problems:
        where = f"task type {source.name!r}, problem {problem.id}"
        with user_code(_unreadable(where)):
            right = source.wanted(problem)
            found = None if right is None else source.reading(problem, right)
        if right is not None and found not in ("correct", None):
            raise ValueError(
                f"{where}: its own answer '{escape(right)}' is read as {found}, and no policy "
                "could be correct: fix canonical and read of the type"
            )


def _unreadable(where: str) -> Callable[[BaseException], ValueError]:
    return lambda error: ValueError(
        f"{where}: its own answer cannot be read ({one_line(error)}): fix canonical and read of "
        "the type"
    )
