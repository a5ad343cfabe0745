"""Load, call and check any reward function with TRL's calling convention.

Evaluation and training both use it: an error of a reward is one line that names the reward.
"""

import copy
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.tasks import TaskType
from grpo_harness.text import digest, escape, one_line, shown

RewardFunction = Callable[..., Sequence[float | None]]
"""Scores completions pairwise, ``(prompts, completions, **columns)``, as TRL calls it."""

GREATEST = 1e18
"""The largest reward: the square of a larger one would not fit into TRL's float32 sums."""


class RewardError(HarnessError):
    """A reward cannot be loaded or used. One line: its name, and what it did."""


def load_reward(source: str) -> RewardFunction:
    """Return the reward that ``module:function`` names. Raises ``RewardError``."""
    module, _, function = source.partition(":")
    with user_code(
        lambda error: RewardError(
            f"'{escape(source)}' is not the module:function of a reward that can be imported "
            f"({one_line(error)})"
        )
    ):
        reward = getattr(importlib.import_module(module), function)
    if not callable(reward):
        raise RewardError(f"'{escape(source)}' is {type(reward).__name__}, not a function")
    found: RewardFunction = reward
    return found


def reward_name(reward: RewardFunction) -> str:
    """Return the name by which TRL logs a reward, which may be any callable."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def score(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    where: str,
    **columns: Any,
) -> list[float | None]:
    """Return one reward per completion, in order; ``None`` is a reward that does not apply.

    The function gets copies of ``prompts`` and ``completions``, so that it cannot change the
    originals. ``columns`` are passed on as they are; ``where`` begins the message of an error.
    Raises ``RewardError`` if the function raises or exits, or returns anything but one number or
    ``None`` for each completion; infinities and NaN are not numbers.
    """
    named = f"{where}: the reward {escape(reward_name(reward))}"
    with user_code(
        lambda error: RewardError(
            f"{named} raised {one_line(error)}: fix it, or let it return None for what it "
            "cannot score"
        )
    ):
        returned: Any = reward(
            prompts=_copies(prompts), completions=_copies(completions), **columns
        )
        scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if inspect.iscoroutine(scores):
        scores.close()  # or Python would warn that it was never awaited
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"{named} returned {type(returned).__name__}: it must return a list of one number "
            "for each completion"
        )
    if len(scores) != len(completions):
        raise RewardError(
            f"{named} returned {len(scores)} numbers for {len(completions)} completions: it must "
            "return one each, in order"
        )
    checked = [_number(value) for value in scores]
    for value, number, completion in zip(scores, checked, completions, strict=True):
        if number is None and value is not None:
            raise RewardError(
                f"{named} returned {escape(shown(value), 80)} for the completion "
                f"'{escape(str(completion))}': it must return a number within ±{GREATEST:g}, or "
                "None for what it does not apply to"
            )
    return checked


def reward_digest(reward: RewardFunction, task_type: TaskType) -> str:
    """Digest what a reward does on a task type: its scores of correct and wrong completions.

    The scores are hashed, not the source: a changed comment changes nothing, and a changed rule
    does, wherever in the code it is. Raises ``RewardError``.
    """
    prompts, completions = [], []
    for problem in task_type.problems(32):
        right = task_type.canonical(problem.task)
        for text in (
            right,
            f"  {right}\n",
            f"```\n{right}\n```",
            f"```python\n{right}\n```",
            f"答案是 {right}。",
            f"{right} {right}",
            f"'{right}'",
            right.lower(),
            right[::-1],
            f"1{right}",
            "",
            "I know",
            "x" * 300,
        ):
            prompts.append(problem.prompt)
            completions.append(text)
    return digest(json.dumps(score(reward, prompts, completions, where=task_type.name)))


def _copies(texts: Sequence[Any]) -> list[Any]:
    """Copy texts, and conversations with their messages."""
    return [text if isinstance(text, str) else copy.deepcopy(text) for text in texts]


def _number(value: Any) -> float | None:
    """Return a score as a float, or ``None`` if it is not a finite number."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # a foreign type may raise anything
        return None
    return number if abs(number) <= GREATEST else None
