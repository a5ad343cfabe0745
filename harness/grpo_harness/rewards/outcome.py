"""What one completion of a problem is: exactly one outcome, read from the problem itself.

Standard library only. Nothing is parsed back out of a prompt: a task type reads its own task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from grpo_harness.tasks.task import Problem, Reading, TaskType
from grpo_harness.text import escape, first_line

Outcome = Literal["correct", "wrong", "unparsable", "truncated", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "unparsable", "truncated", "error")


def read(task_type: TaskType, task: Mapping[str, Any], completion: str) -> Reading:
    """Tell whether ``completion`` answers ``task`` by the lenient rule of its type.

    Raises what the type's ``read`` raises on a task that it cannot read.
    """
    return task_type.read(task, first_line(completion))


def outcome(
    task_type: TaskType, task: Mapping[str, Any], completion: str | None, *, truncated: bool
) -> Outcome:
    """Sort one completion into exactly one outcome. Raises what the type's ``read`` raises.

    No completion at all (``None``: the engine failed) is an error. One that the token limit
    cut off is truncated, whatever stands in it: it is an answer, and not a correct one.
    """
    if completion is None:
        return "error"
    return "truncated" if truncated else read(task_type, task, completion)


def strictly_correct(task_type: TaskType, task: Mapping[str, Any], completion: str) -> bool:
    """Tell whether the completion is the demanded answer and nothing else.

    This is the reading beside the reward's: their difference is what the rule lets through.
    """
    return completion.strip() == task_type.canonical(task)


def check_answers(task_type: TaskType, problems: Iterable[Problem]) -> None:
    """Raise ``ValueError`` where a problem's own answer, as it is demanded, is not read as correct.

    Such a type would measure 0 % of any policy.
    """
    for problem in problems:
        where = f"task type {task_type.name!r}, problem {problem.id}"
        try:
            right = task_type.canonical(problem.task)
            found = read(task_type, problem.task, right)
        except Exception as error:
            raise ValueError(
                f"{where}: its own answer cannot be read ({type(error).__name__}: "
                f"{escape(str(error))}): mend canonical and read of the type"
            ) from error
        if found != "correct":
            raise ValueError(
                f"{where}: its own answer '{escape(right)}' is read as {found}, and no policy "
                "could be correct: mend canonical and read of the type"
            )
