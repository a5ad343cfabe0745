"""The settings of a GRPO run, and the named recipes."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

_Text = Annotated[str, Meta(min_length=1, description="a text")]
_Whole = Annotated[int, Meta(description="a whole number")]
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
_Config = Annotated[dict[str, Any], Meta(description="a mapping from names to values")]


@dataclass(frozen=True)
class Recipe:
    """The settings of a GRPO run. Fields that TRL has too have TRL's names and meanings.

    A step draws ``num_generations`` completions for each of ``prompts_per_step`` prompts and makes
    one update, in ``gradient_accumulation_steps`` equal parts. ``max_prompt_length`` and
    ``max_completion_length`` count tokens; a longer prompt is an error, since TRL does not truncate
    prompts. A checkpoint to resume from is kept every ``save_steps`` steps, or at the next end of a
    generation batch; with 0 there is none. ``config`` has further fields of ``GRPOConfig`` by name.

    Raises ``ValueError`` with the recipe, the field, its value and what it may be.
    """

    name: _Text
    policy: _Text
    n_math: _From0
    n_prog: _From0
    problem_seed: _Whole
    num_generations: _From2
    prompts_per_step: _From1
    steps: _From1
    learning_rate: _Finite
    lr_scheduler_type: _Text
    scale_rewards: _Text
    max_prompt_length: _From1 = 512
    max_completion_length: _From1 = 48
    gradient_accumulation_steps: _From1 = 1
    epsilon: _Finite = 0.2
    beta: _Finite = 0.0
    loss_type: _Text = "dapo"
    temperature: _Positive = 1.0
    top_p: _Share = 1.0
    seed: _From0 = 42
    save_steps: _From0 = 10
    config: _Config = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Recipe, include_extras=True).items():
            value = getattr(self, name)
            try:
                msgspec.convert(dict(value) if isinstance(value, Mapping) else value, hint)
            except (msgspec.ValidationError, OverflowError):
                wanted = next(m.description for m in hint.__metadata__ if isinstance(m, Meta))
                raise ValueError(
                    f"recipe {self.name!r}: {name} is {value!r}, not {wanted}"
                ) from None
        # A copy, so that recipes made from one another do not share a mutable object.
        object.__setattr__(self, "config", dict(self.config))


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
        # TRL would refuse batch 1 with G = 2: it counts completions, so the batch is 2.
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
        # What goes wrong at a high rate: in a group without a correct completion only the length
        # penalty differs, and divided by that tiny spread it counts as much as correctness.
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
        # The shortest run that was seen to learn with every seed. Every step asks all problems, so
        # that the first and last steps are compared on the same ones. beta is too small to hold
        # the policy back: it makes TRL log kl.
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
"""The named recipes."""


def named(name: str) -> Recipe:
    """Return the recipe of that name. Raises ``ValueError`` with the known names."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
