"""What an optimizer step should do to the weights: the schedule's rate, clipping and AdamW.

The formulas in plain torch and double precision. What they are given is the recipe's, and the
gradients and weights that were seen; it is not asked what the trainer made of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_harness.contract.lengths import distance, norm, scale
from grpo_harness.contract.trace import Step, Tensors, Trace
from grpo_harness.training.recipes import Recipe


@dataclass(frozen=True)
class AdamW:
    """How the weights are moved; what a recipe leaves open is as `grpo_harness.training` has it."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float

    @classmethod
    def of(cls, recipe: Recipe) -> AdamW:
        """Read what ``recipe`` asks for."""
        return cls(
            beta1=recipe.config.get("adam_beta1", 0.9),
            beta2=recipe.config.get("adam_beta2", 0.999),
            eps=recipe.config.get("adam_epsilon", 1e-8),
            weight_decay=recipe.config.get("weight_decay", 0.0),
            max_grad_norm=recipe.config.get("max_grad_norm", 1.0),
        )


@dataclass(frozen=True, eq=False)
class Update:
    """The weights that a step should leave, with the rate that it should be made at.

    ``anew`` are those of an optimizer without a past.
    """

    step: Step
    rate: float
    right: Tensors
    anew: Tensors

    def suspect(self) -> str:
        """Say what the step did instead, where that can be told."""
        before, after = self.step.weights, self.step.after
        moved = {name: after[name].double() - w for name, w in before.items()}
        if not norm(moved):
            return "; the weights are left as they are"
        # A decay of the weights is no part of what the rate is told by.
        times = scale(moved, {name: self.right[name] - w for name, w in before.items()})
        if times is not None:
            return f"; the weights move {times:.4g} times as far as at the rate {self.rate:g}"
        anew = {name: self.anew[name] - w for name, w in before.items()}
        again = distance(moved, anew) <= 1e-4
        return "; it is the first update of an optimizer without a past" if again else ""


def rate(recipe: Recipe, step: int) -> float:
    """Return the rate of the update in ``step`` (from 1): the one that its row has to show.

    The scheduler goes on after the update, and the trainer reads the rate before that: the first
    update is made at the full rate, and the last one of a linear schedule not at 0.
    """
    done, steps = step - 1, recipe.steps
    warmup = recipe.config.get("warmup_steps", 0)
    name = recipe.lr_scheduler_type
    if name == "constant":
        share = 1.0
    elif done < warmup:
        share = done / warmup
    elif name == "constant_with_warmup":
        share = 1.0
    elif name == "linear":
        share = (steps - done) / (steps - warmup)
    elif name == "cosine":
        share = (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
    else:
        raise ValueError(
            f"recipe {recipe.name!r}: the contract has no formula of the schedule {name!r}: "
            "add it to grpo_harness.contract.adam.rate"
        )
    return recipe.learning_rate * share


def clipped(gradient: Tensors, most: float) -> Tensors:
    """Return a gradient with its whole norm brought down to ``most``; 0 leaves it as it is."""
    # As torch has it: not quite the norm asked for, so that a norm of 0 divides nothing.
    factor = min(1.0, most / (norm(gradient) + 1e-6)) if most else 1.0
    return {name: factor * values.double() for name, values in gradient.items()}


def updates(run: Trace) -> Iterator[Update]:
    """Make every update anew, each from the weights seen before it and all gradients till then."""
    how = AdamW.of(run.recipe)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for n, step in enumerate(run.steps, 1):
        now, right, anew = rate(run.recipe, step.number), {}, {}
        for name, before in step.weights.items():
            g = step.taken[name].double()
            zero = torch.zeros_like(g)
            first[name] = how.beta1 * first.get(name, zero) + (1 - how.beta1) * g
            second[name] = how.beta2 * second.get(name, zero) + (1 - how.beta2) * g**2
            mean = first[name] / (1 - how.beta1**n)
            square = second[name] / (1 - how.beta2**n)
            # Biases and norms, which have one dimension, are not decayed.
            kept = 1 - now * how.weight_decay if before.dim() > 1 else 1.0
            right[name] = kept * before.double() - now * mean / (square.sqrt() + how.eps)
            anew[name] = kept * before.double() - now * g / (g.abs() + how.eps)
        yield Update(step, now, right, anew)
