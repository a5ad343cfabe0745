"""TRL's trainer, with checks of its reward, figures and checkpoints.

An error in one of them ends the run with one line that names the step.
"""

import inspect
import math
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_harness.errors import HarnessError
from grpo_harness.gate.inputs import brief
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.calls import (
    RewardError,
    RewardFunction,
    reward_name,
    score,
    score_awaited,
    waits,
)
from grpo_harness.text import one_line
from grpo_harness.training.curves import Row
from grpo_harness.training.unfinished import Unfinished

Progress = Callable[[Row], None]


class TrainingError(HarnessError):
    """A run cannot continue. One line: the step, what happened and what to do."""


class OwnCodeError(TrainingError):
    """A reward or a trainer of the user's own raised something in a step: its cause."""

    shows_cause = True


class Trainer(GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's trainer, with checkpoints that are checked to be complete and of this run.

    ``unfinished`` is where they are kept, in the first process; ``epochs_done`` is the number of
    epochs that a resumed run has finished, and ``begun`` tells that training has started and
    nothing more is read. ``own`` is the class that the recipe names.
    """

    own: type[GRPOTrainer] = GRPOTrainer
    unfinished: Unfinished | None = None
    epochs_done = 0
    begun = False

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: ``recipe.json`` says more."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a part of a step. Raises ``TrainingError`` if a change of the recipe can help."""
        self.begun = True
        step = self.state.global_step + 1
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call, unused-ignore]
        except HarnessError:
            raise
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {step}: out of memory ({one_line(error)}): raise "
                "gradient_accumulation_steps, which takes fewer completions at once"
            ) from error
        except Exception as error:
            if raised_in(self.own, error):
                raise OwnCodeError(
                    f"step {step}: {self.own.__name__} raised {one_line(error)}"
                ) from error
            self._explain(step, error)
            raise

    def _explain(self, step: int, error: Exception) -> None:
        """Raise ``TrainingError`` for an error that a change of the recipe can help."""
        if isinstance(error, ValueError):
            raise TrainingError(
                f"step {step}: TRL {version('trl')} refuses the recipe ({one_line(error)}): fix it"
            ) from error
        if isinstance(error, RuntimeError) and "probability tensor" in str(error):
            raise TrainingError(
                f"step {step}: the policy's probabilities are not numbers any more: lower the "
                "learning rate"
            ) from error

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        # TRL draws a new order of the problems for each epoch from one generator. A resumed run
        # starts it from the beginning, so the orders of finished epochs are drawn again.
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self.epochs_done):
            next(iter(sampler))
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        check_finite(model.named_parameters(), step)
        with writing(folder, f"step {step}: its checkpoint"), quiet():
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call, unused-ignore]
            self.accelerator.wait_for_everyone()
            if self.unfinished is not None:
                self.unfinished.seal(folder)


def guarded(of: type[GRPOTrainer]) -> type[Trainer]:
    """Return a trainer's class with the checks of `Trainer`, before the methods of its own."""
    if issubclass(Trainer, of):
        return Trainer
    return type(of.__name__, (Trainer, of), {"own": of})


def raised_in(of: type[GRPOTrainer], error: BaseException) -> bool:
    """Tell whether an error came through the module of a trainer of the user's own."""
    if of is GRPOTrainer:
        return False
    file = inspect.getsourcefile(of)
    return any(frame.filename == file for frame in traceback.extract_tb(error.__traceback__))


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Remove ``folder`` if writing it fails. Raises ``TrainingError``."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # A full disk raises one of these in Python, torch and safetensors.
        if not isinstance(error, OSError | RuntimeError | SafetensorError):
            raise
        raise TrainingError(
            f"{what} cannot be written to {folder} ({one_line(error)}): make room there, or train "
            "into another folder"
        ) from error


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
    """Raise ``TrainingError`` with a tensor that is not finite after a step.

    The step's own figures do not show it, because its loss was computed before the update.
    """
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise TrainingError(
                f"step {step}: {name} is not finite after its update: lower the learning rate"
            )


def save_every(config: GRPOConfig, save_steps: int) -> int:
    """Return the number of steps between two checkpoints: ``save_steps`` or a little more.

    A checkpoint does not have completions that are drawn but not yet used: a resumed run is the
    same only from the end of a generation batch.
    """
    accumulated = config.gradient_accumulation_steps
    drawn = (config.steps_per_generation or accumulated) * config.num_iterations
    steps_per_batch = math.lcm(drawn, accumulated) // accumulated
    return math.ceil(save_steps / steps_per_batch) * steps_per_batch


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Passes every logged step on, requests checkpoints, and ends the run at a bad figure."""

    def __init__(self, save_every: int, progress: Progress | None) -> None:
        self.rows: list[dict[str, float]] = []
        self._save_every = save_every
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the log of a resumed run. Raises ``TrainingError`` if it would log nothing."""
        if state.max_steps < state.logging_steps:
            raise TrainingError(
                f"logging_steps is {state.logging_steps}, and of {state.max_steps} steps none "
                "would be logged: lower it"
            )
        self.rows = []
        for row in state.log_history:
            self._keep(row["step"], row)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint when one is due; the last step is followed by the result instead."""
        if not self.rows and state.global_step > state.logging_steps:
            raise TrainingError(
                f"step {state.global_step}: the trainer has logged no loss of an earlier step, by "
                "which a run is judged: let its log() pass TRL's figures on by their names"
            )
        due = self._save_every > 0 and state.global_step % self._save_every == 0
        control.should_save = due and state.global_step < state.max_steps

    def on_log(  # the arguments are the base class's
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the row of a step. Raises ``TrainingError`` for a figure that is not finite."""
        row = None if logs is None else self._keep(state.global_step, logs)
        if row is None:
            return
        for name in ("loss", "grad_norm", "reward"):
            # A step that reuses completions has no reward of its own. The trainer logs None for a
            # number that JSON does not have.
            value = row.get(name, 0.0)
            if value is None or not math.isfinite(value):
                what = "fix the reward" if name == "reward" else "lower the learning rate"
                raise TrainingError(
                    f"step {row['step']}: {name} is {value}, which no step recovers from: {what}"
                )
        if self._progress is not None:
            self._progress(row)

    def _keep(self, step: int, logs: Mapping[str, float]) -> dict[str, float] | None:
        """Return the new row of a step; the figures of an evaluation join that of their step."""
        if "loss" in logs:
            self.rows.append({"step": step, **logs})
            return self.rows[-1]
        if self.rows and self.rows[-1]["step"] == step:  # not the summary at the end
            self.rows[-1] |= {k: v for k, v in logs.items() if k.startswith("eval_")}
        return None


def checked(reward: RewardFunction, *, alone: bool = True) -> RewardFunction:
    """Return ``reward`` such that an error in it ends the run and names the step.

    If it is ``alone``, it must score something in every step. A coroutine function stays one, so
    that TRL lets several wait together. Raises ``ValueError`` if it cannot be called.
    """
    if not callable(reward):
        raise ValueError(f"the reward is {brief(reward)}, not a function")

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except RewardError as error:
            kind = OwnCodeError if error.__cause__ is not None else TrainingError
            raise kind(str(error)) from error.__cause__

    def place(kwargs: Mapping[str, Any]) -> str:
        return f"step {kwargs['trainer_state'].global_step + 1}"

    def some(scores: list[float | None], kwargs: Mapping[str, Any]) -> list[float | None]:
        if alone and all(value is None for value in scores):
            raise TrainingError(
                f"{place(kwargs)}: the reward {reward_name(reward)} scored none of {len(scores)} "
                "completions: fix it"
            )
        return scores

    def scored(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
        with named():
            found = score(reward, prompts, completions, kwargs, where=place(kwargs))
        return some(found, kwargs)

    async def awaited(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
        with named():
            found = await score_awaited(reward, prompts, completions, kwargs, where=place(kwargs))
        return some(found, kwargs)

    found = awaited if waits(reward) else scored
    found.__name__ = reward_name(reward)  # the name in TRL's logs
    return found
