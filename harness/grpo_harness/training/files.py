"""A recipe: the YAML that ``trl grpo --config`` takes, and one block of our own."""

import importlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import yaml
from transformers import GenerationConfig
from trl.scripts.grpo import GRPOScriptArguments, make_parser
from trl.scripts.utils import DatasetMixtureConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.model_config import ModelConfig

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.gate.inputs import brief
from grpo_harness.rewards.calls import RewardFunction, load_reward
from grpo_harness.tables import converted
from grpo_harness.tasks import Problem, make_problems
from grpo_harness.text import escape, one_line
from grpo_harness.training.builtin import BUILT_IN, path_of
from grpo_harness.training.config import CHECKPOINTING
from grpo_harness.training.keys import BLOCK, OF_THE_BLOCK, Block, RecipeError, check_keys, refused
from grpo_harness.training.reading import content_of

_SMOKE_COMPLETIONS, _SMOKE_TOKENS = 64, 32

_OF_TRL = {
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}
"""Names of rewards that TRL's command knows."""


class Parsed(NamedTuple):
    """What TRL's own parser makes of a recipe."""

    script: GRPOScriptArguments
    config: GRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


@dataclass(frozen=True)
class Recipe:
    """The settings of a GRPO run; ``values`` are TRL's keys, overrides included.

    The batch is that of one process, as TRL reads it. A checkpoint to resume from is kept every
    ``save_steps`` steps, or at the next end of a generation batch. Raises ``RecipeError``.
    """

    name: str
    path: Path
    values: Mapping[str, Any]
    block: Block
    env: Mapping[str, str]

    @property
    def built_in(self) -> bool:
        """Tell whether it is one of the built-in recipes, or was made of one."""
        return self.path in BUILT_IN.values()

    @property
    def where(self) -> str:
        """What messages call it: its file, or the name of a built-in one."""
        return f"recipe {self.name!r}" if self.built_in else str(self.path)

    @property
    def policy(self) -> str:
        """The policy that training starts from."""
        name, revision = self.values["model_name_or_path"], self.values.get("model_revision")
        return f"{name}@{revision}" if revision and revision != "main" else str(name)

    def with_values(self, **changes: Any) -> "Recipe":
        """Return this recipe with other values, of TRL's keys or of the block's."""
        return _checked(self, changes)

    def problems(self) -> list[Problem]:
        """Return the generated problems, in their order."""
        block = self.block
        return make_problems(block.n_math, block.n_prog, block.problem_seed)

    @cached_property
    def parsed(self) -> Parsed:
        """The recipe as TRL reads it."""
        found = self._parsed({})
        _check_config(self.where, found.config)
        return found

    def config(self, out: Path, *, device: str = "auto") -> GRPOConfig:
        """Return the exact ``GRPOConfig`` of a run into ``out`` on ``device`` (auto, cpu, cuda)."""
        cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        if "use_cpu" in self.values:
            cuda = cuda and not self.parsed.config.use_cpu
        ours: dict[str, Any] = {
            "output_dir": str(out),
            "report_to": self.values.get("report_to", "none"),
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            # The run saves by itself, at the end of a generation batch.
            "save_strategy": "no",
            "save_total_limit": self.values.get("save_total_limit", 2),
            "use_cpu": not cuda,
        }
        if not cuda:
            ours |= {"bf16": False, "fp16": False, CHECKPOINTING: False}
            ours["dataloader_pin_memory"] = False
        elif not self.values.keys() & {"bf16", "fp16"} and not torch.cuda.is_bf16_supported():
            ours |= {"bf16": False, "fp16": True}
        return self._parsed(ours).config

    def beside(self) -> dict[str, Any]:
        """Return what is said beside the config: data, rewards, model, block, environment."""
        script, _, model, mixture = self.parsed
        block = msgspec.structs.asdict(self.block)
        said = {**asdict(script), **asdict(model), **asdict(mixture), **block, "env": self.env}
        plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
        return plain

    def said_beside(self) -> dict[str, Any]:
        """Return what the recipe itself says beside the config, without what is as by default."""
        config = {field.name for field in fields(GRPOConfig)}
        block = msgspec.structs.asdict(self.block)
        own = {key: value for key, value in block.items() if value not in (None, 0)}
        return {key: value for key, value in self.values.items() if key not in config} | own

    def kept(self) -> dict[str, Any]:
        """Return the recipe as it is kept beside the result."""
        block = msgspec.structs.asdict(self.block)
        return {"name": self.name, "file": self.values, "block": block, "env": self.env}

    def small(self, policy: str) -> "Recipe":
        """Return this recipe for a smoke run from ``policy``: few steps, short completions.

        Everything that a step computes with stays: groups, accumulation, iterations, rewards and
        weights, loss, schedule, optimizer. A batch of more than 64 completions becomes the smallest
        one that its groups allow. `smoke_without` says what else is left out.
        """
        config: Any = self.parsed.config
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
            "lora_dropout": 0.0,
            "dtype": "float32",
            "bf16": False,
            "fp16": False,
        }
        left = {
            *("model_revision", "generation_batch_size", "use_vllm"),
            *("eval_strategy", "eval_on_start"),
        }
        values = {key: value for key, value in self.values.items() if key not in left}
        return replace(self, values={**values, **changes})

    def smoke_without(self, *, device: str = "auto") -> dict[str, str]:
        """Return what this recipe has and its smoke run on ``device`` has not, by the key."""
        values = {key: value for key, value in self.values.items() if key != "use_vllm"}
        config, model = (
            replace(self, values=values).config(Path(), device=device),
            self.parsed.model,
        )
        full = model.dtype in {None, "auto", "float32"} and not (config.bf16 or config.fp16)
        without = {
            "use_vllm": self.parsed.config.use_vllm and "the smoke run samples without vLLM",
            "lora_dropout": model.use_peft
            and model.lora_dropout
            and "the smoke run trains without the adapter's dropout",
            "dtype, bf16, fp16": not full and "the smoke run trains in full precision",
        }
        return {key: why for key, why in without.items() if why}

    def rewards(self) -> list[RewardFunction | str]:
        """Load the rewards that ``reward_funcs`` names; a name of a model stays a name."""
        script = self.parsed.script
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
                raise RecipeError(f"{self.where}: reward_funcs: {error}") from error
        return found

    def trainer(self, base: type) -> type:
        """Return the trainer's class: ``base``, or the class that the block names."""
        if self.block.trainer is None:
            return base
        module, _, name = self.block.trainer.partition(":")
        named = f"{self.where}: {BLOCK}.trainer '{escape(self.block.trainer)}'"
        with user_code(
            lambda error: RecipeError(
                f"{named} is not the module:Class of a trainer that can be imported "
                f"({one_line(error)})"
            )
        ):
            found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise RecipeError(f"{named} is no subclass of {base.__name__}")
        return found

    def _parsed(self, ours: Mapping[str, Any]) -> Parsed:
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
                    return Parsed(*parser.parse_args_and_config(["--config", str(file)]))
            except Exception as error:  # its own checks, and those of libraries that it needs
                raise RecipeError(
                    f"{self.where}: TRL {version('trl')} refuses it ({one_line(error)}): fix that "
                    "key"
                ) from error


def load(recipe: str | Path, changes: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe: a built-in one by its name, or the one in a .yaml file.

    ``changes`` are values that replace those of the file, of TRL's keys or of the block's. As TRL
    does, it puts the working folder on Python's path and sets the variables of ``env``. Raises
    ``RecipeError``, ``SettingsError`` and, for an unknown name, ``ValueError``.
    """
    path = path_of(recipe)
    name = path.stem
    where = f"recipe {name!r}" if path in BUILT_IN.values() else str(path)
    ours = {k: v for k, v in dict(changes).items() if k in (BLOCK, "env")}
    content = {**content_of(path), **ours}
    block = _mapping(where, BLOCK, content.pop(BLOCK, {}))
    env = _mapping(where, "env", content.pop("env", {}))
    try:
        os.environ.update(env := {str(key): str(value) for key, value in env.items()})
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: env has no possible variables ({one_line(error)})") from error
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    bare = Recipe(name, path, content, converted(block, Block, lambda _: f"{where}: {BLOCK} "), env)
    found = _checked(bare, {k: v for k, v in dict(changes).items() if k not in ours})
    assert found.parsed  # what TRL refuses is said here
    return found


def _checked(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some changes. Raises ``RecipeError`` for what no run is made of."""
    where = recipe.where
    of_block = {key: value for key, value in changes.items() if key in OF_THE_BLOCK}
    values = {**recipe.values, **{k: v for k, v in changes.items() if k not in OF_THE_BLOCK}}
    check_keys(where, values)
    block = converted(
        {**msgspec.structs.asdict(recipe.block), **of_block}, Block, lambda _: f"{where}: {BLOCK} "
    )
    if not isinstance(values.get("model_name_or_path"), str):
        raise RecipeError(f"{where}: model_name_or_path must name the policy to train")
    sources = (
        bool(values.get("dataset_name")),
        bool(values.get("datasets")),
        (generated := block.n_math + block.n_prog > 0),
    )
    if sum(sources) != 1:
        raise RecipeError(
            f"{where} must name its problems, once: dataset_name, datasets, or n_math and n_prog "
            f"of {BLOCK}"
        )
    if not (values.get("reward_funcs") or values.get("reward_model_name_or_path") or generated):
        raise RecipeError(f"{where}: reward_funcs must name the rewards of the data set")
    return replace(recipe, values=values, block=block)


def _mapping(where: str, key: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: {key} is {escape(repr(given), 60)}: it must be a mapping")
    if key == BLOCK and not all(isinstance(name, str) for name in given):
        raise RecipeError(f"{where}: a key of {key} is no text: quote it")
    return dict(given)


def _check_config(where: str, config: GRPOConfig) -> None:
    """Raise ``RecipeError`` for what TRL accepts, and no run here can have."""
    for name, value in vars(config).items():
        if name.endswith("_kwargs") and not isinstance(value, Mapping | None):
            raise RecipeError(
                f"{where}: {name} is {escape(brief(value), 80)}: it must be a mapping"
            )
    init = config.model_init_kwargs
    if isinstance(init, Mapping) and init.get("trust_remote_code"):
        has = "has trust_remote_code, which cannot be set here"
        raise refused(where, "model_init_kwargs", has, "trust_remote_code")
    drawing: Any = config.generation_kwargs or {}
    for name in sorted(drawing.keys() - vars(GenerationConfig()).keys(), key=str):
        raise RecipeError(
            f"{where}: generation_kwargs has {escape(repr(name), 80)}, which transformers "
            f"{version('transformers')} would not use: name a field of GenerationConfig"
        )
    if config.max_steps == 0 or config.max_steps < -1:
        raise RecipeError(
            f"{where}: max_steps is {config.max_steps}: it must be a whole number from 1 on, or "
            "-1 with num_train_epochs"
        )
    if config.logging_strategy != "steps":
        raise RecipeError(f"{where}: logging_strategy must be steps, by which a run is judged")
    if config.save_strategy not in ("steps", "no"):
        raise RecipeError(f"{where}: save_strategy must be steps, with their number in save_steps")
    if 0 < config.max_steps < config.logging_steps:
        raise RecipeError(
            f"{where}: logging_steps is {config.logging_steps:g}, and of {config.max_steps} steps "
            "none would be logged: lower it"
        )
