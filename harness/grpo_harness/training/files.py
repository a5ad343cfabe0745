"""A recipe in a file: the YAML that ``trl grpo --config`` takes, and one block of our own.

TRL drops a key that it does not know without a word. Here it is an error, with the right name.
"""

import dataclasses
import importlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import torch
import yaml
from msgspec import Meta
from trl.scripts.grpo import GRPOScriptArguments, make_parser
from trl.scripts.utils import DatasetMixtureConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.model_config import ModelConfig

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.gate.inputs import brief
from grpo_harness.rewards.functions import RewardFunction, load_reward
from grpo_harness.tables import converted
from grpo_harness.text import escape, one_line
from grpo_harness.training.config import CHECKPOINTING, resolve, right_name
from grpo_harness.training.recipes import Recipe

BLOCK = "grpo_harness"
"""The key of the block with what TRL has no word for."""

_CLASSES = (GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig)
_FIELDS = frozenset(f.name for of in _CLASSES for f in dataclasses.fields(of) if f.init)
_MOST_BYTES = 1 << 20
_SMOKE_COMPLETIONS, _SMOKE_TOKENS = 64, 32

_REFUSED = {
    "trust_remote_code": "code in a checkpoint is never run",
    "resume_from_checkpoint": "a run continues from its own last checkpoint by itself",
    "push_to_hub": "push the finished folder, when its log and its policy have been judged",
    "datasets": "name one data set, or module:function of a function that mixes several",
    "dataset_streaming": "a run is repeated to the digit, which a stream is not",
    "load_in_8bit": "quantized weights are not supported",
    "load_in_4bit": "quantized weights are not supported",
    "eval_strategy": "the trained policy is evaluated by the suites",
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip"), "a resumed run is the same as an uninterrupted one"
    ),
}
"""Keys of TRL's that a run here cannot have, and why."""

_OF_TRL = {
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}
"""Names of rewards that TRL's command knows."""


def _kinds() -> Mapping[str, Any]:
    """Return what each key may be: as TRL declares it, or the narrower range that can be trained.

    TRL itself checks only what is a text in the file.
    """
    found: dict[str, Any] = {}
    for of in _CLASSES:
        for name, hint in get_type_hints(of).items():
            enums = (k for k in get_args(hint) if isinstance(k, type) and issubclass(k, Enum))
            found[name] = next(enums, hint)
    ranges = get_type_hints(Recipe, include_extras=True)
    found |= {name: ranges[name] for name in found.keys() & ranges.keys() & _RANGED}
    from_1, from_0 = ranges["gradient_accumulation_steps"], ranges["epsilon"]
    found |= dict.fromkeys(
        ("num_iterations", "steps_per_generation", "per_device_train_batch_size"), from_1
    )
    found |= dict.fromkeys(("epsilon_high", "max_grad_norm", "weight_decay"), from_0)
    optional = ("steps_per_generation", "epsilon_high", "max_completion_length")
    found |= {name: found[name] | None for name in optional}
    # Declared as less than what TRL takes.
    found |= {"lora_target_modules": list[str] | str | None, "scale_rewards": str | bool}
    return found


_RANGED = {
    "num_generations", "max_completion_length", "gradient_accumulation_steps", "learning_rate",
    "epsilon", "beta", "temperature", "top_p", "seed", "save_steps",
}  # fmt: skip
"""Keys that a built-in recipe has too, whose ranges are the same."""

_KINDS = _kinds()


class RecipeError(HarnessError, ValueError):
    """A recipe cannot be used. One line: the recipe or its file, the key and what it may be."""


class Block(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The block ``grpo_harness`` of a recipe's file.

    ``n_math`` and ``n_prog`` are numbers of generated problems, for a recipe without
    ``dataset_name``; they are scored by the rule reward where ``reward_funcs`` names none.
    """

    trainer: Annotated[
        str | None, Meta(description="a subclass of GRPOTrainer as module:Class")
    ] = None
    n_math: Annotated[int, Meta(ge=0, description="a number of generated problems")] = 0
    n_prog: Annotated[int, Meta(ge=0, description="a number of generated problems")] = 0
    problem_seed: Annotated[int, Meta(description="a seed")] = 0
    max_prompt_length: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="a number of tokens from 1 on")
    ] = None


@dataclass(frozen=True)
class RecipeFile:
    """The recipe in a file; ``values`` are TRL's keys, overrides included.

    Raises ``RecipeError``.
    """

    path: Path
    values: Mapping[str, Any]
    block: Block

    @property
    def name(self) -> str:
        """The file's name, by which the recipe's records are found."""
        return self.path.stem

    @property
    def policy(self) -> str:
        """The policy that training starts from."""
        name, revision = self.values["model_name_or_path"], self.values.get("model_revision")
        return f"{name}@{revision}" if revision and revision != "main" else str(name)

    @cached_property
    def parsed(self) -> tuple[Any, Any, Any]:
        """The script's arguments, the ``GRPOConfig`` and the ``ModelConfig``, as TRL reads them."""
        return self._parsed({})

    def config(self, out: Path, *, device: str = "auto") -> GRPOConfig:
        """Return the exact ``GRPOConfig`` of a run into ``out`` on ``device``."""
        cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        ours: dict[str, Any] = {
            "output_dir": str(out),
            "report_to": self.values.get("report_to", "none"),
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": not cuda,
        }
        if not cuda:
            ours |= {"bf16": False, "fp16": False, CHECKPOINTING: False}
            ours["dataloader_pin_memory"] = False
        found: GRPOConfig = self._parsed(ours)[1]
        return found

    def beside(self) -> dict[str, Any]:
        """Return what the file says beside the config: data, rewards, model, adapter, block."""
        script, _, model = self.parsed
        said = {**asdict(script), **asdict(model), **msgspec.structs.asdict(self.block)}
        plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
        return plain

    def small(self, policy: str) -> "RecipeFile":
        """Return this recipe for a smoke run from ``policy``: few steps, short completions.

        Everything that a step computes with stays: groups, accumulation, iterations, rewards and
        weights, loss, schedule, optimizer. A batch of more than 64 completions becomes the smallest
        one that its groups allow.
        """
        config = self.parsed[1]
        window, groups = config.steps_per_generation, config.num_generations
        batch = config.per_device_train_batch_size
        if batch * window > _SMOKE_COMPLETIONS:
            batch = groups // math.gcd(groups, window)
        steps = math.ceil(window * config.num_iterations / config.gradient_accumulation_steps)
        changes = {
            "model_name_or_path": policy,
            "max_steps": min(max(3, 2 * steps), 8),
            "max_completion_length": min(config.max_completion_length, _SMOKE_TOKENS),
            "per_device_train_batch_size": batch,
            "steps_per_generation": window,
            "logging_steps": 1,
        }
        left = {"model_revision", "generation_batch_size", "use_vllm"}
        values = {key: value for key, value in self.values.items() if key not in left}
        return replace(self, values={**values, **changes})

    def rewards(self) -> list[RewardFunction | str]:
        """Load the rewards that ``reward_funcs`` names; a name of a model stays a name."""
        script = self.parsed[0]
        found: list[RewardFunction | str] = []
        if script.reward_model_name_or_path:
            found.append(script.reward_model_name_or_path)
        for name in script.reward_funcs or []:
            if name == "get_soft_overlong_punishment":
                from trl.rewards.other_rewards import get_soft_overlong_punishment

                # The values that TRL's command uses.
                found.append(get_soft_overlong_punishment(1280, 256))
                continue
            try:
                found.append(load_reward(_OF_TRL.get(name, name)))
            except HarnessError as error:
                raise RecipeError(f"{self.path}: reward_funcs: {error}") from error
        return found

    def trainer(self, base: type) -> type:
        """Return the trainer's class: ``base``, or the class that the block names."""
        if self.block.trainer is None:
            return base
        module, _, name = self.block.trainer.partition(":")
        with user_code(
            lambda error: RecipeError(
                f"{self.path}: {BLOCK}.trainer '{escape(self.block.trainer or '')}' is not the "
                f"module:Class of a trainer that can be imported ({one_line(error)})"
            )
        ):
            found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise RecipeError(
                f"{self.path}: {BLOCK}.trainer '{escape(self.block.trainer)}' is no subclass of "
                f"{base.__name__}"
            )
        return found

    def _parsed(self, ours: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        values = {"output_dir": "unused", "use_cpu": True, "bf16": False, **self.values, **ours}
        parser = make_parser()

        def refuse(message: str) -> None:
            raise RecipeError(message)

        parser.error = refuse
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(yaml.safe_dump(values), encoding="utf-8")
            try:
                with warnings.catch_warnings():
                    # TRL's own default has a name that is deprecated in transformers.
                    warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
                    script, config, model, _ = parser.parse_args_and_config(["--config", str(file)])
            except Exception as error:  # its own checks, and those of libraries that it needs
                raise RecipeError(
                    f"{self.path}: TRL {version('trl')} refuses it ({one_line(error)}): fix that "
                    "key"
                ) from error
        return script, config, model


def resolved(
    recipe: Recipe | RecipeFile, out: Path = Path("out"), *, device: str = "auto"
) -> GRPOConfig:
    """Return the exact ``GRPOConfig`` of a recipe, built in or in a file."""
    if isinstance(recipe, RecipeFile):
        return recipe.config(out, device=device)
    return resolve(recipe, out, device=device)


def load(path: Path, changes: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> RecipeFile:
    """Read a recipe's file; ``changes`` are values that replace those of the file.

    As TRL does, it puts the working folder on Python's path and sets the variables of ``env``.
    Raises ``RecipeError`` and ``SettingsError``.
    """
    content = {**_content(path), **dict(changes)}
    given = content.pop(BLOCK, {})
    if not isinstance(given, Mapping):
        raise RecipeError(f"{path}: {BLOCK} is {escape(repr(given), 60)}: it must be a mapping")
    if not all(isinstance(key, str) for key in given):
        raise RecipeError(f"{path}: a key of {BLOCK} is no text: quote it")
    block = converted(dict(given), Block, lambda _: f"{path}: {BLOCK} ")
    env = content.pop("env", {})
    if not isinstance(env, Mapping):
        raise RecipeError(f"{path}: env is {escape(repr(env), 60)}: it must be a mapping")
    try:
        os.environ.update({str(key): str(value) for key, value in env.items()})
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: env has no possible variables ({one_line(error)})") from error
    for key, value in content.items():
        if key not in _FIELDS:
            raise RecipeError(
                f"{path}: TRL {version('trl')} has no {escape(repr(key), 80)}, which it would drop "
                f"without a word: use {right_name(str(key), sorted(_FIELDS | {BLOCK, 'env'}))}"
            )
        if key in _REFUSED and value not in (None, False, "no", []):
            raise RecipeError(f"{path}: {key} cannot be set here: {_REFUSED[key]}")
        if not _is_finite(value):
            raise RecipeError(f"{path}: {key} is {escape(brief(value), 80)}: it must be finite")
        if why := _unlike(key, value):
            raise RecipeError(f"{path}: {key} is {escape(brief(value), 80)}: it must be {why}")
    if not isinstance(content.get("model_name_or_path"), str):
        raise RecipeError(f"{path}: model_name_or_path must name the policy to train")
    generated = block.n_math + block.n_prog > 0
    if generated == bool(content.get("dataset_name")):
        raise RecipeError(
            f"{path} must name its problems, once: dataset_name, or n_math and n_prog of {BLOCK}"
        )
    names = content.get("reward_funcs") or content.get("reward_model_name_or_path")
    if not (names or generated):
        raise RecipeError(f"{path}: reward_funcs must name the rewards of the data set")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found = RecipeFile(path, content, block)
    _check_config(path, found.parsed[1])
    return found


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _unlike(key: str, value: Any) -> str:
    """Return what the value of a key must be, if it is something else, or an empty text."""
    kind = _KINDS[key]
    if isinstance(value, str) and bool in (kind, *get_args(kind)):  # such as yes, which TRL reads
        return ""
    try:
        msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return f"one of {', '.join(str(member.value) for member in kind)}"
        for each in (kind, *get_args(kind)):
            for meta in getattr(each, "__metadata__", ()):
                return str(meta.description)
        return f"of the type {kind.__name__ if isinstance(kind, type) else kind}"
    except TypeError:  # a declaration that msgspec does not know
        pass
    return ""


def _check_config(path: Path, config: GRPOConfig) -> None:
    """Raise ``RecipeError`` for what TRL accepts, and no run here can have."""
    for name, value in vars(config).items():
        if name.endswith("_kwargs") and not isinstance(value, Mapping | None):
            raise RecipeError(f"{path}: {name} is {escape(brief(value), 80)}: it must be a mapping")
    init = config.model_init_kwargs
    if isinstance(init, Mapping) and init.get("trust_remote_code"):
        raise RecipeError(
            f"{path}: model_init_kwargs has trust_remote_code, which cannot be set here: "
            f"{_REFUSED['trust_remote_code']}"
        )
    if config.logging_strategy != "steps":
        raise RecipeError(f"{path}: logging_strategy must be steps, by which a run is judged")
    if config.save_strategy not in ("steps", "no"):
        raise RecipeError(f"{path}: save_strategy must be steps, with their number in save_steps")
    if 0 < config.max_steps < config.logging_steps:
        raise RecipeError(
            f"{path}: logging_steps is {config.logging_steps:g}, and of {config.max_steps} steps "
            "none would be logged: lower it"
        )


def assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value`` of the command line; the value is YAML. Raises ``RecipeError``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {escape(text, 80)}: write key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {escape(text, 80)}: the value is not YAML") from error


def _content(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError("larger than 1 MiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 — a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as YAML ({one_line(error)}): fix it") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping from TRL's keys to values")
    return content


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """A safe loader that refuses a key that is there twice, of which one would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        # Keys that are no scalars are refused by the base class, and << is no key.
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        merge = "tag:yaml.org,2002:merge"
        keys = Counter(self.construct_object(key) for key in scalars if key.tag != merge)
        for key, times in keys.items():
            if times > 1:
                line = node.start_mark.line + 1
                raise RecipeError(f"the mapping of line {line} has {escape(repr(key), 60)} twice")
        return super().construct_mapping(node, deep)
