"""What a GRPO run is made of, and the runs that have a name. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A GRPO run. Fields that TRL has too carry TRL's names and meanings.

    A step draws ``num_generations`` completions for each of ``prompts_per_step`` prompts and
    makes one update, in ``gradient_accumulation_steps`` equal parts. ``max_prompt_length`` and
    ``max_completion_length`` count tokens; a longer prompt is an error, since TRL truncates
    none. A checkpoint to go on from is kept every ``save_steps`` steps, or at the first end of a
    generation window behind. ``config`` holds further fields of ``GRPOConfig`` by name.
    """

    name: str
    policy: str
    n_math: int
    n_prog: int
    problem_seed: int
    num_generations: int
    prompts_per_step: int
    steps: int
    learning_rate: float
    lr_scheduler_type: str
    scale_rewards: str
    max_prompt_length: int = 512
    max_completion_length: int = 48
    gradient_accumulation_steps: int = 1
    epsilon: float = 0.2
    beta: float = 0.0
    loss_type: str = "dapo"
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    save_steps: int = 10
    config: Mapping[str, Any] = field(default_factory=dict)


_NANO = Recipe(
    name="nano",
    policy="nano-base",
    n_math=1000,
    n_prog=5000,
    problem_seed=7,
    num_generations=8,
    prompts_per_step=32,
    steps=60,
    learning_rate=2e-4,
    lr_scheduler_type="linear",
    scale_rewards="none",
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Batch 1 and G = 2 would be refused: the batch is counted in completions, so it is 2.
        Recipe(
            name="tutorial",
            policy="qwen/Qwen2-0.5B-Instruct",
            n_math=64,
            n_prog=64,
            problem_seed=42,
            num_generations=2,
            prompts_per_step=1,
            steps=30,
            learning_rate=2e-6,
            lr_scheduler_type="linear",
            scale_rewards="group",
        ),
        _NANO,
        # What goes wrong at a high rate: in a group without a right answer only the length
        # penalty differs, and dividing by that tiny spread makes it count as much as the truth.
        dataclasses.replace(
            _NANO,
            name="collapse",
            steps=40,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            scale_rewards="group",
        ),
        dataclasses.replace(
            _NANO, name="smoke", n_math=8, n_prog=24, prompts_per_step=8, steps=4, save_steps=2
        ),
        # The shortest run seen to learn whatever its seed. Every step asks all of its few problems,
        # so that the last steps are compared with the first on the same ones. beta is too small
        # to hold the policy back: it is there for kl to be logged.
        dataclasses.replace(
            _NANO,
            name="learn",
            n_math=2,
            n_prog=14,
            num_generations=6,
            prompts_per_step=16,
            steps=10,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            max_completion_length=32,
            beta=0.001,
        ),
    )
}
"""The recipes that have a name."""


def named(name: str) -> Recipe:
    """Return the recipe of that name. Raises ``ValueError`` with the names that there are."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
