"""The keys of a recipe: which there are, by what names, and what each may be.

TRL drops a key that it does not know without a word, and checks many values only in the first step.
Here both are errors, with the right name or what the value must be.
"""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Collection, Mapping
from enum import Enum
from importlib.metadata import version
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Meta
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.model_config import ModelConfig

from grpo_harness.errors import HarnessError
from grpo_harness.gate.inputs import brief
from grpo_harness.text import escape

_CLASSES = (GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig)
_FIELDS = {f.name: f for of in _CLASSES for f in dataclasses.fields(of) if f.init}


class RecipeError(HarnessError, ValueError):
    """A recipe cannot be used. One line: the recipe or its file, the key and what it may be."""


_Count = Annotated[
    int, Meta(ge=0, le=1_000_000, description="a number of generated problems, up to 1000000")
]


class Block(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The block ``grpo_harness`` of a recipe's file: what TRL has no word for.

    ``n_math`` and ``n_prog`` are numbers of generated problems, for a recipe without a data set;
    they are scored by the rule reward where ``reward_funcs`` names none.
    """

    trainer: Annotated[
        str | None, Meta(description="a subclass of GRPOTrainer as module:Class")
    ] = None
    n_math: _Count = 0
    n_prog: _Count = 0
    problem_seed: Annotated[int, Meta(description="a seed")] = 0
    max_prompt_length: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="a number of tokens from 1 on")
    ] = None


BLOCK = "grpo_harness"
"""The key of the block."""

OF_THE_BLOCK = frozenset(Block.__struct_fields__)
"""The keys of the block, none of which TRL has too."""

_REFUSED = {
    "trust_remote_code": "code in a checkpoint is never run",
    "resume_from_checkpoint": "a run continues from its own last checkpoint by itself",
    "push_to_hub": "push the finished folder, when its log and its policy have been judged",
    "dataset_streaming": "a run is repeated to the digit, which a stream is not",
    "streaming": "a run is repeated to the digit, which a stream is not",
    "load_in_8bit": "quantized weights are not supported",
    "load_in_4bit": "quantized weights are not supported",
    "load_best_model_at_end": "a run keeps the policy of its last step",
    "logging_nan_inf_filter": "a figure that is not finite ends the run",
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip"), "a resumed run is the same as an uninterrupted one"
    ),
}
"""Keys of TRL's that a run here cannot have, and why."""

_RIGHT_NAMES = {
    alias: name
    for name, aliases in {
        "epsilon": "clip_range clip_eps cliprange clip_epsilon clip_ratio eps_clip",
        "beta": "kl_coef kl_beta init_kl_coef kl_penalty",
        "num_generations": "group_size num_return_sequences num_samples rollout_n",
        "max_completion_length": "max_new_tokens max_tokens max_response_length response_length",
        "learning_rate": "lr",
        "lr_scheduler_type": "lr_scheduler",
        "scale_rewards": "scale_advantages",
        "per_device_train_batch_size": "batch_size train_batch_size per_device_batch_size",
        "max_steps": "total_steps num_steps steps",
        "model_name_or_path": "policy",
        "warmup_steps (below 1 it is a share)": "warmup_ratio",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "shuffle_dataset": "shuffle shuffle_problems random_order",
        "fp16 or bf16": "half_precision_backend fp16_backend",
        "nothing, it follows the device": "no_cuda use_mps_device n_gpu",
        "nothing, a folder that exists is never written over": "overwrite_output_dir",
        "nothing, weights are always saved as safetensors": "save_safetensors",
        "nothing, what was logged lies beside the weights": "logging_dir",
    }.items()
    for alias in aliases.split()
}
"""Names of these settings in other libraries and in the tutorial, with the right names."""

_From0 = Annotated[int, Meta(ge=0, description="a whole number from 0 on")]
_From1 = Annotated[int, Meta(ge=1, description="a whole number from 1 on")]
_From2 = Annotated[int, Meta(ge=2, description="a whole number from 2 on")]
_Finite = Annotated[
    float, Meta(ge=0, le=sys.float_info.max, description="a finite number from 0 on")
]
_Positive = Annotated[
    float, Meta(gt=0, le=sys.float_info.max, description="a finite number above 0")
]
_Share = Annotated[float, Meta(gt=0, le=1, description="a number above 0 and up to 1")]
_Part = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
_Seed = Annotated[int, Meta(ge=0, lt=2**32, description="a whole number from 0 on, below 2**32")]
_Mixture = Annotated[
    list[DatasetConfig],
    Meta(
        description="a list of mappings, each with the path of a data set and, if needed, its "
        "name, data_dir, data_files, split, columns or fraction"
    ),
]

_RANGES: Mapping[str, Any] = {
    "num_generations": _From2,
    "max_completion_length": _From1 | None,
    "steps_per_generation": _From1 | None,
    "temperature": _Positive,
    "top_p": _Share,
    "min_p": _Part | None,
    "epsilon_high": _Finite | None,
    "delta": _Positive | None,
    "data_seed": _Seed | None,
    "seed": _Seed,
    "datasets": _Mixture,
    **dict.fromkeys(
        ("gradient_accumulation_steps", "num_iterations", "per_device_train_batch_size"), _From1
    ),
    **dict.fromkeys(("save_steps", "top_k", "dataloader_num_workers"), _From0),
    **dict.fromkeys(("repetition_penalty", "logging_steps", "num_train_epochs"), _Positive),
    **dict.fromkeys(("learning_rate", "epsilon", "beta", "max_grad_norm", "weight_decay"), _Finite),
    # Declared as less than what TRL takes.
    "lora_target_modules": list[str] | str | None,
    "scale_rewards": str | bool,
}
"""The values with which a run can be made, where TRL declares more."""

_WORDS = (
    *("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation"),
    *("vllm_mode", "vllm_importance_sampling_mode"),
)
"""Keys whose values are words, which TRL lists in the help of the field."""


def _kinds() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for of in _CLASSES:
        for name, hint in get_type_hints(of).items():
            enums = (k for k in get_args(hint) if isinstance(k, type) and issubclass(k, Enum))
            found[name] = next(enums, hint)
    return {**found, **{name: kind for name, kind in _RANGES.items() if name in found}}


_KINDS = _kinds()


def check_keys(where: str, values: Mapping[str, Any]) -> None:
    """Raise ``RecipeError`` for a key that TRL does not have, or a value that no run is made of."""
    for key, value in values.items():
        if key not in _FIELDS:
            raise RecipeError(
                f"{where}: TRL {version('trl')} has no {escape(repr(key), 80)}, which it would "
                f"drop without a word: use {right_name(str(key))}"
            )
        if key in _REFUSED and value not in (None, False, "no", []):
            raise refused(where, key, "cannot be set here", key)
        if not _is_finite(value):
            raise RecipeError(f"{where}: {key} is {escape(brief(value), 80)}: it must be finite")
        if why := _unlike(key, value):
            raise RecipeError(f"{where}: {key} is {escape(brief(value), 80)}: it must be {why}")


def refused(where: str, key: str, what: str, reason: str) -> RecipeError:
    """Return the error of a key that a run here cannot have."""
    return RecipeError(f"{where}: {key} {what}: {_REFUSED[reason]}")


def right_name(key: str) -> str:
    """Return the name that a wrong key should have, or else what it should be one of."""
    if key in OF_THE_BLOCK:
        return f"{key} in the block {BLOCK}"
    if key in _RIGHT_NAMES:
        return _RIGHT_NAMES[key]
    known: Collection[str] = sorted({*_FIELDS, BLOCK, "env"})
    close = difflib.get_close_matches(key, known, 1, cutoff=0.75)
    return close[0] if close else "a field of GRPOConfig, ModelConfig or the script's arguments"


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _unlike(key: str, value: Any) -> str:
    """Return what the value of a key must be, if it is something else, or an empty text."""
    kind = _KINDS[key]
    words = _words(key) if key in _WORDS and isinstance(value, str) else []
    if words and value not in words:
        return f"one of {', '.join(words)}"
    if isinstance(value, str) and bool in (kind, *get_args(kind)):  # such as yes, which TRL reads
        return ""
    try:
        msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        if isinstance(kind, type) and issubclass(kind, Enum):
            known = f"one of {', '.join(str(member.value) for member in kind)}"
            # YAML reads no and yes, without quotes, as false and true.
            return f"{known}, in quotes" if isinstance(value, bool) else known
        for each in (kind, *get_args(kind)):
            for meta in getattr(each, "__metadata__", ()):
                return str(meta.description)
        return f"of the type {kind.__name__ if isinstance(kind, type) else kind}"
    except TypeError:  # a declaration that msgspec does not know
        pass
    return ""


def _words(key: str) -> list[str]:
    """Return the quoted words in the help of a field: its values, and a few other names."""
    quoted = re.findall(r"[`'\"]+([a-z_]+)[`'\"]+", _FIELDS[key].metadata.get("help", ""))
    return [word for word in dict.fromkeys(quoted) if word not in _FIELDS]
