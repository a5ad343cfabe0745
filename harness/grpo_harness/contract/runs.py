"""The runs that the contract is read from: tiny, in full precision, and between them everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_harness.contract.policies import two_ended
from grpo_harness.rewards.functions import RewardFunction
from grpo_harness.rewards.rule import reward_func
from grpo_harness.training.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class Run:
    """A recipe with a reward, and the step (from 1) in which something befalls the run, if so.

    ``policy`` makes the policy that it starts from in a folder, where the recipe's own is too
    plain. In ``nan_at`` a NaN is planted; in ``interrupted_in`` the run is interrupted, to go on
    from its last checkpoint.
    """

    recipe: Recipe
    reward: RewardFunction = reward_func
    policy: Callable[[Path], str] | None = None
    nan_at: int | None = None
    interrupted_in: int | None = None


def constant(completions: Sequence[str], **_: Any) -> list[float]:
    """Score every completion alike: nothing can be learned."""
    return [1.0] * len(completions)


def negated(**arguments: Any) -> list[float]:
    """Score the other way round."""
    return [-reward for reward in reward_func(**arguments)]


def partly_none(**arguments: Any) -> list[float | None]:
    """Leave two completions of a group, none, three and none without a score.

    One, two or four are left, whose mean is exact where they are equal. That of three is off by a
    rounding, which TRL divides by a σ of 0, and 1e-4.
    """
    rewards: list[float | None] = list(reward_func(**arguments))
    return [None if i % 16 in {0, 1, 8, 9, 10} else rewards[i] for i in range(len(rewards))]


def twentyfold(**arguments: Any) -> list[float]:
    """Score twenty times as high, so that advantages that are not divided by σ are large."""
    return [20 * reward for reward in reward_func(**arguments)]


_PLAIN = dataclasses.replace(
    RECIPES["smoke"],
    name="plain",
    prompts_per_step=4,
    num_generations=4,
    steps=3,
    # Long enough for most answers and too short for some: a truncated row is in every batch.
    max_completion_length=16,
    # Divided by σ, so that σ is seen; with a rate that moves the policy within two steps.
    scale_rewards="group",
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    config={
        "bf16": False,  # also on CUDA: no tolerance below a rounding could be kept in half
        "fp16": False,
        "max_grad_norm": 0.0,  # not clipped: the gradient is compared as it is
        "log_completions": True,
        "num_completions_to_print": 0,
    },
)


def _run(name: str, /, config: Mapping[str, Any] | None = None, **changes: Any) -> Run:
    own = ("reward", "policy", "nan_at", "interrupted_in")
    run = {key: changes.pop(key) for key in own if key in changes}
    settings = {**_PLAIN.config, **(config or {})}
    return Run(dataclasses.replace(_PLAIN, name=name, config=settings, **changes), **run)


# What a real recipe asks of the optimizer and the sampler, with values that act in four steps:
# twice through its eight problems, and once more interrupted in the midst of the second round.
_TUNED = _run(
    "tuned",
    {"max_grad_norm": 0.2, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95},
    n_math=2,
    n_prog=6,
    steps=4,
    save_steps=3,
    lr_scheduler_type="linear",
    top_p=0.7,
)

RUNS: Mapping[str, Run] = {
    run.recipe.name: run
    for run in (
        Run(_PLAIN),
        _run("again"),
        _run("cool", temperature=0.7, steps=2),
        _run("accumulated", gradient_accumulation_steps=4, steps=2),
        _run("anchored", beta=0.5),
        # The second update on the same completions is off-policy, and far off at this rate. The
        # trainer logs nothing of the completions where it draws none: one row for both.
        _run(
            "clipped",
            {"num_iterations": 2, "logging_steps": 2, "epsilon_high": 0.4, "delta": 1.5},
            steps=2,
            learning_rate=1e-2,
            epsilon=0.15,
            beta=0.05,
        ),
        # Two steps share what is drawn at once, half each: dapo's tokens are those of one step.
        _run(
            "halves",
            {"steps_per_generation": 4, "logging_steps": 2},
            steps=2,
            gradient_accumulation_steps=2,
        ),
        _run("masked", {"mask_truncated_completions": True}, steps=1),
        _run("unscored", reward=partly_none, steps=1),
        _run("unscaled", scale_rewards="none", steps=1),
        _run("batch-scaled", scale_rewards="batch", steps=1),
        _run("grpo", loss_type="grpo", gradient_accumulation_steps=2, steps=1),
        _run("bnpo", loss_type="bnpo", gradient_accumulation_steps=2, steps=1),
        # The limit that dr_grpo divides by is none that a completion reaches, or it could as well
        # be the length of the longest.
        _run(
            "dr-grpo",
            loss_type="dr_grpo",
            gradient_accumulation_steps=2,
            max_completion_length=64,
            steps=1,
        ),
        # Hot, so that some rows are longer than a policy of short answers ever writes.
        _run("long", temperature=3.0, max_completion_length=96, steps=1),
        _run("large", reward=twentyfold, scale_rewards="none", steps=1),
        _run("two-ended", policy=two_ended, steps=1),
        _TUNED,
        dataclasses.replace(
            _TUNED,
            recipe=dataclasses.replace(_TUNED.recipe, name="resumed"),
            interrupted_in=4,
        ),
        _run("reseeded", seed=43, steps=1),
        _run("constant", reward=constant, steps=2),
        _run("negated", reward=negated, steps=1),
        _run("poisoned", nan_at=2),
    )
}
"""The runs by name; ``Run.recipe`` says what each varies."""
