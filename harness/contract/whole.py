"""Invariants of whole runs: what changes, what must not, and what two of them have in common."""

from __future__ import annotations

import math

from harness.contract.invariant import equal, invariant, require
from harness.contract.oracle import (
    GRADIENT_TOLERANCE,
    distance,
)
from harness.contract.witness import Witness


@invariant("weight decay, a KL term or an entropy bonus that was not asked for")
def constant_reward_changes_nothing(run: Witness) -> None:
    """Where every completion has the same reward, the weights stay as they are, to the bit."""
    for name, before in run.steps[0].weights.items():
        off = int((run.after[name] != before).sum())
        require(off == 0, f"{off} of {before.numel()} elements of {name} changed")
    for row in run.rows:
        share = row["frac_reward_zero_std"]
        require(share == 1, f"step {row['step']}: frac_reward_zero_std is {share}, not 1")


@invariant("rewards that are clipped, shifted or taken by size on the way")
def negated_reward_negates_the_gradient(run: Witness, other: Witness) -> None:
    """The reward the other way round turns the first gradient round and does nothing else."""
    _same_completions(run, other)
    turned = {name: -values for name, values in other.steps[0].gradient.items()}
    off = distance(run.steps[0].gradient, turned)
    require(off <= GRADIENT_TOLERANCE, f"step 1: {off:.2g} of its length from the turned gradient")


@invariant("a normaliser that is a micro-batch's instead of the step's (trl#6024, trl#5619)")
def accumulation_changes_nothing(run: Witness, other: Witness) -> None:
    """Four groups in four parts have the gradient that they have in one."""
    require(
        len(run.steps[0].parts) == 4 and len(other.steps[0].parts) == 1,
        f"step 1 was made in {len(run.steps[0].parts)} and {len(other.steps[0].parts)} parts",
    )
    _same_completions(run, other)
    off = distance(run.steps[0].gradient, other.steps[0].gradient)
    parts = sum(part.loss for part in run.steps[0].parts)
    require(
        off <= GRADIENT_TOLERANCE,
        f"step 1: with accumulation the gradient is {off:.2g} of its length away",
    )
    equal("step 1: the loss with accumulation", parts, other.steps[0].parts[0].loss)


@invariant("random numbers from somewhere that the seed does not reach")
def the_same_seed_gives_the_same_rows(run: Witness, other: Witness) -> None:
    """A run and its repetition log the same figures, to the bit, but for the time they took."""
    for row, again in zip(run.rows, other.rows, strict=True):
        for key in row.keys() | again.keys():
            if key != "step_time":
                one, two = row.get(key), again.get(key)
                require(one == two, f"step {row['step']}: {key} is {one}, then {two}")


@invariant("weights in half precision: steps of such rates are rounded away")
def weights_move(run: Witness) -> None:
    """At least half the elements of every trainable tensor have changed."""
    for name, before in run.steps[0].weights.items():
        share = float((run.after[name] != before).float().mean())
        require(share >= 0.5, f"only {share:.1%} of the elements of {name} changed")


@invariant("another optimizer, learning rate or decay than the recipe's")
def the_first_update_is_adams(run: Witness) -> None:
    """The first step moves each weight by the learning rate against its gradient's sign."""
    first = run.steps[0]
    after = run.steps[1].weights if len(run.steps) > 1 else run.after
    rate = run.recipe.learning_rate
    for name, before in first.weights.items():
        g = first.gradient[name].double()
        # Both of Adam's moments are corrected for their start: what is left is g / |g|.
        right = before.double() - rate * g / (g.abs() + 1e-8)
        off = float((after[name].double() - right).abs().max())
        require(
            off <= 1e-3 * rate + 1e-6, f"step 1: an element of {name} is {off:.2g} off, of {rate:g}"
        )


@invariant("logging_nan_inf_filter, or a nan_to_num in the loss (trl#6702)")
def a_nan_is_seen(run: Witness) -> None:
    """A NaN loss is logged as what it is, and ends the run."""
    rows = {int(row["step"]): row for row in run.rows}
    (planted,) = [step for step in run.steps if step.number == len(run.steps)]
    row = rows.get(planted.number)
    require(row is not None, f"step {planted.number}, with the NaN, is not logged")
    assert row is not None
    require(
        isinstance(row["loss"], float) and math.isnan(row["loss"]),
        f"step {planted.number}: the loss is NaN and was logged as {row['loss']}: NaN is filtered",
    )
    require(
        run.error is not None and f"step {planted.number}" in str(run.error),
        f"step {planted.number}: the run went on after a NaN loss (ended by: {run.error})",
    )


def _same_completions(run: Witness, other: Witness) -> None:
    one, two = run.steps[0].window, other.steps[0].window
    require(
        one.prompt_ids == two.prompt_ids and one.completion_ids == two.completion_ids,
        f"the first completions are not those of run {other.recipe.name!r}, at the same seed",
    )
