"""What an optimizer step should do to the weights: the schedule's rate, clipping and AdamW.

The formulas are in plain torch and double precision. They use the config that was asked for
and the observed gradients and weights, never the trainer's own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_harness.contract.invariant import distance, norm, scale
from grpo_harness.contract.trace import Step, Tensors, Trace


@dataclass(frozen=True, eq=False)
class Update:
    """The weights that a step should leave, ``right``, and its learning rate.

    ``anew`` are the weights after the first update of a new optimizer, without state.
    """

    step: Step
    rate: float
    right: Tensors
    anew: Tensors

    def suspect(self) -> str:
        """Describe what the step did instead, if it can be told."""
        before, after = self.step.weights, self.step.after
        moved = {name: after[name].double() - w for name, w in before.items()}
        if not norm(moved):
            return "; the weights are left as they are"
        # The whole update, weight decay included, is proportional to the rate.
        times = scale(moved, {name: self.right[name] - w for name, w in before.items()})
        if times is not None:
            return f"; the weights move {times:.4g} times as far as at the rate {self.rate:g}"
        anew = {name: self.anew[name] - w for name, w in before.items()}
        again = distance(moved, anew) <= 1e-4
        return "; it is the first update of an optimizer without state" if again else ""


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
"""The learning-rate schedules that `rate` has formulas of."""


def rate(config: Any, steps: int, step: int) -> float:
    """Return the learning rate of the update in ``step`` (from 1) of ``steps``.

    The scheduler advances after the update, and the trainer logs the rate before that: the first
    update has the full rate, and the last one of a linear schedule is not at 0.
    """
    done = step - 1
    warmup = config.get_warmup_steps(steps)
    name = config.lr_scheduler_type
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
            f"the contract has no formula of the schedule {getattr(name, 'value', name)!r}: add "
            "it to grpo_harness.contract.adam.rate"
        )
    return float(config.learning_rate) * share


def clipped(gradient: Tensors, most: float) -> Tensors:
    """Return a gradient scaled to a global norm of at most ``most``; 0 means no limit."""
    # As in torch: 1e-6 is added, which avoids a division by a norm of 0.
    factor = min(1.0, most / (norm(gradient) + 1e-6)) if most else 1.0
    return {name: factor * values.double() for name, values in gradient.items()}


def updates(run: Trace) -> Iterator[Update]:
    """Recompute every update from the observed weights before it and all gradients so far."""
    how = run.config
    beta1, beta2, eps = how.adam_beta1, how.adam_beta2, how.adam_epsilon
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for n, step in enumerate(run.steps, 1):
        now, right, anew = rate(how, run.planned, step.number), {}, {}
        for name, before in step.weights.items():
            g = step.taken[name].double()
            zero = torch.zeros_like(g)
            first[name] = beta1 * first.get(name, zero) + (1 - beta1) * g
            second[name] = beta2 * second.get(name, zero) + (1 - beta2) * g**2
            mean = first[name] / (1 - beta1**n)
            square = second[name] / (1 - beta2**n)
            # Biases and norms, which have one dimension, are not decayed.
            kept = 1 - now * how.weight_decay if before.dim() > 1 else 1.0
            right[name] = kept * before.double() - now * mean / (square.sqrt() + eps)
            anew[name] = kept * before.double() - now * g / (g.abs() + eps)
        yield Update(step, now, right, anew)
