"""Tensors as callers hand them over, checked: nothing is broadcast, nothing stands for a number.

What does not fit is a ValueError that names the argument, what it is and what it should be. A
question about the numbers in a tensor is asked of its device once, and the place of what is wrong
only where something is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_harness.gate.inputs import brief


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError where something does not hold."""
    if not holds:
        raise ValueError(otherwise)


def real(**tensors: Any) -> None:
    """Tensors of real numbers on one device."""
    for name, values in tensors.items():
        # Not by `require`: a tensor's text is slow to make, and not needed if all is well.
        if not isinstance(values, Tensor):
            raise ValueError(f"{name} is {brief(values)}, not a tensor")
        numbers = not values.is_complex() and values.dtype != torch.bool
        require(numbers, f"{name} is of {values.dtype}, not of real numbers")
    (first, one), *others = tensors.items()
    for name, values in others:
        devices = f"{values.device}, and {first} on {one.device}"
        require(values.device == one.device, f"{name} is on {devices}")


def alike(**tensors: Any) -> None:
    """Tensors of real numbers, on one device and of one shape: that of the first."""
    real(**tensors)
    (first, one), *others = tensors.items()
    for name, values in others:
        shapes = f"{tuple(one.shape)}, but {tuple(values.shape)}"
        require(values.shape == one.shape, f"{name} has not the shape of {first}, {shapes}")


def finite(**tensors: Tensor) -> None:
    """Tensors of which only the sampled tokens are left, with a finite number for each."""
    if not torch.stack([values.isfinite().all() for values in tensors.values()]).all():
        for name, values in tensors.items():
            _nowhere(~values.isfinite(), values, f"{name} is not finite on every sampled token")


def of_vocabulary(logits: Tensor) -> None:
    """Logits of shape (..., vocab)."""
    real(logits=logits)
    fits = logits.dim() > 0 and logits.shape[-1] > 0
    require(fits, f"logits have shape {tuple(logits.shape)}, not (..., vocab)")


def token_ids(tokens: Tensor, logits: Tensor) -> Tensor:
    """Tokens as int64, of which each has ``logits`` of its own and is an id among them."""
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
    """Rewards (completions,) as (groups, group_size) on the CPU: few enough to be asked much.

    They keep their precision, by which TRL's advantages of nearly equal rewards can be told; half
    of it becomes single, and whole numbers and truth values double.
    """
    rewards = _counting(rewards)
    real(rewards=rewards)
    require(rewards.dim() == 1, f"rewards have shape {tuple(rewards.shape)}, not (completions,)")
    fits = len(rewards) > 0 and len(rewards) % group_size == 0
    require(fits, f"{len(rewards)} rewards do not divide into groups of {group_size}")
    exact = torch.float32 if rewards.is_floating_point() else torch.float64
    return rewards.to("cpu", torch.promote_types(rewards.dtype, exact)).view(-1, group_size)


def per_completion(by_group: Tensor, rewards: Tensor) -> Tensor:
    """What came of `grouped` as (completions,), on the device of ``rewards`` and in their type.

    Whole numbers and truth values give the default type.
    """
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    values = by_group.flatten().to(dtype)
    require(bool(values.isfinite().all()), f"rewards lie too far apart for advantages in {dtype}")
    return values.to(rewards.device)


def per_token(advantages: Tensor, rho: Tensor) -> Tensor:
    """Advantages, (completions,) or of the shape of ``rho``, so that they multiply ``rho``."""
    real(rho=rho, advantages=advantages)
    if advantages.shape == rho.shape:
        return advantages
    shapes = f"{tuple(advantages.shape)}, not {tuple(rho.shape[:1])} or {tuple(rho.shape)}"
    fits = rho.dim() == 2 and advantages.shape == rho.shape[:1]
    require(fits, f"advantages have shape {shapes}")
    return advantages.unsqueeze(-1)


def sampled(mask: Tensor, new: Tensor) -> Tensor:
    """Whether each token of ``new`` was sampled, from a mask of 1 and 0."""
    mask = _counting(mask)
    alike(new=new, mask=mask)
    shape = f"{tuple(new.shape)}, not (completions, tokens) with at least one completion"
    require(new.dim() == 2 and len(new) > 0, f"new has shape {shape}")
    _nowhere((mask != 0) & (mask != 1), mask, "mask is not 0 or 1 everywhere")
    return mask.bool()


def _counting(values: Any) -> Any:
    """True is 1 where something is counted."""
    return values.byte() if isinstance(values, Tensor) and values.dtype == torch.bool else values


def _nowhere(strange: Tensor, values: Tensor, otherwise: str) -> None:
    if strange.any():
        at = strange.nonzero()[0].tolist()
        raise ValueError(f"{otherwise}: it is {values[tuple(at)].item()} at {at}")
