"""A recipe becomes TRL's GRPOTrainer, and that a trained policy on disk.

A :class:`~harness.recipes.Recipe` is the whole of a run. It resolves to one exact ``GRPOConfig``:
a key that the installed TRL does not have is an error, never dropped, and what TRL would take
from a default that has changed before is pinned. The rule reward is the only signal.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import difflib
import json
import math
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from harness.checkpoint import TRAINED_ON
from harness.errors import HarnessError
from harness.evaluation import RewardFunction
from harness.policy import Policy, load, quiet
from harness.recipes import RECIPES, Recipe
from harness.reward import reward_func
from harness.tasks import Problem, make_problems

Row = Mapping[str, float]
"""What the trainer logs of one step: ``step``, ``loss``, ``reward``, ``grad_norm`` and so on."""

Progress = Callable[[Row], None]


class TrainingError(HarnessError):
    """A run that cannot go on: one line with the step, the figure and what it means."""


_SHARED = (
    "num_generations",
    "max_completion_length",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "scale_rewards",
    "epsilon",
    "beta",
    "loss_type",
    "temperature",
    "top_p",
    "seed",
)
"""Fields of a recipe that are GRPOConfig's as they stand."""

_FIELDS = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}

# The newer name where the installed transformers has it: the older one warns there.
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS
)

_RIGHT_NAMES = {
    "clip_range": "epsilon",
    "clip_eps": "epsilon",
    "cliprange": "epsilon",
    "kl_coef": "beta",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "max_prompt_length": "max_prompt_length of the recipe (the harness checks it, TRL does not)",
}


def resolve(recipe: Recipe, out: Path, *, device: str = "auto") -> GRPOConfig:
    """Return the one ``GRPOConfig`` that ``recipe`` means on ``device`` (auto, cpu or cuda).

    What ``recipe.config`` sets comes before what is pinned here. Raises ``ValueError`` for a key
    that the installed ``GRPOConfig`` does not have, with the right one where it is known, for
    one that the recipe has a field for, and for a batch that does not divide into groups.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    bf16 = cuda and torch.cuda.is_bf16_supported()
    completions = recipe.prompts_per_step * recipe.num_generations
    batch, rest = divmod(completions, max(1, recipe.gradient_accumulation_steps))
    if rest or batch == 0:
        raise ValueError(
            f"recipe {recipe.name!r}: {completions} completions a step (prompts_per_step × "
            f"num_generations) cannot be split into {recipe.gradient_accumulation_steps} equal "
            "parts (gradient_accumulation_steps)"
        )
    own = {name: getattr(recipe, name) for name in _SHARED}
    pinned = {
        "output_dir": str(out),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": batch,
        "steps_per_generation": recipe.gradient_accumulation_steps,
        "num_iterations": 1,
        # Left unset, these three would come from the model's own generation config.
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "mask_truncated_completions": False,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "data_seed": recipe.seed,
        # The weights stay in fp32: in half precision the steps of such rates are rounded away.
        "bf16": bf16,
        "fp16": cuda and not bf16,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        _CHECKPOINTING: cuda,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    for key in sorted(own.keys() & recipe.config.keys()):
        raise ValueError(
            f"recipe {recipe.name!r} sets {key!r} in config, and has a field of that name: set "
            "the field"
        )
    resolved = {**pinned, **own, **recipe.config}
    _check_keys(recipe, resolved)
    drawn = resolved["per_device_train_batch_size"] * recipe.gradient_accumulation_steps
    if recipe.num_generations < 2 or drawn % recipe.num_generations:
        raise ValueError(
            f"recipe {recipe.name!r}: {drawn} completions a step do not divide into groups of "
            f"num_generations = {recipe.num_generations} (at least 2)"
        )
    return GRPOConfig(**resolved)


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A finished run: the folder it left, what was logged of every step, and the trained model.

    ``weights_moved`` is the share of elements that changed, of the tensor where it is least.
    """

    path: Path
    log: tuple[Row, ...]
    weights_moved: float
    model: PreTrainedModel


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    reward: RewardFunction = reward_func,
    progress: Progress | None = None,
) -> TrainingRun:
    """Train ``recipe.policy`` by ``recipe`` on ``reward``, and leave the result in ``out``.

    The folder holds the checkpoint in safetensors with its tokenizer, ``recipe.json`` (recipe,
    resolved config, versions), ``problems.txt`` (the ids of what it was trained on, which no
    evaluation of it may ask), ``curves.csv``, ``log.json`` and ``curves.png``. It appears when it
    is complete and not before. Raises ``FileExistsError`` when ``out`` exists, ``ValueError``
    for a recipe that cannot be resolved or a prompt that is too long, ``PolicyError`` for a
    policy that cannot be loaded, ``TrainingError`` when a figure is not finite; what the reward
    raises passes through.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: name another folder, or remove it")
    config = resolve(recipe, out, device=device)
    policy = load(recipe.policy, device=device, dtype="float32")
    if recipe.beta and policy.checkpoint.gguf_file:
        raise ValueError(
            f"recipe {recipe.name!r}: beta above 0 needs a reference model, which TRL loads from "
            f"safetensors, and {policy.name!r} is a GGUF file: save it with save_pretrained first"
        )
    problems = _problems(recipe)
    prompts = _prompts(recipe, policy, problems)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        config.output_dir = str(unfinished)
        run = _train(policy, config, prompts, reward, progress)
        _save(unfinished, recipe, config, policy, run)
        ids = "".join(f"{problem.id}\n" for problem in problems)
        (unfinished / TRAINED_ON).write_text(ids, encoding="utf-8")
        # mkdtemp and safetensors leave what only the owner may read.
        for path in (unfinished, *unfinished.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return dataclasses.replace(run, path=out)


class _Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Passes every logged step on, and ends the run at the first figure that is not finite."""

    def __init__(self, progress: Progress | None) -> None:
        self.rows: list[Row] = []
        self._progress = progress

    def on_log(  # the arguments are the base class's
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        row = {"step": state.global_step, **logs}
        for name in ("loss", "grad_norm", "reward"):
            # The trainer logs None for a number that JSON does not have.
            value = row.get(name)
            if value is None or not math.isfinite(value):
                raise TrainingError(
                    f"step {row['step']}: {name} is {value}; nothing was saved. Lower the "
                    "learning rate, or look for the reward that is not a number"
                )
        self.rows.append(row)
        if self._progress is not None:
            self._progress(row)


def _problems(recipe: Recipe) -> list[Problem]:
    problems = make_problems(recipe.n_math, recipe.n_prog, recipe.problem_seed)
    if len(problems) < recipe.prompts_per_step:
        raise ValueError(
            f"recipe {recipe.name!r} has {len(problems)} problems and asks "
            f"{recipe.prompts_per_step} a step: raise n_math or n_prog"
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
    # those that the tokenizer adds by itself: a beginning must not stand there twice.
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


def _train(
    policy: Policy,
    config: GRPOConfig,
    prompts: Sequence[str],
    reward: RewardFunction,
    progress: Progress | None,
) -> TrainingRun:
    model = policy.model.requires_grad_(True)
    # What ends an answer is all that the checkpoint's generation config may still say.
    model.generation_config = GenerationConfig(
        eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.tokenizer.pad_token_id
    )
    model.config.use_cache = not getattr(config, _CHECKPOINTING)
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    watch = _Watch(progress)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=cast("Callable[..., list[float | None]]", reward),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=policy.tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        # TRL asks the model by a name that transformers calls deprecated: not the user's doing.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        trainer.train()
    model.config.use_cache = True
    moved = min(
        float((p.detach().cpu() != before[name]).float().mean())
        for name, p in model.named_parameters()
    )
    return TrainingRun(Path(str(config.output_dir)), tuple(watch.rows), moved, model)


def _save(
    folder: Path, recipe: Recipe, config: GRPOConfig, policy: Policy, run: TrainingRun
) -> None:
    with quiet():
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call, unused-ignore]
    for local in ("output_dir", "run_name"):
        settings.pop(local, None)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "config": settings,
        "base": {"name": policy.name, "fingerprint": str(policy.fingerprint)},
        "weights_moved": run.weights_moved,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "datasets")},
        },
    }
    _write_json(folder / "recipe.json", record)
    _write_json(folder / "log.json", run.log)
    columns = list(dict.fromkeys(name for row in run.log for name in row))
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(run.log)
    draw_curves(run.log, folder / "curves.png")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw reward, length, entropy and gradient norm over the steps into a PNG file."""
    # Figure instead of pyplot: no display is looked for and no global state is left.
    from matplotlib.figure import Figure

    shown = {
        "reward": "mean reward",
        "completions/mean_length": "mean length (tokens)",
        "entropy": "entropy (nats a token)",
        "grad_norm": "gradient norm",
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, shown.items(), strict=True):
        axes.plot([row["step"] for row in rows], [row.get(name, math.nan) for row in rows])
        axes.set(title=title, xlabel="step")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _check_keys(recipe: Recipe, keys: Mapping[str, Any]) -> None:
    for key in sorted(keys.keys() - _FIELDS):
        close = difflib.get_close_matches(key, _FIELDS, 1)
        better = _RIGHT_NAMES.get(key) or (close[0] if close else "a field of GRPOConfig")
        raise ValueError(
            f"recipe {recipe.name!r}: GRPOConfig of TRL {version('trl')} has no {key!r}: "
            f"use {better}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, ``train RECIPE --out DIR``. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="grpo-harness")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train a policy with GRPO and the rule reward")
    command.add_argument("recipe", help=f"one of {', '.join(RECIPES)}")
    command.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--policy", help="start from this policy instead of the recipe's")
    command.add_argument("--steps", type=int, help="make so many steps instead of the recipe's")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    try:
        run = train(_chosen(arguments), arguments.out, device=arguments.device, progress=_show)
    except (ValueError, OSError, HarnessError) as error:
        sys.stderr.write(f"grpo-harness train: {error}\n")
        return 2
    sys.stdout.write(
        f"{run.path}: {len(run.log)} steps, at least {run.weights_moved:.0%} of the elements of "
        "every tensor moved\n"
    )
    return 0


def _chosen(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe not in RECIPES:
        raise ValueError(f"no recipe {arguments.recipe!r}: there are {', '.join(RECIPES)}")
    changes = {
        name: value
        for name in ("policy", "steps")
        if (value := getattr(arguments, name)) is not None
    }
    return dataclasses.replace(RECIPES[arguments.recipe], **changes)


def _show(row: Row) -> None:
    sys.stdout.write(
        f"step {row['step']:>4}  reward {row['reward']:+.3f}  "
        f"length {row.get('completions/mean_length', math.nan):5.1f}  "
        f"entropy {row.get('entropy', math.nan):.3f}  gradient {row['grad_norm']:.3f}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
