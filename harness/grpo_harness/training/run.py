"""One run: a recipe, trained from a policy on disk to a policy on disk.

A recipe has all settings of a run. A run that ended early continues from its last checkpoint when
the same run is started again. Several processes, started by torch's or accelerate's launcher, train
one policy together.
"""

import dataclasses
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_harness.engines.weights import check_loaded
from grpo_harness.errors import HarnessError, user_code
from grpo_harness.policy import TRAINED_ON, load
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.calls import RewardFunction
from grpo_harness.text import escape, one_line
from grpo_harness.training.config import checkpointing, settings
from grpo_harness.training.curves import Row, write_curves
from grpo_harness.training.files import Recipe
from grpo_harness.training.job import Job, job_of
from grpo_harness.training.keys import BLOCK
from grpo_harness.training.resources import Resources, peak_memory, resources, write_resources
from grpo_harness.training.trainer import (
    Progress,
    Trainer,
    TrainingError,
    Watch,
    check_finite,
    checked,
    guarded,
    raised_in,
    save_every,
    writing,
)
from grpo_harness.training.unfinished import Unfinished, check_new, folder_of


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A finished run: its folder, the log of every step, and the trained model.

    ``weights_moved`` is the share of changed elements in the tensor that changed least, and
    ``fingerprint`` that of the trained policy.
    """

    path: Path
    log: tuple[Row, ...]
    weights_moved: float
    fingerprint: str
    resources: Resources
    model: PreTrainedModel


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    reward: RewardFunction | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> TrainingRun:
    """Train ``recipe.policy`` by ``recipe``, and write the result to ``out``.

    With ``reward`` it is trained on that alone, whatever the recipe names.

    The folder holds the checkpoint in safetensors with its tokenizer, ``recipe.json`` (recipe,
    resolved config, versions, fingerprint), ``problems.txt`` (the ids of the training problems,
    which no evaluation of the policy may ask), ``curves.csv``, ``log.json``, ``curves.png`` and
    ``resources.json``. It appears only when it is complete. Until then ``<out>.unfinished`` keeps
    the last two checkpoints: a run that ended early continues from there, to the same weights as
    without the interruption, and passes a message to ``notice``.

    The reward is identified by its name: a run may continue with one that was fixed in between.

    Raises ``FileExistsError`` when ``out`` exists, ``UnfinishedError`` when another run's
    checkpoints are in the place of this one's, ``ValueError`` for a recipe that cannot be resolved
    or a prompt that is too long, ``PolicyError`` for a policy that cannot be loaded, and
    ``TrainingError`` when the reward fails, a figure is not finite or a file cannot be written. If
    there is a checkpoint to continue from, the error has a note that names it.
    """
    out = Path(out)
    if reward is not None:
        checked(reward)
    check_new(out)
    job = job_of(recipe, folder_of(out), device=device, reward=reward)
    config, policy = job.config, job.policy
    # What has to be the same for a run to continue from the checkpoints of another.
    identity = {
        "config": settings(config),
        "policy": dataclasses.asdict(policy.fingerprint),
        "prompts": job.rows_digest,
        "reward": job.reward_names,
        "processes": config.world_size,
        "versions": _versions(),
    }
    # Only the first of several processes writes.
    unfinished = Unfinished(out, identity) if config.process_index == 0 else None
    try:
        watch = Watch(save_every(config, int(config.save_steps)), progress if unfinished else None)
        trainer = _trainer(job, watch)
        model = cast("PreTrainedModel", trainer.model)
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        before = {n: p.detach().to("cpu", copy=True) for n, p in trained}
        trainer.unfinished = unfinished
        _go(job, trainer, model, notice)
        # All processes must call these two, because each has a part of the result.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        peak = max(gather_object([peak_memory(cuda=not config.use_cpu)]))
        told: list[Any] = [None]
        if unfinished is not None:
            check_finite(weights.items(), trainer.state.global_step)
            moved = min(float((weights[n].cpu() != p).float().mean()) for n, p in before.items())
            result = unfinished.folder / "result"
            with writing(result, "the result"):
                fingerprint = _write(result, job, model, weights, watch.rows)
                took = resources(
                    watch.rows,
                    completions=config.generation_batch_size or 0,
                    processes=config.world_size,
                    peak=peak,
                    cuda=not config.use_cpu,
                )
                write_resources(took, result)
                record = {
                    "recipe": job.recipe.kept(),
                    "config": settings(config),
                    "base": {"name": policy.name, "fingerprint": str(policy.fingerprint)},
                    "fingerprint": fingerprint,
                    "processes": config.world_size,
                    "weights_moved": moved,
                    "versions": {"python": platform.python_version(), **_versions()},
                }
                text = json.dumps(record, indent=1, default=str)
                (result / "recipe.json").write_text(text + "\n", encoding="utf-8")
                if (logged := unfinished.folder / "completions").is_dir():  # log_completions
                    logged.rename(result / logged.name)
            check_new(out)
            result.rename(out)
            told = [(moved, fingerprint, took)]
        broadcast_object_list(told)
    except BaseException as error:
        if unfinished is not None and (kept := unfinished.leave()):
            error.add_note(kept)
        raise
    if unfinished is not None:
        unfinished.remove()
    moved, fingerprint, took = told[0]
    return TrainingRun(out, tuple(watch.rows), moved, fingerprint, took, model)


def build(recipe: Recipe, out: Path, *, device: str = "auto") -> GRPOTrainer:
    """Return the trainer of a recipe's file as TRL would make it, not yet trained.

    It is of the file's own class, without the checks of `train`. Raises as `train` does.
    """
    return _made(job := job_of(recipe, Path(out), device=device), job.trainer)


def _trainer(job: Job, watch: Watch) -> Trainer:
    alone = len(job.rewards) == 1
    rewards = [
        reward if isinstance(reward, str) else checked(reward, alone=alone)
        for reward in job.rewards
    ]
    trainer = _made(replace(job, rewards=tuple(rewards)), guarded(job.trainer), [watch])
    trainer.remove_callback(PrinterCallback)
    return cast("Trainer", trainer)


def _made(
    job: Job, trainer: type[GRPOTrainer], callbacks: Sequence[TrainerCallback] = ()
) -> GRPOTrainer:
    # Its own checks, those of libraries that it needs, and a constructor of the user's own.
    with user_code(lambda error: _refused(job, error)), quiet(), _renamed():
        made = trainer(
            model=job.model,
            reward_funcs=list(job.rewards),
            args=job.config,
            train_dataset=job.rows,
            eval_dataset=job.evaluated,
            processing_class=job.policy.tokenizer,
            callbacks=list(callbacks),
            peft_config=job.peft,
        )
    if isinstance(job.model, str) and job.peft is None:
        check_loaded(job.policy, cast("PreTrainedModel", made.model))
    return made


def _refused(job: Job, error: BaseException) -> TrainingError:
    where, own = job.recipe.where, job.recipe.block.trainer
    if own is not None and raised_in(job.trainer, error):
        return TrainingError(
            f"{where}: {BLOCK}.trainer '{escape(own)}' cannot be made ready ({one_line(error)}): "
            "fix it"
        )
    return TrainingError(
        f"{where}: the trainer of TRL {version('trl')} refuses it ({one_line(error)}): fix it, or "
        "install what it needs"
    )


def _go(
    job: Job, trainer: Trainer, model: PreTrainedModel, notice: Callable[[str], None] | None
) -> None:
    start: list[Any] = [None]
    if trainer.unfinished is not None:
        start = [trainer.unfinished.last()]
        if notice is not None:
            for line in trainer.unfinished.notices:
                notice(line)
            if start[0] is not None:
                notice(f"going on from {start[0]}")
    broadcast_object_list(start)
    folder: Path | None = start[0]
    caches = model.config.use_cache
    model.config.use_cache = not checkpointing(cast("GRPOConfig", trainer.args))
    try:
        if folder is not None:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            trainer.epochs_done = int(state["epoch"])
        with _renamed(), _guarded():
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
    except Exception as error:  # torch, json and safetensors raise various errors
        if trainer.begun or isinstance(error, HarnessError):
            raise
        if folder is None:
            raise _refused(job, error) from error
        raise TrainingError(
            f"{folder} cannot be read ({one_line(error)}): remove it, and the same command "
            "continues from the one before"
        ) from error
    model.config.use_cache = caches


@contextmanager
def _renamed() -> Iterator[None]:
    """Ignore that TRL uses names that are deprecated in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


@contextmanager
def _guarded() -> Iterator[None]:
    # With this torch refuses every pickle that has more than tensors and numbers, in any library.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    was, shown = os.environ.get(name), logging.get_verbosity()
    os.environ[name] = "1"
    # transformers warns about what is intended: tied weights, the tokenizer's special tokens.
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)
        os.environ.pop(name)
        if was is not None:
            os.environ[name] = was


def _write(
    folder: Path,
    job: Job,
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
) -> str:
    """Write the trained policy, its problems and its curves; return its fingerprint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with quiet():
        model.save_pretrained(folder, state_dict=dict(weights))
        job.policy.tokenizer.save_pretrained(folder)
    ids = "".join(f"{name}\n" for name in job.ids)
    (folder / TRAINED_ON).write_text(ids, encoding="utf-8")
    write_curves(rows, folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only the owner may read
    # Loading it shows that the checkpoint is complete.
    return str(load(str(folder)).fingerprint)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "trl", "datasets")}
