"""The outcome of a completion: exactly one, read by the task type of its problem.

Standard library only. Nothing is parsed from the prompt: a task type reads its own task.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from grpo_harness.errors import user_code
from grpo_harness.tasks.task import Problem, Reading, TaskType
from grpo_harness.text import escape, first_line, one_line

Outcome = Literal["correct", "wrong", "unparsable", "truncated", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "unparsable", "truncated", "error")


def read(task_type: TaskType, task: Mapping[str, Any], completion: str) -> Reading:
    """Judge ``completion`` by the lenient rule of its type. Raises what its ``read`` raises."""
    return task_type.read(task, first_line(completion))


def outcome(
    task_type: TaskType, task: Mapping[str, Any], completion: str | None, *, truncated: bool
) -> Outcome:
    """Return exactly one outcome for a completion. Raises what the type's ``read`` raises.

    ``None`` (the engine failed) is an error. A completion that the token limit cut off is
    truncated, whatever its text, and counts as not correct.
    """
    if completion is None:
        return "error"
    return "truncated" if truncated else read(task_type, task, completion)


def strictly_correct(task_type: TaskType, task: Mapping[str, Any], completion: str) -> bool:
    """Tell whether the completion is exactly the required answer and nothing else.

    The reward is more lenient; the difference is what its rule accepts in addition.
    """
    return completion.strip() == task_type.canonical(task)


def check_answers(task_type: TaskType, problems: Iterable[Problem]) -> None:
    """Raise ``ValueError`` if a problem's true answer in the required form is not read as correct.

    With such a type the accuracy of any policy would be 0 %.
    """
    for problem in problems:
        where = f"task type {task_type.name!r}, problem {problem.id}"
        with user_code(_unreadable(where)):
            right = task_type.canonical(problem.task)
            found = read(task_type, problem.task, right)
        if found != "correct":
            raise ValueError(
                f"{where}: its own answer '{escape(right)}' is read as {found}, and no policy "
                "could be correct: fix canonical and read of the type"
            )


def _unreadable(where: str) -> Callable[[BaseException], ValueError]:
    return lambda error: ValueError(
        f"{where}: its own answer cannot be read ({one_line(error)}): fix canonical and read of "
        "the type"
    )
