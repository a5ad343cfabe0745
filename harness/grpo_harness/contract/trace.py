"""What was observed of a run: its batches of completions, micro-batches and steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from grpo_harness.rewards.calls import RewardFunction
from grpo_harness.training import Recipe, Row, TrainingRun

Tokens = tuple[int, ...]
Tensors = Mapping[str, Tensor]
"""One tensor for each trainable parameter, by its name."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What one reward function was given for a batch, and what it returned.

    ``columns`` are the further arguments: the columns of the data set, and the trainer's state as
    it was then.
    """

    prompts: tuple[Any, ...]
    completions: tuple[Any, ...]
    ids: tuple[Tokens, ...]
    columns: Mapping[str, Any]
    rewards: tuple[float | None, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """The completions of one generation batch, group after group.

    ``scored`` are the calls of the reward functions, by their place among them, and ``rewards`` the
    weighted sums of what they returned; None where every function returned None. ``prompt_ids`` and
    ``completion_ids`` are what the model under training drew, completions up to and including the
    first end token; ``random_state`` is torch's before the draw. If that model drew nothing,
    ``random_state`` is None and the ids are those passed to the reward functions. ``step`` is the
    index, among the observed steps, of the step that drew the batch. A batch of several
    ``processes`` has their rows one after the other.
    """

    step: int
    scored: Mapping[int, Scored]
    rewards: tuple[float | None, ...]
    prompt_ids: tuple[Tokens, ...]
    completion_ids: tuple[Tokens, ...]
    random_state: Tensor | None
    processes: tuple["Batch", ...] = ()

    @property
    def draws(self) -> tuple["Batch", ...]:
        """What each process drew and scored of it."""
        return self.processes or (self,)

    @property
    def prompts(self) -> tuple[Any, ...]:
        """The prompts, as the first reward function was given them."""
        return next((scored.prompts for scored in self.scored.values()), ())


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
    used. In several processes, those of the micro-batches that were made at once follow each other,
    and ``digests`` are of the weights and gradients of each process.
    """

    number: int
    batch: Batch
    weights: Tensors
    micro_batches: list[MicroBatch] = field(default_factory=list)
    gradient: Tensors = field(default_factory=dict)
    taken: Tensors = field(default_factory=dict)
    after: Tensors = field(default_factory=dict)
    digests: Sequence[Mapping[str, str]] = ()


@dataclass(eq=False)
class Trace:
    """Everything observed of a run. If it was interrupted, ``steps`` are those after it resumed.

    ``config`` is the ``GRPOConfig`` that was asked for, before the trainer could change it, and
    ``recipe`` the recipe that it comes from, if it comes from one. ``rewards`` are the reward
    functions. ``rows`` are the logged rows, each with the number of the last step that it covers,
    and ``tables`` TRL's tables of completions, by the same number. ``error`` is what ended the run
    early. The trained policy is in the folder ``saved``, if there is one, and ``run`` is what a
    recipe's run returned. In step ``nan_at`` a NaN was planted. ``processes`` trained together.
    """

    name: str
    config: Any
    recipe: Recipe | None
    trainer: Any
    rewards: Sequence[RewardFunction]
    steps: list[Step]
    rows: list[Row]
    tables: Mapping[int, pd.DataFrame]
    after: Tensors
    saved: Path | None
    run: TrainingRun | None
    error: Exception | None
    nan_at: int | None = None
    processes: int = 1

    @property
    def groups(self) -> int:
        """The number of prompts of one generation batch."""
        return int(self.config.generation_batch_size) // int(self.config.num_generations)

    @property
    def planned(self) -> int:
        """The number of steps that were asked for."""
        steps = int(self.config.max_steps)
        return steps if steps > 0 else int(self.trainer.state.max_steps)

    @property
    def last(self) -> int:
        """The step to end with: the last one, or that in which a user's callback stops the run."""
        stopped = self.recipe is None and self.trainer.control.should_training_stop
        return int(self.trainer.state.global_step) if stopped else self.planned

    @property
    def steps_per_batch(self) -> int:
        """The number of steps that share one generation batch."""
        micro_batches = int(self.config.gradient_accumulation_steps)
        return max(1, int(self.config.steps_per_generation) // micro_batches)

    @property
    def every(self) -> int:
        """The number of steps that a logged row covers."""
        return int(self.config.logging_steps)

    def steps_of(self, row: Row) -> list[Step]:
        """Return the steps that a logged row covers."""
        last = int(row["step"])
        return self.steps[last - self.every : last]

    def drawn_in(self, row: Row) -> list[Batch]:
        """Return the batches that were drawn in the steps that a logged row covers."""
        covered = self.steps_of(row)
        return list(dict.fromkeys(s.batch for s in covered if self.steps[s.batch.step] in covered))


def weighed(
    scored: Sequence[Sequence[float | None]], weights: Sequence[float]
) -> list[float | None]:
    """Return each completion's weighted sum of rewards, without those that are None.

    It is None where all are. In single precision, because rounding matters for rewards that hardly
    differ.
    """
    numbers = [[float("nan") if r is None else r for r in rewards] for rewards in scored]
    columns = torch.tensor(numbers, dtype=torch.float32)
    sums = (columns * torch.tensor(weights, dtype=torch.float32)[:, None]).nansum(0)
    left_out = columns.isnan().all(0).tolist()
    return [None if out else s for s, out in zip(sums.tolist(), left_out, strict=True)]


def identity(prompt: Any) -> str:
    """Return what tells a prompt, a text or a conversation, from another."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
