"""Invariants of a step's log-probabilities, loss and gradient."""

import torch

from grpo_harness.contract.conventions import Conventions
from grpo_harness.contract.invariant import (
    GRADIENT_TOLERANCE,
    BrokenInvariantError,
    NotLookedAtError,
    average,
    distance,
    equal,
    invariant,
    norm,
    require,
    where,
)
from grpo_harness.contract.oracle import Oracle, rows_of
from grpo_harness.contract.trace import Step, Tensors, Trace

ROUNDING = 2e-5
"""Largest error of single precision in a gradient, relative to its parts' without signs."""


@invariant("temperature ignored (trl#3029), the attention mask left out (trl#2708), shifted tokens")
def log_probabilities_are_the_policys(run: Trace, oracle: Oracle) -> None:
    """Each token has the same log-probability in a padded batch as without padding."""
    g, temperature = run.config.num_generations, run.config.temperature
    shown = [part.log_probabilities for step in run.steps for part in step.micro_batches]
    if run.recipe is None and all(values is None for values in shown):
        raise NotLookedAtError(
            "log-probabilities that the model's forward does not return: the trainer computes "
            "them by itself"
        )
    for step in run.steps:
        with torch.no_grad():
            right, _ = oracle.log_probabilities(step.weights, step.batch, temperature)
        for rows, micro_batch in zip(rows_of(step), step.micro_batches, strict=True):
            if micro_batch.log_probabilities is None:
                continue  # an older TRL does not show them: the gradient is checked
            for place, row in zip(rows, micro_batch.log_probabilities, strict=False):
                ids = step.batch.completion_ids[place]
                if Conventions.of(run.config).mask_truncated and oracle.truncated(ids):
                    continue
                seen, wanted = row[: len(ids)].double(), right[place, : len(ids)].cpu()
                worst = int((seen - wanted).abs().argmax())
                if not abs(seen[worst] - wanted[worst]) <= 1e-4:
                    with torch.no_grad():
                        plain, _ = oracle.log_probabilities(step.weights, step.batch, 1.0)
                    ignored = torch.allclose(seen, plain[place, : len(ids)].cpu(), atol=1e-4)
                    raise BrokenInvariantError(
                        f"{where(step.batch, place, g)}, token {worst}: log-probability "
                        f"{float(seen[worst]):.6f}, and {float(wanted[worst]):.6f} is right at "
                        f"temperature {temperature}"
                        + ("; it is that of 1: the temperature is ignored" if ignored else "")
                    )


@invariant("a mask cut short, shifted or of another row: tokens that count for nothing, or twice")
def the_mask_is_the_completions(run: Trace, oracle: Oracle) -> None:
    """The mask of the loss covers every token of a completion, and none beyond its end."""
    masked = Conventions.of(run.config).mask_truncated
    for step in run.steps:
        for rows, micro_batch in zip(rows_of(step), step.micro_batches, strict=True):
            if micro_batch.mask is None:
                continue  # an older TRL names it differently: the gradient is checked
            for place, row in zip(rows, micro_batch.mask.long(), strict=False):
                ids = step.batch.completion_ids[place]
                counted = 0 if masked and oracle.truncated(ids) else len(ids)
                right = (torch.arange(len(row)) < counted).long()
                for token in (row != right).nonzero().flatten()[:1].tolist():
                    raise BrokenInvariantError(
                        f"{where(step.batch, place, run.config.num_generations)}: token {token} "
                        f"of {len(ids)} has mask {int(row[token])}, and {int(right[token])} is "
                        f"right (the mask counts {int(row.sum())} tokens)"
                    )


@invariant("another loss_type or normaliser under accumulation (trl#6024, #5619, #6369), KL, ε")
def loss_equals_the_oracles(run: Trace, oracle: Oracle) -> None:
    """Each step's loss is that of the formula on the raw completions, and is logged."""
    right = {step.number: oracle.step(run, step).loss for step in run.steps}
    for step in run.steps:
        seen = sum(micro_batch.loss for micro_batch in step.micro_batches)
        _gap(run, oracle, step, "the loss", seen, right[step.number])
    for row in run.rows:
        steps = run.steps_of(row)
        mean = average([right[step.number] for step in steps])
        _gap(run, oracle, steps[-1], "the loss logged", row["loss"], mean)


@invariant("another loss_type, ε, KL, temperature or normaliser (trl#6024, #5619, #3029)")
def gradient_equals_the_oracles(run: Trace, oracle: Oracle) -> None:
    """Each step's gradient is autograd's for the formula, on a fresh copy of the weights."""
    for step in run.steps:
        right = oracle.step(run, step).gradient
        off = distance(step.gradient, right)
        if not off <= GRADIENT_TOLERANCE and not _is_rounding(run, oracle, step, right):
            raise BrokenInvariantError(
                f"step {step.number}: the gradient is {off:.2g} of its length away from the "
                f"oracle's (allowed: {GRADIENT_TOLERANCE:g}){oracle.suspect(run, step)}"
            )
        for row in run.rows:
            if row["step"] == step.number:
                place, seen = f"step {step.number}: grad_norm", row["grad_norm"]
                # If the gradient itself is rounding, so is its norm.
                wanted = norm(right if off <= GRADIENT_TOLERANCE else step.gradient)
                equal(place, seen, wanted, 1e-6, 1e-4)


@invariant("another estimator of the KL, a reference that is not the base, or another clip range")
def figures_of_the_policy_are_the_oracles(run: Trace, oracle: Oracle) -> None:
    """The logged entropy, KL to the base and clip ratios are those of the tokens."""
    for row in run.rows:
        computed = [oracle.step(run, step).logged for step in run.steps_of(row)]
        for name in computed[0]:
            if name != "kl" or run.config.beta:
                right = average([figures[name] for figures in computed if name in figures])
                equal(f"step {row['step']}: {name}", row[name], right, 1e-5, 1e-4)


@invariant("old log-probabilities that are another policy's, or of another temperature")
def on_policy_the_ratio_is_one(run: Trace) -> None:
    """On completions drawn by the current weights, ρ is exactly 1 and nothing is clipped."""
    for step in run.steps:
        for micro_batch in step.micro_batches:
            if micro_batch.old is None or micro_batch.log_probabilities is None:
                continue  # the trainer uses π itself as π_old
            rho = torch.exp(micro_batch.log_probabilities - micro_batch.old)
            require(bool((rho == 1).all()), f"step {step.number}: ρ is up to {float(rho.max())}")
    for row in run.rows:
        for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"):
            value = row[f"clip_ratio/{name}"]
            require(not value, f"step {row['step']}: clip_ratio/{name} is {value}, on-policy")


@invariant("ε that is not the recipe's, or ratios that are taken against the policy itself")
def clipping_acts_off_policy(run: Trace, oracle: Oracle) -> None:
    """On reused completions, at a large rate, some tokens are clipped at 1 ± ε, but not all."""
    (row,) = run.rows
    last = run.steps[-1]
    right = oracle.step(run, last).logged["clip_ratio/region_mean"]
    require(0.1 < right < 0.99, f"step {last.number}: {right:.0%} would be clipped: no control")
    # One row for both steps; in the first nothing is clipped.
    equal("clipping: clip_ratio/region_mean", row["clip_ratio/region_mean"], right / 2, 1e-5, 1e-4)
    off = distance(last.gradient, oracle.step(run, last).gradient)
    if not off <= GRADIENT_TOLERANCE:
        raise BrokenInvariantError(
            f"step {last.number}: the clipped gradient is {off:.2g} of its length away from the "
            f"oracle's at epsilon = {run.config.epsilon}{oracle.suspect(run, last)}"
        )


def _is_rounding(run: Trace, oracle: Oracle, step: Step, right: Tensors) -> bool:
    """Tell whether a step's gradient is that far off by the rounding of parts that cancel out."""
    off = norm({name: step.gradient[name] - values for name, values in right.items()})
    return off <= ROUNDING * oracle.uncancelled(run, step)


def _gap(run: Trace, oracle: Oracle, step: Step, what: str, seen: float, right: float) -> None:
    largest = max(float(part.advantages.abs().max()) for part in step.micro_batches)
    # The loss is a sum of advantages, which may cancel each other out.
    if not abs(seen - right) <= 1e-6 * max(1.0, largest) + 1e-5 * abs(right):
        raise BrokenInvariantError(
            f"step {step.number}: {what} is {seen:.8g}, and {right:.8g} is right"
            f"{oracle.suspect(run, step)}"
        )
