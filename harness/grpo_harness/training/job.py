"""What one run trains: a recipe with everything that it names, loaded and checked.

A built-in recipe trains on generated problems with the rule reward; a recipe in a file on what it
names, as TRL would: its data set with all columns, its rewards, its adapter, its trainer.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_peft_config

from grpo_harness.engines.weights import device_of, load_weights
from grpo_harness.policy import Policy, load
from grpo_harness.rewards.functions import RewardFunction, reward_name
from grpo_harness.rewards.rule import reward_func
from grpo_harness.tasks import Problem, make_problems
from grpo_harness.tasks.dataset import DatasetSource
from grpo_harness.text import digest
from grpo_harness.training.config import resolve
from grpo_harness.training.files import RecipeError, RecipeFile
from grpo_harness.training.recipes import Recipe


@dataclass(frozen=True)
class Job:
    """A recipe with everything that it names.

    ``model`` is what the trainer gets: the model, or the folder from which TRL loads it. ``ids``
    are those of the problems, one a row of ``rows``, and ``recipe`` is how the recipe is kept
    beside the result.
    """

    name: str
    recipe: Mapping[str, Any]
    config: GRPOConfig
    policy: Policy
    model: PreTrainedModel | str
    ids: tuple[str, ...]
    rows: Dataset
    rewards: tuple[RewardFunction | str, ...]
    save_steps: int
    trainer: type[GRPOTrainer] = GRPOTrainer
    peft: Any = None

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
    recipe: Recipe | RecipeFile,
    out: Path,
    *,
    device: str = "auto",
    reward: RewardFunction | None = None,
) -> Job:
    """Load what a recipe names; ``reward`` replaces its rewards.

    Raises ``ValueError``, ``PolicyError`` and ``HarnessError`` for what cannot be used.
    """
    if isinstance(recipe, RecipeFile):
        return _of_file(recipe, out, device, reward)
    return _built_in(recipe, out, device, reward or reward_func)


def _built_in(recipe: Recipe, out: Path, device: str, reward: RewardFunction) -> Job:
    config = resolve(recipe, out, device=device)
    policy = load(recipe.policy)
    # Each of several processes has its own device, and the trainer moves the model there.
    on = device_of(device if config.world_size == 1 else "cpu")
    model = load_weights(policy, on, torch.float32).requires_grad_(True)
    _check_reference(recipe.name, policy, recipe.beta)
    # Only the end tokens of the checkpoint's generation config are used.
    model.generation_config = GenerationConfig(
        eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.tokenizer.pad_token_id
    )
    at_once = (config.generation_batch_size or 0) // recipe.num_generations
    problems = make_problems(recipe.n_math, recipe.n_prog, recipe.problem_seed)
    _check_enough(recipe.name, len(problems), at_once)
    prompts = _rendered(policy, problems)
    _check_lengths(recipe.name, policy, problems, prompts, recipe.max_prompt_length)
    return Job(
        name=recipe.name,
        recipe=dataclasses.asdict(recipe),
        config=config,
        policy=policy,
        model=model,
        ids=tuple(problem.id for problem in problems),
        rows=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        rewards=(reward,),
        save_steps=recipe.save_steps,
    )


def _of_file(recipe: RecipeFile, out: Path, device: str, reward: RewardFunction | None) -> Job:
    config = recipe.config(out, device=device)
    script, _, model = recipe.parsed
    rewards = (reward,) if reward is not None else (*recipe.rewards(),)
    trainer = recipe.trainer(GRPOTrainer)
    policy = load(recipe.policy)
    if kind := _no_model(policy):
        raise RecipeError(
            f"{recipe.path}: TRL trains what it loads from safetensors, and {policy.name!r} is "
            f"{kind}: save it whole, with save_pretrained, first"
        )
    block, problems = recipe.block, []
    if script.dataset_name:
        source = DatasetSource(
            name="dataset",
            path=script.dataset_name,
            home=Path.cwd(),
            # The default, which a table without splits has too.
            split=None if script.dataset_train_split == "train" else script.dataset_train_split,
            config=script.dataset_config,
        )
        problems = source.in_order
        rows = [{"prompt": p.prompt, **source.columns(p)} for p in problems]
    else:
        problems = make_problems(block.n_math, block.n_prog, block.problem_seed)
        rows = [{"prompt": prompt} for prompt in _rendered(policy, problems)]
        rewards = rewards or (reward_func,)
    at_once = (config.generation_batch_size or 0) // int(config.num_generations or 1)
    _check_enough(recipe.name, len(problems), at_once)
    if block.max_prompt_length is not None:
        prompts = [prompt_of(policy, config, row["prompt"]) for row in rows]
        _check_lengths(recipe.name, policy, problems, prompts, block.max_prompt_length)
    config.model_init_kwargs = {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **cast("dict[str, Any]", config.model_init_kwargs or {}),
    }
    return Job(
        name=recipe.name,
        recipe={"name": recipe.name, "file": recipe.values, "block": msgspec.structs.asdict(block)},
        config=config,
        policy=policy,
        model=str(policy.checkpoint.path),
        ids=tuple(problem.id for problem in problems),
        rows=Dataset.from_list(rows),
        rewards=rewards,
        save_steps=int(config.save_steps),
        trainer=trainer,
        peft=get_peft_config(model),
    )


def prompt_of(policy: Policy, config: GRPOConfig, prompt: Any) -> str:
    """Return a row's prompt as the policy sees it: a text as it is, a conversation rendered."""
    template = cast("dict[str, Any]", config.chat_template_kwargs or {})
    return prompt if isinstance(prompt, str) else policy.render(prompt, **template)


def _no_model(policy: Policy) -> str:
    """Return what a policy is that TRL cannot load as a model, or an empty text."""
    if policy.checkpoint.base:
        return "an adapter"
    return "a GGUF file" if policy.checkpoint.gguf_file else ""


def _check_reference(name: str, policy: Policy, beta: float) -> None:
    if beta and (kind := _no_model(policy)):
        raise RecipeError(
            f"recipe {name!r}: beta above 0 needs a reference model, which TRL loads from "
            f"safetensors, and {policy.name!r} is {kind}: save it with save_pretrained first"
        )


def _check_enough(name: str, problems: int, at_once: int) -> None:
    if problems < at_once:
        raise RecipeError(
            f"recipe {name!r} has {problems} problems and asks {at_once} at once: give it more "
            "(n_math, n_prog, rows of the data set), or lower the batch"
        )


def _rendered(policy: Policy, problems: Sequence[Problem]) -> list[str]:
    return [_once_special(policy.tokenizer, policy.render(p.prompt)) for p in problems]


def _check_lengths(
    name: str, policy: Policy, problems: Sequence[Problem], prompts: Sequence[str], most: int
) -> None:
    for problem, ids in zip(problems, policy.tokenizer(list(prompts))["input_ids"], strict=True):
        if len(ids) > most:
            raise RecipeError(
                f"recipe {name!r}: the prompt of {problem.id} has {len(ids)} tokens, and "
                f"max_prompt_length is {most}: raise it"
            )


def _once_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # The chat template has written the special tokens, and TRL tokenizes a string prompt with
    # those that the tokenizer adds itself: the begin token must not be there twice.
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer(text)["input_ids"] == wanted:
        return text
    shorter = text.removeprefix(tokenizer.bos_token or "")
    if tokenizer(shorter)["input_ids"] == wanted:
        return shorter
    raise RecipeError(
        "the tokenizer adds special tokens to a prompt that the chat template has completed "
        "already: switch that off in its tokenizer_config.json (add_bos_token, add_eos_token)"
    )
