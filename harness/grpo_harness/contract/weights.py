"""Invariants of the weights: each update is correct, and nothing else changes them."""

import torch
from safetensors.torch import load_file

from grpo_harness.contract.adam import clipped, rate, updates
from grpo_harness.contract.invariant import (
    BrokenInvariantError,
    distance,
    equal,
    invariant,
    require,
)
from grpo_harness.contract.trace import Tensors, Trace


@invariant("a max_grad_norm that is dropped, or a norm taken of each tensor by itself")
def gradients_are_clipped_as_asked(run: Trace) -> None:
    """The optimizer gets the gradient, clipped to ``max_grad_norm``; 0 means no limit.

    The factor is the same for every element, so only the rounding of one product differs. The
    largest difference seen was 1e-6.
    """
    most = run.config.max_grad_norm
    for step in run.steps:
        right = clipped(step.gradient, most)
        off = distance(step.taken, right)
        if not off <= 1e-5:
            same = distance(step.taken, step.gradient) <= 1e-5
            raise BrokenInvariantError(
                f"step {step.number}: the gradient that the optimizer was given is {off:.2g} of "
                f"its length away from the one clipped at max_grad_norm = {most:g}"
                + ("; it is not clipped" if same else "")
            )


@invariant("another optimizer, schedule, decay or β than the recipe's, or a state that is lost")
def every_update_is_adamws(run: Trace) -> None:
    """Each step makes one AdamW update, at the schedule's rate and with its gradients.

    The tolerance is the rounding of a weight in single precision (two roundings with weight decay)
    plus 1e-4 of the rate. The largest deviations seen were half of the first and a tenth of the
    second.
    """
    require(
        [step.number for step in run.steps] == list(range(1, run.last + 1)),
        f"updates were made in steps {[step.number for step in run.steps]}, of {run.last}",
    )
    for update in updates(run):
        for name, before in update.step.weights.items():
            off = (update.step.after[name].double() - update.right[name]).abs()
            room = 1e-4 * update.rate + 2**-22 * before.double().abs()
            beyond = ~(off <= room)
            if bool(beyond.any()):
                raise BrokenInvariantError(
                    f"step {update.step.number}: {int(beyond.sum())} of {off.numel()} elements of "
                    f"{name} are off, by {float(off.max()):.2g} at a rate of {update.rate:g}"
                    f"{update.suspect()}"
                )


@invariant("a second update, an average of weights or a decay beside the optimizer")
def only_updates_move_the_weights(run: Trace) -> None:
    """The weights do not change between steps or after the last one, to the bit."""
    starts = [*(step.weights for step in run.steps[1:]), run.after]
    for step, start in zip(run.steps, starts, strict=True):
        _same(f"after step {step.number}", start, step.after)


@invariant("gradients that are not averaged, or a process that trains by itself")
def every_process_has_the_same_weights(run: Trace) -> None:
    """All processes have the same gradient in each step, and the same weights, to the bit."""
    for step in run.steps:
        for what, right in step.digests[0].items() if step.digests else ():
            for n, digests in enumerate(step.digests):
                same = digests[what] == right
                require(same, f"step {step.number}: the {what} of processes 0 and {n} differ")


@invariant("a schedule that is not the recipe's, or a rate that is logged after the scheduler")
def rates_logged_are_the_schedules(run: Trace) -> None:
    """The logged learning rate is that of the schedule's formula for the row's step."""
    for row in run.rows:
        right = rate(run.config, run.planned, int(row["step"]))
        equal(f"step {row['step']}: learning_rate", row["learning_rate"], right, 0.0, 1e-6)


@invariant("weights that are saved in half precision, before the last update, or not all of them")
def what_is_saved_is_what_was_trained(run: Trace) -> None:
    """The checkpoint has the final weights, in their own dtype, to the bit."""
    require(run.saved is not None, f"the run left no checkpoint: {run.error}")
    assert run.saved is not None
    adapted = run.saved / "adapter_model.safetensors"
    files = [adapted] if adapted.is_file() else sorted(run.saved.glob("model*.safetensors"))
    saved = {name: values for file in files for name, values in load_file(file).items()}
    if adapted.is_file():
        saved = {name: saved[_short(name)] for name in run.after if _short(name) in saved}
    # A tensor that two layers share may be saved once or twice.
    missing = sorted(run.after.keys() - saved.keys())
    require(not missing, f"not saved: {', '.join(missing)}")
    for name, right in run.after.items():
        require(
            saved[name].dtype == right.dtype,
            f"{name} is saved as {saved[name].dtype}, and was trained as {right.dtype}",
        )
    _same("on disk", saved, run.after)


def _short(name: str) -> str:
    """Return the name under which PEFT saves a weight of its default adapter."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _same(place: str, seen: Tensors, right: Tensors) -> None:
    for name, values in right.items():
        if not torch.equal(seen[name], values):
            off = int((seen[name] != values).sum())
            raise BrokenInvariantError(
                f"{place}: {off} of {values.numel()} elements of {name} differ"
            )
