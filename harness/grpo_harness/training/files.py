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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import yaml
from msgspec import Meta
from trl.scripts.grpo import GRPOScriptArguments, make_parser
from trl.scripts.utils import DatasetMixtureConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.model_config import ModelConfig

from grpo_harness.errors import HarnessError, user_code
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
}
"""Keys of TRL's that a run here cannot have, and why."""

_OF_TRL = {
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}
"""Names of rewards that TRL's command knows."""


class RecipeError(HarnessError, ValueError):
    """A recipe's file cannot be used. One line: the file, the key and what it may be."""


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
                    warnings.filterwarnings("ignore", "`gradient_checkpointing`", FutureWarning)
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
    block = converted(dict(given), Block, lambda _: f"{path}: {BLOCK} ")
    env = content.pop("env", {})
    if not isinstance(env, Mapping):
        raise RecipeError(f"{path}: env is {escape(repr(env), 60)}: it must be a mapping")
    os.environ.update({str(key): str(value) for key, value in env.items()})
    for key, value in content.items():
        if key not in _FIELDS:
            raise RecipeError(
                f"{path}: TRL {version('trl')} has no {escape(repr(key), 80)}, which it would drop "
                f"without a word: use {right_name(str(key), sorted(_FIELDS))}"
            )
        if key in _REFUSED and value not in (None, False, "no", []):
            raise RecipeError(f"{path}: {key} cannot be set here: {_REFUSED[key]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{path}: {key} is {value}: it must be finite")
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
    found.parsed  # noqa: B018 — refused at once, not when training begins
    return found


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
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise RecipeError(f"the mapping of line {line} has {escape(repr(twice), 60)} twice")
        return super().construct_mapping(node, deep)
