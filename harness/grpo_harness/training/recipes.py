"""What a GRPO run is made of, and the runs that have a name. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LEAST = {
    "n_math": 0,
    "n_prog": 0,
    "num_generations": 2,
    "prompts_per_step": 1,
    "steps": 1,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "save_steps": 0,
}
"""The least value of what is counted in whole numbers."""


@dataclass(frozen=True)
class Recipe:
    """A GRPO run. Fields that TRL has too carry TRL's names and meanings.

    A step draws ``num_generations`` completions for each of ``prompts_per_step`` prompts and
    makes one update, in ``gradient_accumulation_steps`` equal parts. ``max_prompt_length`` and
    ``max_completion_length`` count tokens; a longer prompt is an error, since TRL truncates
    none. A checkpoint to go on from is kept every ``save_steps`` steps, or at the first end of a
    generation window behind; with 0 there is none. ``config`` holds further fields of
    ``GRPOConfig`` by name.

    Raises ``ValueError`` with the recipe, the field and what it has instead of what it may have.
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

    def __post_init__(self) -> None:
        for name in ("name", "policy", "lr_scheduler_type", "scale_rewards", "loss_type"):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and bool(value), "a text")
        self._check("problem_seed", type(self.problem_seed) is int, "a whole number")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            enough = type(value) is int and value >= least
            self._check(name, enough, f"a whole number from {least} on")
        for name in ("learning_rate", "epsilon", "beta"):
            self._check(name, _real(getattr(self, name)) >= 0, "a finite number from 0 on")
        self._check("temperature", _real(self.temperature) > 0, "a finite number above 0")
        self._check("top_p", 0 < _real(self.top_p) <= 1, "a number above 0 and up to 1")
        named = isinstance(self.config, Mapping) and all(isinstance(k, str) for k in self.config)
        self._check("config", named, "a mapping from names to values")
        # A copy: recipes made from one another share nothing that can be changed.
        object.__setattr__(self, "config", dict(self.config))

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(
                f"recipe {self.name!r}: {name} is {getattr(self, name)!r}, not {wanted}"
            )


def _real(value: Any) -> float:
    """A finite real number as it is, and everything else as one below all of them."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else -math.inf


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
