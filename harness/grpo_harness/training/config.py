"""A recipe becomes one exact ``GRPOConfig`` of the installed TRL.

A key that the installed TRL does not have is an error, never dropped. Settings whose default in TRL
has changed before are pinned.
"""

import dataclasses
import difflib
import json
import math
import os
import textwrap
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from trl.trainer.grpo_config import GRPOConfig

from grpo_harness.text import one_line
from grpo_harness.training.recipes import Recipe

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
"""Fields of a recipe that have the same name in GRPOConfig."""

_FIELDS = {field.name: field for field in dataclasses.fields(GRPOConfig) if field.init}

# The newer name if the installed transformers has it, because the older one warns there.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS
)
"""The field that turns gradient checkpointing on."""

_BY_FIELD = {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "prompts_per_step (times num_generations, over all processes)",
    "generation_batch_size": "prompts_per_step (times num_generations, over all processes)",
    "data_seed": "seed",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "save_total_limit": "save_steps",
}
"""Fields of GRPOConfig that a recipe names differently."""

_ELSEWHERE = {
    "output_dir": "it is the folder that the run writes",
    "resume_from_checkpoint": "a run continues from its own last checkpoint by itself",
    "use_cpu": "it follows the device",
    "logging_nan_inf_filter": "a figure that is not finite ends the run",
    "logging_strategy": "a run is judged by what it logs",
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip"), "a resumed run is the same as an uninterrupted one"
    ),
}
"""Fields that a run sets by itself, and why."""

_LEAST = {
    "num_iterations": 1,
    "steps_per_generation": 1,
    "logging_steps": 1,
    **dict.fromkeys(("epsilon_high", "max_grad_norm", "weight_decay", "warmup_steps"), 0),
}
"""The least value of fields for which TRL accepts any value."""

_RIGHT_NAMES = {
    alias: name
    for name, aliases in {
        "epsilon": "clip_range clip_eps cliprange clip_epsilon clip_ratio eps_clip",
        "beta": "kl_coef kl_beta init_kl_coef kl_penalty",
        "num_generations": "group_size num_return_sequences num_samples rollout_n",
        "max_completion_length": "max_new_tokens max_tokens max_response_length response_length",
        "max_prompt_length of the recipe (TRL does not check it)": "max_prompt_length",
        "learning_rate": "lr",
        "lr_scheduler_type": "lr_scheduler",
        "scale_rewards": "scale_advantages",
        "prompts_per_step of the recipe": "batch_size train_batch_size per_device_batch_size",
        "steps of the recipe": "total_steps num_steps",
        "warmup_steps (below 1 it is a share)": "warmup_ratio",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "fp16 or bf16": "half_precision_backend fp16_backend",
        "nothing, it follows the device": "no_cuda use_mps_device n_gpu",
        "nothing, a folder that exists is never written over": "overwrite_output_dir",
        "nothing, weights are always saved as safetensors": "save_safetensors",
        "nothing, what was logged lies beside the weights": "logging_dir",
    }.items()
    for alias in aliases.split()
}
"""Names of these settings in other libraries and in the tutorial, with the right names."""


def processes_here() -> int:
    """Return how many processes train together, as torch's or accelerate's launcher has set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_per_process(recipe: Recipe, processes: int = 1) -> int:
    """Return the number of completions of one micro-batch of one process.

    The batch of a recipe is that of all processes together. Raises ``ValueError`` when it cannot be
    shared equally.
    """
    completions = recipe.prompts_per_step * recipe.num_generations
    parts = recipe.gradient_accumulation_steps * processes
    if completions % parts:
        shared = f" among {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"recipe {recipe.name!r}: {completions} completions a step (prompts_per_step × "
            f"num_generations) cannot be split{shared} into "
            f"{recipe.gradient_accumulation_steps} equal parts (gradient_accumulation_steps)"
        )
    return completions // parts


def resolve(recipe: Recipe, out: Path, *, device: str = "auto") -> GRPOConfig:
    """Return the ``GRPOConfig`` of ``recipe`` on ``device`` (auto, cpu or cuda).

    ``recipe.config`` overrides what is pinned here. Raises ``ValueError`` for a key that the
    installed ``GRPOConfig`` does not have, with the right name if it is known, for a key that the
    recipe has a field for, for a value that it does not accept, and for a batch that cannot be
    divided into groups or among the processes.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    bf16 = cuda and torch.cuda.is_bf16_supported()
    own = {name: getattr(recipe, name) for name in _SHARED}
    pinned = {
        "output_dir": str(out),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": batch_per_process(recipe, processes_here()),
        "steps_per_generation": recipe.gradient_accumulation_steps,
        "num_iterations": 1,
        # Left unset, these three would come from the model's own generation config.
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "mask_truncated_completions": False,
        "importance_sampling_level": "token",
        "use_bias_correction_kl": True,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "data_seed": recipe.seed,
        # The weights stay in fp32: in half precision, updates at such rates are rounded away.
        "bf16": bf16,
        "fp16": cuda and not bf16,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        CHECKPOINTING: cuda,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": "none",
        # The run saves by itself, at the end of a generation batch; the last two are kept.
        "save_strategy": "no",
        "save_total_limit": 2,
    }
    _check_names(recipe, own)
    resolved = {**pinned, **own, **recipe.config}
    for key in sorted(resolved.keys() - _FIELDS.keys()):
        raise ValueError(_no_such(recipe, key))
    steps = resolved["steps_per_generation"] or recipe.gradient_accumulation_steps
    drawn = resolved["per_device_train_batch_size"] * processes_here() * steps
    if drawn % recipe.num_generations:
        raise ValueError(
            f"recipe {recipe.name!r}: {drawn} completions drawn at once do not divide into groups "
            f"of num_generations = {recipe.num_generations}"
        )
    if resolved["logging_steps"] > recipe.steps:
        raise ValueError(
            f"recipe {recipe.name!r}: logging_steps is {resolved['logging_steps']}, and of "
            f"{recipe.steps} steps none would be logged: lower it"
        )
    try:
        return GRPOConfig(**resolved)
    except Exception as error:  # its own checks, and those of libraries that it needs
        raise ValueError(
            f"recipe {recipe.name!r}: GRPOConfig of TRL {version('trl')} refuses it "
            f"({one_line(error)}): fix that field"
        ) from error


def _check_names(recipe: Recipe, own: Mapping[str, Any]) -> None:
    for key in sorted(recipe.config):
        where = f"recipe {recipe.name!r} sets {key!r} in config"
        if key in own:
            raise ValueError(f"{where}, and has a field of that name: set the field")
        if key in _BY_FIELD:
            raise ValueError(f"{where}: a recipe calls it {_BY_FIELD[key]}: set that field")
        if key in _ELSEWHERE:
            raise ValueError(f"{where}, which is not the recipe's to set: {_ELSEWHERE[key]}")
        value, least = recipe.config[key], _LEAST.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} to {value}: it must be finite")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if least is not None and value is not None and not (number and value >= least):
            raise ValueError(f"{where} to {value!r}: it must be a number from {least} on")


def right_name(key: str, fields: Collection[str]) -> str:
    """Return the name that a wrong key should have, or else what it should be one of."""
    known = _RIGHT_NAMES.get(key)
    if key == "max_prompt_length":
        return "max_prompt_length in the block grpo_harness"
    if known == "prompts_per_step of the recipe":
        return "per_device_train_batch_size"
    if known is not None and not known.endswith("of the recipe"):
        return known
    close = difflib.get_close_matches(key, fields, 1, cutoff=0.75)
    return close[0] if close else "a field of GRPOConfig, ModelConfig or the script's arguments"


def _no_such(recipe: Recipe, key: str) -> str:
    close = difflib.get_close_matches(key, [*_FIELDS, *_BY_FIELD], 1, cutoff=0.8)
    likely = [f"{_BY_FIELD[name]} of the recipe" if name in _BY_FIELD else name for name in close]
    better = _RIGHT_NAMES.get(key) or (likely[0] if likely else "a field of GRPOConfig")
    lacks = f"recipe {recipe.name!r}: GRPOConfig of TRL {version('trl')} has no {key!r}"
    if key in recipe.config:
        return f"{lacks}: use {better}"
    return f"{lacks}, which every run needs: install a TRL that has it (see pyproject.toml)"


def checkpointing(config: GRPOConfig) -> bool:
    """Tell whether activations are recomputed in the backward pass instead of kept."""
    return bool(getattr(config, CHECKPOINTING))


def described(config: GRPOConfig) -> str:
    """Format a resolved config: first the values that are not TRL's defaults, then the rest."""
    device = {key: getattr(config, key) for key in ("bf16", "fp16", "use_cpu", CHECKPOINTING)}
    defaults = settings(GRPOConfig(output_dir=str(config.output_dir), **device))
    values = sorted(settings(config).items())
    chosen = [
        f"  {key} = {value}   (TRL: {defaults.get(key)})"
        for key, value in values
        if value != defaults.get(key)
    ]
    left = ", ".join(f"{key}={value}" for key, value in values if value == defaults.get(key))
    rest = textwrap.fill(
        f"as TRL has it: {left}", 100, initial_indent="  ", subsequent_indent="  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([*chosen, rest])


def settings(config: GRPOConfig) -> dict[str, Any]:
    """Return a config as plain JSON values, without the folders it writes to."""
    values: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call, unused-ignore]
    for local in ("output_dir", "run_name", "logging_dir"):
        values.pop(local, None)
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
