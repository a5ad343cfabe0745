"""One run: a recipe, trained from a policy on disk to a policy on disk.

A :class:`Recipe` has all settings of a run, and the rule reward is its only signal. A run that
ended early continues from its last checkpoint when the same run is started again. Several
processes, started by torch's or accelerate's launcher, train one policy together.
"""

import dataclasses
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl.trainer.grpo_config import GRPOConfig

from grpo_harness.engines.weights import device_of, load_weights
from grpo_harness.policy import TRAINED_ON, Policy, load
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.functions import RewardFunction, reward_name
from grpo_harness.rewards.rule import reward_func
from grpo_harness.tasks import Problem, make_problems
from grpo_harness.text import digest, one_line
from grpo_harness.training.config import checkpointing, resolve, settings
from grpo_harness.training.curves import Row, write_curves
from grpo_harness.training.recipes import Recipe
from grpo_harness.training.resources import Resources, peak_memory, resources, write_resources
from grpo_harness.training.trainer import (
    Progress,
    Trainer,
    TrainingError,
    Watch,
    check_finite,
    checked,
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
    reward: RewardFunction = reward_func,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> TrainingRun:
    """Train ``recipe.policy`` by ``recipe`` on ``reward``, and write the result to ``out``.

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
    out, scored = Path(out), checked(reward)
    check_new(out)
    config = resolve(recipe, folder_of(out), device=device)
    # Each of several processes has its own device, and the trainer moves the model there.
    on = device if config.world_size == 1 else "cpu"
    policy = load(recipe.policy)
    model = load_weights(policy, device_of(on), torch.float32)
    if recipe.beta and (policy.checkpoint.gguf_file or policy.checkpoint.base):
        kind = "an adapter" if policy.checkpoint.base else "a GGUF file"
        raise ValueError(
            f"recipe {recipe.name!r}: beta above 0 needs a reference model, which TRL loads from "
            f"safetensors, and {policy.name!r} is {kind}: save it with save_pretrained first"
        )
    problems = _problems(recipe, (config.generation_batch_size or 0) // recipe.num_generations)
    prompts = _prompts(recipe, policy, problems)
    # What has to be the same for a run to continue from the checkpoints of another.
    identity = {
        "config": settings(config),
        "policy": dataclasses.asdict(policy.fingerprint),
        "prompts": digest(json.dumps(prompts)),
        "reward": f"{reward.__module__}.{reward_name(reward)}",
        "processes": config.world_size,
        "versions": _versions(),
    }
    # Only the first of several processes writes.
    unfinished = Unfinished(out, identity) if config.process_index == 0 else None
    try:
        watch = Watch(save_every(config, recipe.save_steps), progress if unfinished else None)
        before = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}
        trainer = _trainer(recipe, config, policy, model, prompts, scored, watch)
        trainer.unfinished = unfinished
        _go(trainer, model, notice)
        # All processes must call these two, because each has a part of the result.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        peak = max(gather_object([peak_memory(cuda=not config.use_cpu)]))
        told: list[Any] = [None]
        if unfinished is not None:
            check_finite(weights.items(), recipe.steps)
            moved = min(float((weights[n].cpu() != p).float().mean()) for n, p in before.items())
            result = unfinished.folder / "result"
            with writing(result, "the result"):
                fingerprint = _write(result, policy, model, weights, problems, watch.rows)
                took = resources(
                    watch.rows,
                    completions=config.generation_batch_size or 0,
                    processes=config.world_size,
                    peak=peak,
                    cuda=not config.use_cpu,
                )
                write_resources(took, result)
                record = {
                    "recipe": dataclasses.asdict(recipe),
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


def _problems(recipe: Recipe, asked: int) -> list[Problem]:
    """Return the problems of a recipe, of which ``asked`` are asked at once."""
    problems = make_problems(recipe.n_math, recipe.n_prog, recipe.problem_seed)
    if len(problems) < asked:
        raise ValueError(
            f"recipe {recipe.name!r} has {len(problems)} problems and asks {asked} at once: raise "
            "n_math or n_prog"
        )
    return problems


def _prompts(recipe: Recipe, policy: Policy, problems: Sequence[Problem]) -> list[str]:
    prompts = [_once_special(policy.tokenizer, policy.render(p.prompt)) for p in problems]
    for problem, ids in zip(problems, policy.tokenizer(prompts)["input_ids"], strict=True):
        if len(ids) > recipe.max_prompt_length:
            raise ValueError(
                f"recipe {recipe.name!r}: the prompt of {problem.id} has {len(ids)} tokens, and "
                f"max_prompt_length is {recipe.max_prompt_length}: raise it"
            )
    return prompts


def _once_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # The chat template has written the special tokens, and TRL tokenizes a string prompt with
    # those that the tokenizer adds itself: the begin token must not be there twice.
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer(text)["input_ids"] == wanted:
        return text
    shorter = text.removeprefix(tokenizer.bos_token or "")
    if tokenizer(shorter)["input_ids"] == wanted:
        return shorter
    raise ValueError(
        "the tokenizer adds special tokens to a prompt that the chat template has completed "
        "already: switch that off in its tokenizer_config.json (add_bos_token, add_eos_token)"
    )


def _trainer(
    recipe: Recipe,
    config: GRPOConfig,
    policy: Policy,
    model: PreTrainedModel,
    prompts: Sequence[str],
    scored: RewardFunction,
    watch: Watch,
) -> Trainer:
    model = model.requires_grad_(True)
    # Only the end tokens of the checkpoint's generation config are used.
    model.generation_config = GenerationConfig(
        eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.tokenizer.pad_token_id
    )
    try:
        trainer = Trainer(
            model=model,
            reward_funcs=cast("Callable[..., list[float | None]]", scored),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=policy.tokenizer,
            callbacks=[watch],
        )
    except Exception as error:  # its own checks, and those of libraries that it needs
        raise TrainingError(
            f"recipe {recipe.name!r}: the trainer of TRL {version('trl')} refuses it "
            f"({one_line(error)}): fix it, or install what it needs"
        ) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _go(trainer: Trainer, model: PreTrainedModel, notice: Callable[[str], None] | None) -> None:
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
        with warnings.catch_warnings(), _guarded():
            # TRL uses a name that is deprecated in transformers.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
    except Exception as error:  # torch, json and safetensors raise various errors
        if folder is None or trainer.begun:
            raise
        raise TrainingError(
            f"{folder} cannot be read ({one_line(error)}): remove it, and the same command "
            "continues from the one before"
        ) from error
    model.config.use_cache = caches


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
    policy: Policy,
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    problems: Sequence[Problem],
    rows: Sequence[Row],
) -> str:
    """Write the trained policy, its problems and its curves; return its fingerprint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with quiet():
        model.save_pretrained(folder, state_dict=dict(weights))
        policy.tokenizer.save_pretrained(folder)
    ids = "".join(f"{problem.id}\n" for problem in problems)
    (folder / TRAINED_ON).write_text(ids, encoding="utf-8")
    write_curves(rows, folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only the owner may read
    # Loading it shows that the checkpoint is complete.
    return str(load(str(folder)).fingerprint)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "trl", "datasets")}
