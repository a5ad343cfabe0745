"""How TRL computes a step by its config, and known deviations.

The deviations are mistakes seen in practice. The oracle uses them to name the cause of a wrong
figure.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from grpo_harness.contract.trace import Trace
from grpo_harness.grpo import Estimator, LossType, Scale


@dataclass(frozen=True)
class Conventions:
    """How TRL 1.16 computes a step; every field is one thing that could differ."""

    temperature: float
    scale: Scale
    loss_type: LossType
    epsilon: float
    epsilon_high: float
    delta: float | None
    beta: float
    mask_truncated: bool
    ddof: int = 1
    eps: float = 1e-4
    estimator: Estimator = "k3"
    kl_times_ratio: bool = True
    groups_off: int = 0
    rewards_of_the_first: int = 1

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read the conventions from the config that was asked for, not from the trainer's."""
        return cls(
            temperature=config.temperature,
            scale=config.scale_rewards,
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            mask_truncated=config.mask_truncated_completions,
            kl_times_ratio=config.use_bias_correction_kl,
        )


def alternatives(run: Trace) -> Iterator[tuple[str, Conventions]]:
    """Yield known mistakes: a description, and the conventions that compute them."""
    right, g = Conventions.of(run.config), run.config.num_generations
    changes: list[tuple[str, dict[str, Any]]] = [
        ("advantages with ddof = 0, the population's σ", {"ddof": 0}),
        ("advantages that are not divided by σ (scale_rewards none)", {"scale": "none"}),
        ("advantages over the batch's σ (scale_rewards batch)", {"scale": "batch"}),
        ("advantages over the group's σ (scale_rewards group)", {"scale": "group"}),
        *(
            (f"advantages of the wrong group, {off} further on", {"groups_off": off})
            for off in range(1, run.groups)
        ),
        ("rewards broadcast from each group's first completion", {"rewards_of_the_first": g}),
        ("rewards broadcast from the first completion", {"rewards_of_the_first": g * run.groups}),
        ("log-probabilities that ignore the temperature", {"temperature": 1.0}),
        ("loss_type bnpo", {"loss_type": "bnpo"}),
        ("loss_type grpo", {"loss_type": "grpo"}),
        ("loss_type dr_grpo", {"loss_type": "dr_grpo"}),
        ("loss_type dapo", {"loss_type": "dapo"}),
        ("truncated completions masked", {"mask_truncated": True}),
        ("truncated completions kept", {"mask_truncated": False}),
    ]
    if len({step.batch for step in run.steps}) < len(run.steps):
        clipped = "epsilon = 0: clipped wherever the ratio has moved"
        changes.insert(1, (clipped, {"epsilon": 0.0, "epsilon_high": 0.0}))
        changes.insert(2, ("no clipping", {"epsilon": math.inf, "epsilon_high": math.inf}))
        changes.insert(3, ("epsilon_high = epsilon", {"epsilon_high": right.epsilon}))
        changes.insert(4, ("no delta: the ratio is not bounded", {"delta": None}))
    if run.config.beta:
        changes[1:1] = [
            ("KL estimator k1 times the ratio", {"estimator": "k1"}),
            ("KL estimator k1", {"estimator": "k1", "kl_times_ratio": False}),
            ("KL estimator k3 without the ratio", {"kl_times_ratio": False}),
            ("no KL term", {"beta": 0.0}),
        ]
    for what, change in changes:
        how = dataclasses.replace(right, **change)
        if how != right:
            yield what, how
