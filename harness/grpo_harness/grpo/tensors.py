"""Check the tensors that callers pass; nothing is broadcast.

An error is a ValueError with the argument, what it is and what it should be. Values are checked on
their device in one query; the place of a wrong value is looked up only if there is one.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_harness.gate.inputs import brief


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError with ``otherwise`` unless ``holds``."""
    if not holds:
        raise ValueError(otherwise)


def real(**tensors: Any) -> None:
    """Check that all are tensors of real numbers on one device."""
    for name, values in tensors.items():
        # Without `require`, because formatting a tensor is slow and rarely needed.
        if not isinstance(values, Tensor):
            raise ValueError(f"{name} is {brief(values)}, not a tensor")
        numbers = not values.is_complex() and values.dtype != torch.bool
        require(numbers, f"{name} is of {values.dtype}, not of real numbers")
    (first, one), *others = tensors.items()
    for name, values in others:
        devices = f"{values.device}, and {first} on {one.device}"
        require(values.device == one.device, f"{name} is on {devices}")


def alike(**tensors: Any) -> None:
    """Check that all are tensors of real numbers, on one device, with the shape of the first."""
    real(**tensors)
    (first, one), *others = tensors.items()
    for name, values in others:
        shapes = f"{tuple(one.shape)}, but {tuple(values.shape)}"
        require(values.shape == one.shape, f"{name} does not have the shape of {first}, {shapes}")


def finite(**tensors: Tensor) -> None:
    """Check that all values are finite; values outside the mask must have been set to 0."""
    if not torch.stack([values.isfinite().all() for values in tensors.values()]).all():
        for name, values in tensors.items():
            _nowhere(~values.isfinite(), values, f"{name} is not finite on every sampled token")


def of_vocabulary(logits: Tensor) -> None:
    """Check for logits of shape (..., vocab)."""
    real(logits=logits)
    fits = logits.dim() > 0 and logits.shape[-1] > 0
    require(fits, f"logits have shape {tuple(logits.shape)}, not (..., vocab)")


def token_ids(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return tokens as int64; check that each has ``logits`` of its own and is a valid id."""
    of_vocabulary(logits)
    real(logits=logits, tokens=tokens)
    shapes = f"{tuple(logits.shape)} do not fit tokens of shape {tuple(tokens.shape)}"
    require(logits.shape[:-1] == tokens.shape, f"logits of shape {shapes}")
    fits = not tokens.is_floating_point()
    require(fits, f"tokens are of {tokens.dtype}: not ids, which are whole numbers")
    ids, vocab = tokens.long(), logits.shape[-1]
    _nowhere((ids < 0) | (ids >= vocab), ids, f"not all tokens are ids from 0 to {vocab - 1}")
    return ids


def grouped(rewards: Tensor, group_size: int) -> Tensor:
    """Return rewards of shape (completions,) as (groups, group_size), on the CPU.

    They are few, and checked often. They keep their precision, as in TRL, because it matters for
    nearly equal rewards; half precision becomes single, whole numbers and booleans become double.
    """
    rewards = _counting(rewards)
    real(rewards=rewards)
    require(rewards.dim() == 1, f"rewards have shape {tuple(rewards.shape)}, not (completions,)")
    fits = len(rewards) > 0 and len(rewards) % group_size == 0
    require(fits, f"{len(rewards)} rewards do not divide into groups of {group_size}")
    exact = torch.float32 if rewards.is_floating_point() else torch.float64
    return rewards.to("cpu", torch.promote_types(rewards.dtype, exact)).view(-1, group_size)


def per_completion(by_group: Tensor, rewards: Tensor) -> Tensor:
    """Return a result of `grouped` as (completions,), with the device and dtype of ``rewards``.

    For whole numbers and booleans it has the default dtype.
    """
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    values = by_group.flatten().to(dtype)
    require(bool(values.isfinite().all()), f"rewards lie too far apart for advantages in {dtype}")
    return values.to(rewards.device)


def per_token(advantages: Tensor, rho: Tensor) -> Tensor:
    """Return advantages, (completions,) or of the shape of ``rho``, ready to multiply ``rho``."""
    real(rho=rho, advantages=advantages)
    if advantages.shape == rho.shape:
        return advantages
    shapes = f"{tuple(advantages.shape)}, not {tuple(rho.shape[:1])} or {tuple(rho.shape)}"
    fits = rho.dim() == 2 and advantages.shape == rho.shape[:1]
    require(fits, f"advantages have shape {shapes}")
    return advantages.unsqueeze(-1)


def sampled(mask: Tensor, new: Tensor) -> Tensor:
    """Return which tokens of ``new`` were sampled, from a mask of 1 and 0."""
    mask = _counting(mask)
    alike(new=new, mask=mask)
    shape = f"{tuple(new.shape)}, not (completions, tokens) with at least one completion"
    require(new.dim() == 2 and len(new) > 0, f"new has shape {shape}")
    _nowhere((mask != 0) & (mask != 1), mask, "mask is not 0 or 1 everywhere")
    return mask.bool()


def _counting(values: Any) -> Any:
    """Convert booleans to 1 and 0."""
    return values.byte() if isinstance(values, Tensor) and values.dtype == torch.bool else values


def _nowhere(strange: Tensor, values: Tensor, otherwise: str) -> None:
    if strange.any():
        at = strange.nonzero()[0].tolist()
        raise ValueError(f"{otherwise}: it is {values[tuple(at)].item()} at {at}")
