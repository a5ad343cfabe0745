"""The rule reward: prompt and completion in, number out. Standard library only.

The prompt contains the task (``TASK={…}``), so the reward needs neither the problem nor the state
of its task type, and TRL's ``GRPOTrainer`` can call it directly. No text is ever run as code.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_harness.tasks import Reading, TaskType, task_types

LENGTH_PENALTY = 0.002
"""Reward lost per character of a completion."""

LONGEST_PENALISED = 200
"""Characters beyond this number cost nothing."""

Conversation = list[dict[str, Any]]
"""Messages with ``role`` and ``content``, as TRL passes them for conversational data sets."""


def rule_reward(prompt: str | None, completion: str | None, task: Any = None) -> float:
    """Score one completion: +1 if correct, else -1, minus 0.002 per character up to 200.

    The length is that of the whole completion, in characters. Without a ``task`` the prompt tells
    it; one without a readable ``TASK={…}`` scores as incorrect. ``None`` is the empty text. Never
    raises for any two texts.
    """
    prompt, completion = prompt or "", completion or ""
    score = 1.0 if read(prompt, completion, task) == "correct" else -1.0
    return score - LENGTH_PENALTY * min(len(completion), LONGEST_PENALISED)


def reward_func(
    prompts: Sequence[str | Conversation | None],
    completions: Sequence[str | Conversation | None],
    task: Sequence[Any] | None = None,
    **_: Any,
) -> list[float]:
    """Score completions pairwise: the reward function that TRL's ``GRPOTrainer`` takes.

    Accepts texts and conversations (the last message counts), and a column ``task``; other keyword
    arguments of TRL are ignored. Raises ``ValueError`` when the lists differ in length.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts but {len(completions)} completions: they are scored in pairs"
        )
    return [
        rule_reward(_text(prompt), _text(completion), own)
        for prompt, completion, own in zip(
            prompts, completions, task or [None] * len(prompts), strict=True
        )
    ]


def read(prompt: str, completion: str, task: Any = None) -> Reading:
    """Judge by the reward's lenient rule; ``"wrong"`` for a prompt without a readable task."""
    if not isinstance(task, Mapping) or (task_type := _type_of(task)) is None:
        if (found := task_of(prompt)) is None:
            return "wrong"
        task_type, task = found
    try:
        return task_type.read(task, completion)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        # The task does not have the fields or values that its type says it has.
        return "wrong"


def task_of(prompt: str) -> tuple[TaskType, Mapping[str, Any]] | None:
    """Return the task type and the task in a prompt, or ``None`` if they cannot be read."""
    # str.find instead of a regular expression: linear in the prompt for any text.
    start = prompt.find("TASK={")
    end = prompt.find("}", start)
    if start < 0 or end < 0:
        return None
    try:
        task = json.loads(prompt[start + len("TASK=") : end + 1])
    except (ValueError, RecursionError):
        return None
    task_type = _type_of(task)
    return None if task_type is None else (task_type, task)


def _type_of(task: Mapping[str, Any]) -> TaskType | None:
    name = task.get("type")
    return task_types().get(name) if isinstance(name, str) else None


def _text(value: str | Conversation | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    content = value[-1].get("content") if value else None
    return content if isinstance(content, str) else ""
