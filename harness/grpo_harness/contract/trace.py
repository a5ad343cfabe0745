"""What was observed of a run: its batches of completions, micro-batches and steps."""

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
    """The completions of one generation batch, group after group.

    ``prompts``, ``texts`` and ``scored`` (token ids) were passed to the reward function, which
    returned ``rewards``. ``prompt_ids`` and ``completion_ids`` are what the model under training
    drew, completions up to and including the first end token; ``random_state`` is torch's before
    the draw. If that model drew nothing, ``random_state`` is None and the ids are those passed to
    the reward function. ``step`` is the index, among the observed steps, of the step that drew the
    batch.
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
    """The inputs of one call of the loss, and the model's output for them.

    ``rows`` are (prompt, completion) without padding. ``mask``, ``old`` and ``log_probabilities``
    have shape (completions, tokens), or are None if the trainer does not have or show them.
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

    ``gradient`` is the gradient after the last micro-batch, ``taken`` the one that the optimizer
    used.
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
    """Everything observed of a run. If it was interrupted, ``steps`` are those after it resumed.

    ``rows`` are the logged rows, each with the number of the last step that it covers, and
    ``tables`` TRL's tables of completions, by the same number. ``error`` is what ended the run
    early; otherwise ``run`` is its result. In step ``nan_at`` a NaN was planted.
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
        """The number of steps that share one generation batch."""
        micro_batches = self.recipe.gradient_accumulation_steps
        drawn: int = self.recipe.config.get("steps_per_generation") or micro_batches
        return max(1, drawn // micro_batches)

    def steps_of(self, row: Row) -> list[Step]:
        """Return the steps that a logged row covers."""
        last = int(row["step"])
        return self.steps[last - int(self.trainer.args.logging_steps) : last]
