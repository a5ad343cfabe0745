"""Watch a training run from outside: what was drawn, scored and trained on.

TRL's computation is not changed. The observer sees what every trainer must use: the reward
functions, the model's ``generate`` and forward, the inputs of the loss, the callbacks around the
optimizer, and the logs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_harness.contract.oracle import copied, end_tokens, prompt_tokens
from grpo_harness.contract.runs import Run
from grpo_harness.contract.trace import (
    Batch,
    MicroBatch,
    Scored,
    Step,
    Tensors,
    Tokens,
    Trace,
    weighed,
)
from grpo_harness.training import Row, train


def observe(run: Run, folder: Path, *, device: str = "auto") -> Trace:
    """Train as ``run`` says, as the product does, in ``folder``; return everything observed.

    In the step ``run.nan_at`` the model's log-probabilities for the loss are replaced by NaN. An
    error that ends the run early is kept in ``Trace.error``; one before the first step is raised.
    """
    out = folder / "run"
    if run.policy is not None:
        recipe = run.recipe.with_values(model_name_or_path=run.policy(folder / "policy"))
        run = dataclasses.replace(run, recipe=recipe)
    if run.interrupted_in is not None:
        _interrupt(run, out, device)
    config = run.recipe.config(out, device=device)
    seen = Observer(config, run.nan_at)
    made, error = None, None
    with _attached(seen):
        try:
            made = train(run.recipe, out, device=device, reward=run.reward)
        except Exception as raised:
            if not seen.steps:
                raise
            error = raised
    return dataclasses.replace(
        seen.trace(run.recipe.name, out, error),
        recipe=run.recipe,
        run=made,
        saved=None if made is None else made.path,
    )


def _interrupt(run: Run, out: Path, device: str) -> None:
    def stop(row: Row) -> None:
        if row["step"] == run.interrupted_in:
            raise KeyboardInterrupt  # as Ctrl-C does

    with contextlib.suppress(KeyboardInterrupt):
        train(run.recipe, out, device=device, reward=run.reward, progress=stop)


@contextlib.contextmanager
def _attached(observer: Observer) -> Iterator[None]:
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


class Observer(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Records a run of the config that was asked for; changes nothing but for a planted NaN.

    Evaluations during the training are not recorded.
    """

    def __init__(self, config: Any, nan_at: int | None = None) -> None:
        # TRL allows several classes; here it is always a causal model and its tokenizer.
        self.trainer: Any = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._ends: set[int] = set()
        self._config = config
        self.steps: list[Step] = []
        self._rewards: list[Any] = []
        self._nan_at = nan_at
        self._drawn: tuple[list[Tokens], list[Tokens], Tensor] | None = None
        self._scored: dict[int, Scored] = {}
        self._window: Batch | None = None
        self._before: Tensors = {}
        self._output: Any = None
        self._in_loss = False
        self.leave: Callable[[], None] = lambda: None

    def attach(self, trainer: GRPOTrainer) -> None:
        """Attach to ``trainer``, which is about to train."""
        self.trainer = trainer
        self._model = model = self.trainer.model
        tokenizer = self.trainer.processing_class
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._ends = end_tokens(model, self._tokenizer)
        generate, compute_loss = model.generate, trainer.compute_loss
        training_step = self.trainer.training_step
        self._rewards = self.trainer.reward_funcs

        def drawing(*args: Any, **kwargs: Any) -> Any:
            cuda = model.device.type == "cuda"
            state = torch.cuda.get_rng_state(model.device) if cuda else torch.get_rng_state()
            drawn = generate(*args, **kwargs)
            if model.training:
                self._keep_drawn(kwargs["input_ids"], kwargs["attention_mask"], drawn, state)
            return drawn

        def losing(model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._in_loss = True
            try:
                loss = compute_loss(model, inputs, *args, **kwargs)
            finally:
                self._in_loss = False
            if self._model.training:
                self._keep_part(inputs, float(loss.detach()))
            return loss

        def stepping(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self.steps[-1].gradient = _gradient(model)
            return loss

        model.generate, self.trainer.compute_loss = drawing, losing
        self.trainer.training_step = stepping
        self.trainer.reward_funcs = [self._recorded(n, f) for n, f in enumerate(self._rewards)]
        hook = model.register_forward_hook(self._forwarded)
        trainer.add_callback(self)

        def leave() -> None:
            hook.remove()
            del model.generate, self.trainer.compute_loss, self.trainer.training_step
            self.trainer.reward_funcs = self._rewards
            self.trainer.remove_callback(self)

        self.leave = leave

    def trace(self, name: str, out: Path, error: Exception | None) -> Trace:
        """Return what was observed of the run called ``name``, whose output is in ``out``."""
        return Trace(
            name=name,
            config=self._config,
            recipe=None,
            trainer=self.trainer,
            rewards=self._rewards,
            steps=self.steps,
            rows=[row for row in self.trainer.state.log_history if "loss" in row],
            tables={
                int(path.stem.rpartition("_")[2]): pd.read_parquet(path)
                for path in sorted((out / "completions").glob("completions_*.parquet"))
            },
            after=copied(self._model),
            saved=None,
            run=None,
            error=error,
            nan_at=self._nan_at,
        )

    def _recorded(self, n: int, reward: Any) -> Any:
        """Return a reward function that scores as ``reward`` does, and record what it does."""
        if isinstance(reward, torch.nn.Module):
            return reward

        def keep(given: Mapping[str, Any], rewards: Any) -> Any:
            if self._model.training:
                self._keep_scored(n, given, rewards)
            return rewards

        if _is_async(reward):

            async def scoring(**arguments: Any) -> Any:
                given = _as_given(arguments)
                return keep(given, await reward(**arguments))

        else:

            def scoring(**arguments: Any) -> Any:  # type: ignore[misc]
                given = _as_given(arguments)
                return keep(given, reward(**arguments))

        return functools.update_wrapper(scoring, reward)

    def _keep_scored(self, n: int, given: Mapping[str, Any], rewards: Any) -> None:
        columns = dict(given)
        prompts, completions = columns.pop("prompts"), columns.pop("completions")
        ids = tuple(tuple(row) for row in columns.pop("completion_ids"))
        numbers = tuple(None if r is None or math.isnan(r) else float(r) for r in rewards)
        self._scored[n] = Scored(tuple(prompts), tuple(completions), ids, columns, numbers)

    def _batch(self) -> Batch:
        """Return the batch that was drawn and scored since the last one."""
        scored = dict(sorted(self._scored.items()))
        drawn, self._drawn, self._scored = self._drawn, None, {}
        first = next(iter(scored.values()), Scored((), (), (), {}, ()))
        # A reward model is no function that could be recorded.
        weights = self._config.reward_weights or [1.0] * len(self._rewards)
        returned = [one.rewards for one in scored.values()]
        return Batch(
            step=len(self.steps),
            scored=scored,
            rewards=tuple(weighed(returned, [weights[n] for n in scored])) if scored else (),
            prompt_ids=tuple(drawn[0]) if drawn else tuple(self._tokens(first.prompts)),
            completion_ids=tuple(drawn[1]) if drawn else first.ids,
            random_state=drawn[2] if drawn else None,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights before a step."""
        self._before = copied(self._model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the gradient that the optimizer is given."""
        self.steps[-1].taken = _gradient(self._model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights after a step."""
        self.steps[-1].after = copied(self._model)

    def _keep_drawn(self, prompts: Tensor, mask: Tensor, drawn: Tensor, state: Tensor) -> None:
        cut = [_until(row.tolist(), self._ends) for row in drawn[:, prompts.shape[1] :]]
        given = [tuple(row[keep.bool()].tolist()) for row, keep in zip(prompts, mask, strict=True)]
        self._drawn = (given, cut, state)

    def _keep_part(self, inputs: Mapping[str, Any], loss: float) -> None:
        if self._scored or self._drawn:
            self._window = self._batch()
        assert self._window is not None
        masks = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        prompts = [tuple(row[keep].tolist()) for row, keep in masks]
        width = inputs["completion_ids"].shape[1]
        drawn = set(self._window.completion_ids)
        completions = [self._strip(row, drawn) for row in inputs["completion_ids"].tolist()]
        shown = getattr(self._output, "log_probs", None)
        old, mask = inputs.get("old_per_token_logps"), inputs.get("completion_mask")
        if not self.steps or self.steps[-1].taken:
            number = self.trainer.state.global_step + 1
            self.steps.append(Step(number, self._window, self._before))
        self.steps[-1].micro_batches.append(
            MicroBatch(
                rows=tuple(zip(prompts, completions, strict=True)),
                mask=None if mask is None else mask.detach().cpu().clone(),
                advantages=_of_completions(inputs["advantages"].detach().cpu()),
                old=None if old is None else old.detach().cpu().clone(),
                log_probabilities=None if shown is None else shown[:, -width:].detach().cpu(),
                loss=loss,
            )
        )

    def _tokens(self, prompts: Sequence[Any]) -> list[Tokens]:
        return prompt_tokens(self._tokenizer, prompts, self._config.chat_template_kwargs)

    def _strip(self, row: Sequence[int], drawn: Set[Tokens]) -> Tokens:
        """Return a completion without its padding, whose token the policy may draw too."""
        pad, kept = self._tokenizer.pad_token_id, len(row)
        while kept and row[kept - 1] == pad:
            kept -= 1
        longer = (tuple(row[:n]) for n in range(kept, len(row) + 1))
        return next((ids for ids in longer if ids in drawn), tuple(row[:kept]))

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


def _is_async(reward: Any) -> bool:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__)


def _as_given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the arguments of a reward function, which may change them."""
    given = dict(arguments)
    # There is no second rollout to score, and environments may not be sent to another process.
    given.pop("environments", None)
    for name in ("prompts", "completions", "completion_ids"):
        given[name] = copy.deepcopy(given[name])
    if "trainer_state" in given:
        given["trainer_state"] = copy.copy(given["trainer_state"])
    return given | {name: _nothing for name in ("log_extra", "log_metric") if name in given}


def _nothing(*args: Any) -> None:
    """Take the place of TRL's functions by which a reward logs."""


def _of_completions(advantages: Tensor) -> Tensor:
    """Return advantages, of completions or of tokens; NaN where those of a completion differ."""
    if advantages.dim() == 1:
        return advantages.clone()
    alike = (advantages == advantages[:, :1]).all(1)
    return torch.where(alike, advantages[:, 0], math.nan)


def _gradient(model: Any) -> Tensors:
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
