"""The formulas with checked arguments; nothing is broadcast.

Invalid arguments raise ``ValueError`` with the argument's name. ``formulas.py`` has the formulas.
"""

import math
from typing import get_args

import torch
from torch import Tensor

from grpo_harness.gate.inputs import brief, one_of, real_number, whole_number
from grpo_harness.grpo import formulas, tensors
from grpo_harness.grpo.formulas import Estimator, LossType, Scale
from grpo_harness.grpo.tensors import alike, require


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log π(token) of shape ``tokens.shape`` from logits of shape (*tokens.shape, vocab).

    A logit of -inf is a token that cannot be drawn. The result is NaN if all logits are -inf, or if
    one is NaN or inf.
    """
    temperature = real_number(temperature, "temperature", positive=True)
    return formulas.log_probabilities(logits, tensors.token_ids(tokens, logits), temperature)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next token, in nats, for logits of shape (..., vocab)."""
    temperature = real_number(temperature, "temperature", positive=True)
    tensors.of_vocabulary(logits)
    return formulas.entropy(logits, temperature)


def advantages(
    rewards: Tensor,
    group_size: int,
    ddof: int = 0,
    eps: float = 1e-4,
    *,
    scale: Scale = "group",
    skip_nan: bool = False,
) -> Tensor:
    """Return each completion's reward relative to its group, of shape (completions,).

    ``rewards`` has shape (completions,), group after group. ``eps`` is added to σ; TRL adds 1e-4. A
    NaN is an error, unless ``skip_nan`` is set: then it is a reward that does not apply.
    """
    one_of(scale, "scale", get_args(Scale))
    ddof, eps = whole_number(ddof, "ddof", 0, 1), real_number(eps, "eps")
    by_group = tensors.grouped(rewards, whole_number(group_size, "group_size", 2))
    scored = ~by_group.isnan() if skip_nan else torch.ones_like(by_group, dtype=torch.bool)
    bad = (scored & ~by_group.isfinite()).flatten().nonzero().flatten()
    seen = brief(by_group.flatten()[bad].tolist())
    require(len(bad) == 0, f"rewards {brief(bad.tolist())} are not finite: {seen}")
    size = by_group.nan_to_num(0.0).abs()
    unit = _unit(size.amax() if scale == "batch" else size.amax(1, True))
    found = formulas.advantages(by_group / unit, ddof, eps / unit, scale)
    return tensors.per_completion(found * unit if scale == "none" else found, rewards)


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return ρ = π / π_old per token from the two log-probabilities."""
    alike(new=new, old=old)
    return formulas.ratio(new, old)


def clipped_surrogate(
    rho: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    *,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """Return min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) per token, to be maximised.

    ``advantages`` has shape (completions,) or that of ``rho``. ``epsilon_high`` replaces ε above 1;
    ``delta`` is an upper bound of ρ itself. Infinity is no bound.
    """
    low = real_number(epsilon, "epsilon", most=math.inf)
    high = low
    if epsilon_high is not None:
        high = real_number(epsilon_high, "epsilon_high", most=math.inf)
    if delta is not None:
        delta = real_number(delta, "delta", positive=True, most=math.inf)
    return formulas.clipped_surrogate(rho, tensors.per_token(advantages, rho), low, high, delta)


def kl(new: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(π || π_ref) per token from the two log-probabilities of the sampled token."""
    one_of(estimator, "KL estimator", get_args(Estimator))
    alike(new=new, reference=reference)
    return formulas.kl(new, reference, estimator)


def grpo_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    reference: Tensor | None = None,
    estimator: Estimator = "k1",
    kl_times_ratio: bool = False,
    window_tokens: float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """Return the loss of a (micro-)batch, a number, from three log-probabilities per token.

    ``new`` carries the gradient, ``old`` is of the policy that sampled, ``reference`` of the policy
    in the KL term, which has the factor ``beta``. ``mask`` is 1 on the tokens that were sampled,
    else 0; the values elsewhere are ignored. ``advantages`` has shape (completions,), or
    (completions, tokens).
    """
    one_of(loss_type, "loss_type", get_args(LossType))
    one_of(estimator, "KL estimator", get_args(Estimator))
    beta = real_number(beta, "beta")
    require(beta == 0 or reference is not None, f"beta is {beta}, and there is no reference")
    if window_tokens is not None:
        window_tokens = real_number(window_tokens, "window_tokens", positive=True)
    if max_completion_length is not None:
        whole_number(max_completion_length, "max_completion_length", 1)
    elif loss_type == "dr_grpo":
        raise ValueError("dr_grpo divides by max_completion_length: give it")
    reference = new if reference is None else reference
    alike(new=new, old=old, reference=reference)
    sampled = tensors.sampled(mask, new)
    # Values outside the mask are set to 0, because NaN times 0 would be NaN.
    new, old, reference = (torch.where(sampled, values, 0.0) for values in (new, old, reference))
    rho, divergence = formulas.ratio(new, old), torch.zeros_like(new)
    if beta:
        divergence = formulas.kl(new, reference, estimator) * (rho if kl_times_ratio else 1)
    surrogate = clipped_surrogate(rho, advantages, epsilon, epsilon_high=epsilon_high, delta=delta)
    tensors.finite(
        advantages=advantages, new=new, old=old, reference=reference, ratio=rho, kl=divergence
    )
    return formulas.loss(
        surrogate - beta * divergence,
        sampled,
        loss_type,
        window_tokens=window_tokens,
        max_completion_length=float(max_completion_length or 1),
    )


def _unit(greatest: Tensor) -> Tensor:
    """Return the power of two next to the greatest reward, to divide all rewards by.

    The division is exact, and keeps squares of differences from underflow and overflow.
    """
    size = greatest.detach().clamp(min=torch.finfo(greatest.dtype).tiny)
    return size / (2 * torch.frexp(size).mantissa)
