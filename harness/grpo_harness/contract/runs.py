"""The runs that the invariants check: tiny, in full precision, covering all settings together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_harness.contract.policies import two_ended
from grpo_harness.rewards.calls import RewardFunction
from grpo_harness.rewards.rule import reward_func
from grpo_harness.training import Recipe, load


@dataclass(frozen=True)
class Run:
    """A recipe with a reward, and the fault to cause in the run, if any.

    ``policy`` makes a start policy in a folder, to replace the recipe's. In step ``nan_at`` (from
    1) a NaN is planted. In step ``interrupted_in`` the run is interrupted; it resumes from its last
    checkpoint.
    """

    recipe: Recipe
    reward: RewardFunction = reward_func
    policy: Callable[[Path], str] | None = None
    nan_at: int | None = None
    interrupted_in: int | None = None


def constant(completions: Sequence[str], **_: Any) -> list[float]:
    """Give every completion the same score: nothing can be learned."""
    return [1.0] * len(completions)


def negated(**arguments: Any) -> list[float]:
    """Negate the rule reward."""
    return [-reward for reward in reward_func(**arguments)]


def partly_none(**arguments: Any) -> list[float | None]:
    """Score with None for two completions of the first group, none, three and none.

    Groups of four keep one, two or four scores, whose mean is exact if they are equal. The mean of
    three has a rounding error, which TRL would divide by a σ of 0, plus 1e-4.
    """
    rewards: list[float | None] = list(reward_func(**arguments))
    return [None if i % 16 in {0, 1, 8, 9, 10} else rewards[i] for i in range(len(rewards))]


def twentyfold(**arguments: Any) -> list[float]:
    """Score twenty times as high: without division by σ, advantages are large."""
    return [20 * reward for reward in reward_func(**arguments)]


_PLAIN = load("smoke").with_values(
    per_device_train_batch_size=16,
    num_generations=4,
    max_steps=3,
    # Long enough for most completions and too short for some: every batch has a truncated one.
    max_completion_length=16,
    # Divided by σ, so that σ is tested; with a rate that moves the policy within two steps.
    scale_rewards="group",
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    bf16=False,  # also on CUDA: half precision would need larger tolerances
    fp16=False,
    max_grad_norm=0.0,  # not clipped: the gradient is compared unchanged
    log_completions=True,
    num_completions_to_print=0,
)


def _run(name: str, /, **changes: Any) -> Run:
    own = ("reward", "policy", "nan_at", "interrupted_in")
    run = {key: changes.pop(key) for key in own if key in changes}
    return Run(dataclasses.replace(_PLAIN.with_values(**changes), name=name), **run)


def _parts(parts: int) -> dict[str, Any]:
    """Return what makes the same step in several parts."""
    return {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 16 // parts}


# Optimizer and sampler settings of a real recipe, with values that act within four steps: two
# rounds of its eight problems. A second run is interrupted in the middle of the second round.
_TUNED = _run(
    "tuned",
    max_grad_norm=0.2,
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.95,
    n_math=2,
    n_prog=6,
    max_steps=4,
    save_steps=3,
    lr_scheduler_type="linear",
    top_p=0.7,
)

RUNS: Mapping[str, Run] = {
    run.recipe.name: run
    for run in (
        _run("plain"),
        _run("again"),
        _run("cool", temperature=0.7, max_steps=2),
        _run("accumulated", max_steps=2, **_parts(4)),
        _run("anchored", beta=0.5),
        # The second update on the same completions is off-policy, and far off at this rate. A step
        # that draws nothing logs no completions, so both steps have one row.
        _run(
            "clipped",
            num_iterations=2,
            logging_steps=2,
            epsilon_high=0.4,
            delta=1.5,
            max_steps=2,
            learning_rate=1e-2,
            epsilon=0.15,
            beta=0.05,
        ),
        # Two steps share a generation batch, half each: dapo counts the tokens of one step.
        _run("halves", steps_per_generation=4, logging_steps=2, max_steps=2, **_parts(2)),
        _run("masked", mask_truncated_completions=True, max_steps=1),
        _run("unscored", reward=partly_none, max_steps=1),
        _run("unscaled", scale_rewards="none", max_steps=1),
        _run("batch-scaled", scale_rewards="batch", max_steps=1),
        _run("grpo", loss_type="grpo", **_parts(2), max_steps=1),
        _run("bnpo", loss_type="bnpo", **_parts(2), max_steps=1),
        # No completion reaches the limit that dr_grpo divides by; otherwise the limit and the
        # greatest length would be the same.
        _run("dr-grpo", loss_type="dr_grpo", **_parts(2), max_completion_length=64, max_steps=1),
        # A high temperature, so that some rows are longer than the policy's usual completions.
        _run("long", temperature=3.0, max_completion_length=96, max_steps=1),
        _run("large", reward=twentyfold, scale_rewards="none", max_steps=1),
        _run("two-ended", policy=two_ended, max_steps=1),
        _TUNED,
        dataclasses.replace(
            _TUNED, recipe=dataclasses.replace(_TUNED.recipe, name="resumed"), interrupted_in=4
        ),
        _run("reseeded", seed=43, max_steps=1),
        _run("constant", reward=constant, max_steps=2),
        _run("negated", reward=negated, max_steps=1),
        _run("poisoned", nan_at=2),
    )
}
"""The runs by name; ``Run.recipe`` says what each varies."""
