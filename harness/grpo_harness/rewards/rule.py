"""The rule reward: prompt and completion in, number out. Standard library only.

The truth travels in the prompt (``TASK={…}``), so the reward needs neither the problem nor its
task type's state, and TRL's ``GRPOTrainer`` can call it as it is. No text is ever run as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grpo_harness.tasks import Reading, TaskType, task_types
from grpo_harness.text import first_line

LENGTH_PENALTY = 0.002
"""Reward lost per character of a completion."""

LONGEST_PENALISED = 200
"""Characters past which a completion costs no more."""

Outcome = Literal["correct", "wrong", "unparsable", "truncated", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "unparsable", "truncated", "error")

Conversation = list[dict[str, Any]]
"""Messages with ``role`` and ``content``, as TRL passes them for conversational data sets."""


def rule_reward(prompt: str, completion: str) -> float:
    """Score one completion: +1 if correct, else -1, less 0.002 a character up to 200.

    The length is that of the whole completion, in characters. A prompt without a readable
    ``TASK={…}`` scores as incorrect. Never raises for any two texts.
    """
    score = 1.0 if read(prompt, completion) == "correct" else -1.0
    return score - LENGTH_PENALTY * min(len(completion), LONGEST_PENALISED)


def reward_func(
    prompts: Sequence[str | Conversation],
    completions: Sequence[str | Conversation],
    **_: Any,
) -> list[float]:
    """Score completions pairwise: the reward function that TRL's ``GRPOTrainer`` takes.

    Texts and conversations (the last message counts) are both understood; what else TRL passes
    by keyword is not needed. Raises ``ValueError`` when the two lists differ in length.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts but {len(completions)} completions: they are scored in pairs"
        )
    return [
        rule_reward(_text(prompt), _text(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def read(prompt: str, completion: str) -> Reading:
    """Tell whether ``completion`` answers ``prompt`` by the reward's own, lenient rule.

    ``"wrong"`` also stands for a prompt without a readable task: nothing can answer it.
    """
    if (found := _task(prompt)) is None:
        return "wrong"
    task_type, task = found
    try:
        return task_type.read(task, first_line(completion))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        # The task does not have the fields or values that its type says it has.
        return "wrong"


def outcome(prompt: str, completion: str | None, *, truncated: bool) -> Outcome:
    """Sort one completion into exactly one outcome.

    No completion at all (``None``: the engine failed) is an error. One that the token limit
    cut off is truncated, whatever stands in it: it is an answer, and not a correct one.
    """
    if completion is None:
        return "error"
    return "truncated" if truncated else read(prompt, completion)


def strictly_correct(prompt: str, completion: str) -> bool:
    """Tell whether the completion is the demanded answer and nothing else.

    This is the reading beside the reward's: their difference is what the rule lets through.
    """
    if (found := _task(prompt)) is None:
        return False
    task_type, task = found
    try:
        return completion.strip() == task_type.canonical(task)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


def _task(prompt: str) -> tuple[TaskType, Mapping[str, Any]] | None:
    # str.find instead of a regular expression: linear in the prompt whatever stands in it.
    start = prompt.find("TASK={")
    end = prompt.find("}", start)
    if start < 0 or end < 0:
        return None
    try:
        task = json.loads(prompt[start + len("TASK=") : end + 1])
    except (ValueError, RecursionError):
        return None
    name = task.get("type")
    task_type = task_types().get(name) if isinstance(name, str) else None
    return None if task_type is None else (task_type, task)


def _text(value: str | Conversation) -> str:
    if isinstance(value, str):
        return value
    content = value[-1].get("content") if value else None
    return content if isinstance(content, str) else ""
