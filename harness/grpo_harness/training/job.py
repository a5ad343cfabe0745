"""What one run trains: a recipe with everything that it names, loaded and checked.

As TRL would: the data set with all columns, the rewards, the adapter, the trainer. What can be
found wrong without the weights is found before they are loaded.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config

from grpo_harness.engines.weights import device_of, load_weights
from grpo_harness.policy import Policy, PolicyError, load
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.calls import RewardFunction, reward_name
from grpo_harness.rewards.rule import reward_func
from grpo_harness.tasks import Problem
from grpo_harness.text import digest, escape, one_line
from grpo_harness.training.config import check_usable
from grpo_harness.training.data import Data, generated, read_data
from grpo_harness.training.files import Recipe
from grpo_harness.training.keys import RecipeError
from grpo_harness.training.order import has_own_order, steps

_ONLY_TEXT = "a policy here reads text alone: leave it out"


@dataclass(frozen=True)
class Job:
    """A recipe with everything that it names.

    ``model`` is what the trainer gets: the model, or the folder from which TRL loads it. ``ids``
    are those of the problems, one a row of ``rows``; ``evaluated`` are the rows of evaluations.
    """

    recipe: Recipe
    config: GRPOConfig
    policy: Policy
    model: PreTrainedModel | str
    ids: tuple[str, ...]
    rows: Dataset
    evaluated: Dataset | None
    rewards: tuple[RewardFunction | str, ...]
    trainer: type[GRPOTrainer] = GRPOTrainer
    peft: Any = None

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return self.recipe.name

    @property
    def reward_names(self) -> list[str]:
        """The rewards by module and name."""
        return [
            reward if isinstance(reward, str) else f"{reward.__module__}.{reward_name(reward)}"
            for reward in self.rewards
        ]

    @property
    def rows_digest(self) -> str:
        """A digest of the prompts and columns."""
        return digest(json.dumps(self.rows.to_list(), default=str))


def job_of(
    recipe: Recipe, out: Path, *, device: str = "auto", reward: RewardFunction | None = None
) -> Job:
    """Load what a recipe names; ``reward`` replaces its rewards.

    A policy that is an adapter or a GGUF file is trained whole. Raises ``ValueError``,
    ``PolicyError`` and ``HarnessError`` for what cannot be used.
    """
    config = recipe.config(out, device=device)
    check_usable(recipe.where, config)
    rewards = (reward,) if reward is not None else (*recipe.rewards(),) or (reward_func,)
    _check_rewards(recipe.where, config, rewards)
    trainer = recipe.trainer(GRPOTrainer)
    peft = _adapter(recipe)
    data = read_data(recipe)
    policy = load(recipe.policy)
    data = data or generated(recipe, policy)
    _check_enough(recipe.where, config, len(data.problems), trainer)
    prompts = _prompts(recipe.where, policy, config, data)
    most = recipe.block.max_prompt_length
    if most is not None:
        _check_lengths(recipe.where, policy, data.problems, prompts, most)
    return Job(
        recipe=recipe,
        config=config,
        policy=policy,
        model=_model(recipe, policy, config, device),
        ids=tuple(problem.id for problem in data.problems),
        rows=data.rows,
        evaluated=data.evaluated,
        rewards=rewards,
        trainer=trainer,
        peft=peft,
    )


def prompt_of(policy: Policy, config: GRPOConfig, prompt: Any) -> str:
    """Return a row's prompt as the policy sees it: a text as it is, a conversation rendered."""
    template = cast("dict[str, Any]", config.chat_template_kwargs or {})
    return prompt if isinstance(prompt, str) else policy.render(prompt, **template)


def _model(
    recipe: Recipe, policy: Policy, config: GRPOConfig, device: str
) -> PreTrainedModel | str:
    """Return the folder that TRL loads, or a model of what it could not: an adapter, a GGUF."""
    said: ModelConfig = recipe.parsed.model
    kind = "an adapter" if policy.checkpoint.base else "a GGUF file"
    if not (policy.checkpoint.base or policy.checkpoint.gguf_file):
        config.model_init_kwargs = {
            "dtype": said.dtype,
            "attn_implementation": said.attn_implementation,
            **cast("dict[str, Any]", config.model_init_kwargs or {}),
        }
        return str(policy.checkpoint.path)
    if config.beta:
        raise RecipeError(
            f"{recipe.where}: beta above 0 needs a reference model, which TRL loads from "
            f"safetensors, and {policy.name!r} is {kind}: save it with save_pretrained first"
        )
    # Each of several processes has its own device, and the trainer moves the model there.
    on = device if config.world_size == 1 and not config.use_cpu else "cpu"
    model = load_weights(policy, device_of(on), torch.float32).requires_grad_(True)
    model.generation_config = GenerationConfig(
        eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.tokenizer.pad_token_id
    )
    return model


def _adapter(recipe: Recipe) -> Any:
    try:
        adapter: Any = get_peft_config(recipe.parsed.model)
    except Exception as error:  # of PEFT, which may be missing
        raise RecipeError(f"{recipe.where}: use_peft and lora_*: {one_line(error)}") from error
    named = recipe.values.get("lora_target_modules")
    # TRL makes a list of one a text, which is all-linear or a pattern of whole names to PEFT.
    if adapter and isinstance(named, list) and named != ["all-linear"] and _are_names(named):
        adapter.target_modules = set(named)
    return adapter


def _are_names(given: list[str]) -> bool:
    return all(re.fullmatch(r"[\w.]+", name) for name in given)


def _check_rewards(where: str, config: GRPOConfig, rewards: Sequence[RewardFunction | str]) -> None:
    weights = config.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise RecipeError(
            f"{where}: reward_weights has {len(weights)} numbers for {len(rewards)} rewards"
        )
    for name in (reward for reward in rewards if isinstance(reward, str)):
        try:
            with quiet():
                AutoConfig.from_pretrained(name)
        except Exception as error:  # in one of many ways
            raise RecipeError(
                f"{where}: reward_model_name_or_path '{escape(name)}' is not a model that can be "
                f"loaded ({one_line(error)})"
            ) from error


def _prompts(where: str, policy: Policy, config: GRPOConfig, data: Data) -> list[str]:
    """Return all prompts as the policy sees them. Raises ``RecipeError`` for one that it cannot."""
    for name in sorted({"image", "images"} & {*data.rows.column_names}):
        raise RecipeError(f"{where}: the data set has the column {name}, and {_ONLY_TEXT}")
    prompts = []
    for problem, prompt in zip(data.problems, data.rows["prompt"], strict=True):
        contents = [] if isinstance(prompt, str) else [of.get("content") for of in prompt]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise RecipeError(f"{where}: the prompt of {problem.id} has images, and {_ONLY_TEXT}")
        try:
            prompts.append(prompt_of(policy, config, prompt))
        except PolicyError as error:
            raise RecipeError(f"{where}: the prompt of {problem.id}: {error}") from error
    return prompts


def _check_enough(
    where: str, config: GRPOConfig, problems: int, trainer: type[GRPOTrainer]
) -> None:
    at_once = (config.generation_batch_size or 0) // int(config.num_generations or 1)
    if problems < at_once:
        raise RecipeError(
            f"{where} has {problems} problems and asks {at_once} at once: give it more (n_math, "
            "n_prog, rows of the data set), or lower the batch"
        )
    if not has_own_order(trainer) and (number := steps(config, problems)) < config.logging_steps:
        raise RecipeError(
            f"{where}: logging_steps is {config.logging_steps:g}, and of {number} steps none would "
            "be logged: lower it"
        )


def _check_lengths(
    where: str, policy: Policy, problems: Sequence[Problem], prompts: Sequence[str], most: int
) -> None:
    for problem, ids in zip(problems, policy.tokenizer(list(prompts))["input_ids"], strict=True):
        if len(ids) > most:
            raise RecipeError(
                f"{where}: the prompt of {problem.id} has {len(ids)} tokens, and "
                f"max_prompt_length is {most}: raise it"
            )
