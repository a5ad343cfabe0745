"""What was seen of a run: its batches of completions, micro-batches and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from grpo_harness.training import Row, TrainingRun
from grpo_harness.training.recipes import Recipe

Tokens = tuple[int, ...]
Tensors = Mapping[str, Tensor]
"""One tensor for each trainable parameter, by its name."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The completions that were drawn at once, group after group.

    ``prompts`` and ``texts`` are what the reward function was given, ``rewards`` what it
    returned, ``scored`` the token ids that it was given. ``prompt_ids`` and ``completion_ids``
    are what the model under training drew, the latter up to and with the first token that ends
    an answer; ``random_state`` is torch's just before. Where that model drew nothing it is None,
    and the ids are those that the reward function was given. ``step`` is the place, among the
    steps that were seen, of the one that it was drawn in.
    """

    step: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    scored: tuple[Tokens, ...]
    rewards: tuple[float | None, ...]
    prompt_ids: tuple[Tokens, ...]
    completion_ids: tuple[Tokens, ...]
    random_state: Tensor | None


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one call of the loss was given: a micro-batch, and the model's answer to it.

    ``rows`` are (prompt, completion) without padding. ``mask``, ``old`` and ``log_probabilities``
    have shape (completions, tokens), or are None where the trainer has none or shows none.
    """

    rows: tuple[tuple[Tokens, Tokens], ...]
    mask: Tensor | None
    advantages: Tensor
    old: Tensor | None
    log_probabilities: Tensor | None
    loss: float


@dataclass(eq=False)
class Step:
    """One optimizer step: its micro-batches, and the weights before and ``after`` it.

    ``gradient`` is what the last of the micro-batches left, ``taken`` what the optimizer was given.
    """

    number: int
    batch: Batch
    weights: Tensors
    micro_batches: list[MicroBatch] = field(default_factory=list)
    gradient: Tensors = field(default_factory=dict)
    taken: Tensors = field(default_factory=dict)
    after: Tensors = field(default_factory=dict)


@dataclass(eq=False)
class Trace:
    """All that was seen of a run; of one that was interrupted, ``steps`` are those made after it.

    ``rows`` are the logged rows, each with the number of the last step that it covers, and
    ``tables`` TRL's own tables of completions, by the same number. ``error`` is what ended the
    run, if something did; ``run`` is what it left otherwise. In step ``nan_at`` a NaN was planted.
    """

    recipe: Recipe
    trainer: Any
    steps: list[Step]
    rows: list[Row]
    tables: Mapping[int, pd.DataFrame]
    after: Tensors
    run: TrainingRun | None
    error: Exception | None
    nan_at: int | None = None

    @property
    def steps_per_batch(self) -> int:
        """The number of steps that share out the completions that are drawn at once."""
        micro_batches = self.recipe.gradient_accumulation_steps
        drawn: int = self.recipe.config.get("steps_per_generation") or micro_batches
        return max(1, drawn // micro_batches)

    def steps_of(self, row: Row) -> list[Step]:
        """Return the steps that a logged row covers."""
        last = int(row["step"])
        return self.steps[last - int(self.trainer.args.logging_steps) : last]
