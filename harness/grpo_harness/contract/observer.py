"""Watch a training run from outside: what was drawn, scored and trained on.

`watch` runs `grpo_harness.training.train` without changing TRL's computation. It observes what
every trainer must use: the reward function, the model's ``generate`` and forward, the inputs of the
loss, the callbacks around the optimizer, and the logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_harness.contract.runs import Run
from grpo_harness.contract.trace import Batch, MicroBatch, Step, Tensors, Tokens, Trace
from grpo_harness.rewards.functions import RewardFunction
from grpo_harness.rewards.rule import reward_func
from grpo_harness.training import Row, train


def watch(run: Run, folder: Path, *, device: str = "auto") -> Trace:
    """Train as ``run`` says, as the product does, in ``folder``; return everything observed.

    In the step ``run.nan_at`` the model's log-probabilities for the loss are replaced by NaN. An
    error that ends the run early is kept in ``Trace.error``; one before the first step is raised.
    """
    out = folder / "run"
    if run.policy is not None:
        recipe = dataclasses.replace(run.recipe, policy=run.policy(folder / "policy"))
        run = dataclasses.replace(run, recipe=recipe)
    if run.interrupted_in is not None:
        _interrupt(run, out, device)
    seen = _Observer(run.reward, run.nan_at)
    made, error = None, None
    with _attached(seen):
        try:
            made = train(run.recipe, out, device=device, reward=seen.reward)
        except Exception as raised:
            if not seen.steps:
                raise
            error = raised
    rows = [row for row in seen.trainer.state.log_history if "loss" in row]
    tables = {
        int(path.stem.rpartition("_")[2]): pd.read_parquet(path)
        for path in sorted((out / "completions").glob("completions_*.parquet"))
    }
    after = _copy(seen.trainer.model)
    return Trace(run.recipe, seen.trainer, seen.steps, rows, tables, after, made, error, run.nan_at)


def _interrupt(run: Run, out: Path, device: str) -> None:
    def stop(row: Row) -> None:
        if row["step"] == run.interrupted_in:
            raise KeyboardInterrupt  # as Ctrl-C does

    first = _Observer(run.reward, None)
    with _attached(first), contextlib.suppress(KeyboardInterrupt):
        train(run.recipe, out, device=device, reward=first.reward, progress=stop)


@contextlib.contextmanager
def _attached(observer: _Observer) -> Iterator[None]:
    # Every run of the product calls Trainer.train.
    inherited = GRPOTrainer.train

    def train(trainer: GRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        observer.attach(trainer)
        return inherited(trainer, *args, **kwargs)

    with patch.object(GRPOTrainer, "train", train):
        try:
            yield
        finally:
            observer.leave()


class _Observer(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Records a run, and changes nothing except for the planted NaN."""

    def __init__(self, reward: RewardFunction, nan_at: int | None) -> None:
        # TRL allows several classes; here it is always a causal model and its tokenizer.
        self.trainer: Any = None
        self._model: Any = None
        self._tokenizer: Any = None
        self.steps: list[Step] = []
        self._score = reward
        self._nan_at = nan_at
        self._drawn: tuple[list[Tokens], list[Tokens], Tensor] | None = None
        self._window: Batch | None = None
        self._before: Tensors = {}
        self._output: Any = None
        self._in_loss = False
        self.leave: Callable[[], None] = lambda: None

    def attach(self, trainer: GRPOTrainer) -> None:
        """Attach to ``trainer``, which is about to train."""
        self.trainer = trainer
        self._model = model = self.trainer.model
        self._tokenizer = self.trainer.processing_class
        generate, compute_loss = model.generate, trainer.compute_loss
        training_step = self.trainer.training_step

        def drawing(*args: Any, **kwargs: Any) -> Any:
            cuda = model.device.type == "cuda"
            state = torch.cuda.get_rng_state(model.device) if cuda else torch.get_rng_state()
            drawn = generate(*args, **kwargs)
            self._keep_drawn(kwargs["input_ids"], kwargs["attention_mask"], drawn, state)
            return drawn

        def losing(model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._in_loss = True
            try:
                loss = compute_loss(model, inputs, *args, **kwargs)
            finally:
                self._in_loss = False
            self._keep_part(inputs, float(loss.detach()))
            return loss

        def stepping(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self.steps[-1].gradient = _gradient(model)
            return loss

        model.generate, self.trainer.compute_loss = drawing, losing
        self.trainer.training_step = stepping
        hook = model.register_forward_hook(self._forwarded)
        trainer.add_callback(self)

        def leave() -> None:
            hook.remove()
            del model.generate, self.trainer.compute_loss, self.trainer.training_step

        self.leave = leave

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **kwargs: Any
    ) -> Sequence[float | None]:
        """Score with the run's own reward function, and record the scores."""
        rewards: Sequence[float | None] = self._score(
            prompts=prompts, completions=completions, **kwargs
        )
        scored = [tuple(ids) for ids in kwargs["completion_ids"]]
        if self._drawn is None:
            given = self._tokenizer(text=list(prompts))["input_ids"]
            prompt_ids, completion_ids, state = [tuple(ids) for ids in given], scored, None
        else:
            prompt_ids, completion_ids, state = self._drawn
        self._drawn = None
        self._window = Batch(
            step=len(self.steps),
            prompts=tuple(prompts),
            texts=tuple(completions),
            scored=tuple(scored),
            rewards=tuple(rewards),
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(completion_ids),
            random_state=state,
        )
        return rewards

    # TRL logs a reward by the name of its function, so the name must not change.
    reward.__name__ = reward_func.__name__

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = _copy(self._model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].taken = _gradient(self._model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].after = _copy(self._model)

    def _keep_drawn(self, prompts: Tensor, mask: Tensor, drawn: Tensor, state: Tensor) -> None:
        ends = set(torch.tensor(self._model.generation_config.eos_token_id).view(-1).tolist())
        cut = [_until(row.tolist(), ends) for row in drawn[:, prompts.shape[1] :]]
        given = [tuple(row[keep.bool()].tolist()) for row, keep in zip(prompts, mask, strict=True)]
        self._drawn = (given, cut, state)

    def _keep_part(self, inputs: Mapping[str, Any], loss: float) -> None:
        assert self._window is not None
        pad = self._tokenizer.pad_token_id
        prompts = [tuple(reversed(_strip(row[::-1], pad))) for row in inputs["prompt_ids"].tolist()]
        completions = [_strip(row, pad) for row in inputs["completion_ids"].tolist()]
        width = inputs["completion_ids"].shape[1]
        shown = getattr(self._output, "log_probs", None)
        old, mask = inputs.get("old_per_token_logps"), inputs.get("completion_mask")
        if not self.steps or self.steps[-1].taken:
            number = self.trainer.state.global_step + 1
            self.steps.append(Step(number, self._window, self._before))
        self.steps[-1].micro_batches.append(
            MicroBatch(
                rows=tuple(zip(prompts, completions, strict=True)),
                mask=None if mask is None else mask.detach().cpu().clone(),
                advantages=inputs["advantages"].detach().cpu().clone(),
                old=None if old is None else old.detach().cpu().clone(),
                log_probabilities=None if shown is None else shown[:, -width:].detach().cpu(),
                loss=loss,
            )
        )

    def _forwarded(self, model: Any, args: Any, output: Any) -> Any:
        if not self._in_loss:
            return None
        taken = sum(bool(step.taken) for step in self.steps)
        if self._nan_at == taken + 1:
            for name in ("log_probs", "logits"):
                if getattr(output, name, None) is not None:
                    output[name] = output[name] * math.nan
        self._output = output
        return output


def _until(tokens: Sequence[int], ends: set[int]) -> Tokens:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def _strip(tokens: Sequence[int], pad: int) -> Tokens:
    kept = len(tokens)
    while kept and tokens[kept - 1] == pad:
        kept -= 1
    return tuple(tokens[:kept])


def _copy(model: Any) -> Tensors:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def _gradient(model: Any) -> Tensors:
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().clone()
        for name, p in model.named_parameters()
    }
