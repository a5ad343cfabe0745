"""GRPO in plain torch: to be read beside the paper, and the oracle for TRL's step.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath", section 4.1) draws a group
of completions for each prompt, scores them, and makes those likelier that did better than their
group::

    A = (r - mean(r)) / (σ(r) + ε_σ)                        advantages
    ρ = π(token) / π_old(token)                             ratio
    S = min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)                   clipped_surrogate
    L = mean over completions of mean over tokens of -(S - β KL)        grpo_loss

The defaults are these formulas as tutorials write them. TRL 1.16 departs from them, and every
departure is an option here:

==================  ==========================  ==========================================
                    the default                 TRL 1.16
==================  ==========================  ==========================================
σ                   ``ddof=0``, population      ``ddof=1``, sample
KL                  ``estimator="k1"``          ``"k3"``, times ρ (``kl_times_ratio=True``)
mean over tokens    ``loss_type="grpo"``        ``"dapo"``: all tokens of the window alike
log π               ``temperature=1.0``         of the logits over the sampling temperature
==================  ==========================  ==========================================

Log-probabilities, ratios and masks have shape (completions, tokens), in nats where they have a
unit; the mask is 1 on the tokens that were sampled, else 0. Invalid arguments raise
``ValueError``; nothing is broadcast.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_harness.gate.inputs import brief, one_of, real_number, whole_number
from grpo_harness.grpo import tensors
from grpo_harness.grpo.tensors import alike, require

Scale = Literal["group", "batch", "none"]
Estimator = Literal["k1", "k3"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log π(token) of shape ``tokens.shape`` from logits of shape (*tokens.shape, vocab).

    A policy that was sampled at a temperature is the one whose logits are divided by it. A logit
    of -inf is a token that cannot be drawn; where nothing can, or NaN or inf stands, it is NaN.
    """
    temperature = real_number(temperature, "temperature", positive=True)
    tokens = tensors.token_ids(tokens, logits)
    every = torch.log_softmax(logits / temperature, dim=-1)
    return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next token, in nats, for logits of shape (..., vocab)."""
    temperature = real_number(temperature, "temperature", positive=True)
    tensors.of_vocabulary(logits)
    every = torch.log_softmax(logits / temperature, dim=-1)
    # p log p is 0 where p is 0, and 0 times -inf would be NaN.
    return -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)


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

    ``rewards`` has shape (completions,), group after group. ``scale`` says by which σ to divide:
    the group's, the whole batch's, or none (Dr. GRPO). ``eps`` is added to σ; TRL adds 1e-4. A
    group whose rewards are all equal has advantage 0. TRL reads a reward of None as NaN, and with
    ``skip_nan`` it is treated as TRL 1.16 does: it counts neither in mean nor in σ, and its
    advantage is 0, as is that of a completion with nothing left to compare it with. Otherwise a
    NaN is an error.
    """
    one_of(scale, "scale", get_args(Scale))
    ddof, eps = whole_number(ddof, "ddof", 0, 1), real_number(eps, "eps")
    by_group = tensors.grouped(rewards, whole_number(group_size, "group_size", 2))
    counted = ~by_group.isnan() if skip_nan else torch.ones_like(by_group, dtype=torch.bool)
    bad = (counted & ~by_group.isfinite()).flatten().nonzero().flatten()
    seen = brief(by_group.flatten()[bad].tolist())
    require(len(bad) == 0, f"rewards {brief(bad.tolist())} are not finite: {seen}")
    by_group = torch.where(counted, by_group, 0.0)
    unit = _unit(by_group.abs().amax() if scale == "batch" else by_group.abs().amax(1, True))
    by_group = by_group / unit
    n = counted.sum(1, keepdim=True)
    mean = by_group.sum(1, keepdim=True) / n.clamp(min=1)
    lowest = torch.where(counted, by_group, math.inf).amin(1, keepdim=True)
    highest = torch.where(counted, by_group, -math.inf).amax(1, keepdim=True)
    # Asked of the rewards themselves: the mean of equal numbers may be off by a rounding.
    relative = torch.where(counted & (lowest < highest), by_group - mean, 0.0)
    if scale == "none":
        return tensors.per_completion(relative * unit, rewards)
    if scale == "group":
        squares = (relative**2).sum(1, keepdim=True)
    else:
        off = by_group[counted] - by_group[counted].mean()
        squares, n = (off**2).sum(), counted.sum()
    sigma = (squares / (n - ddof).clamp(min=1)).sqrt()
    # Where σ is 0 so is the numerator; without this, eps = 0 would make 0 / 0 of it.
    scaled = torch.where(sigma > 0, relative / (sigma + eps / unit), 0.0)
    return tensors.per_completion(scaled, rewards)


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return ρ = π / π_old per token from the two log-probabilities.

    On-policy, π_old is π itself without gradient: ρ is exactly 1, and its gradient is ∇ log π.
    """
    alike(new=new, old=old)
    return torch.exp(new - old)


def clipped_surrogate(
    rho: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    *,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """Return min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) per token, to be maximised.

    ``advantages`` has shape (completions,) or that of ``rho``. ``epsilon_high`` replaces ε above
    1 (DAPO's clip-higher); ``delta`` bounds ρ itself from above, which the minimum leaves
    unbounded where A < 0. The tutorial has neither; infinity is no bound.
    """
    low = real_number(epsilon, "epsilon", most=math.inf)
    high = low
    if epsilon_high is not None:
        high = real_number(epsilon_high, "epsilon_high", most=math.inf)
    if delta is not None:
        delta = real_number(delta, "delta", positive=True, most=math.inf)
    per_token = tensors.per_token(advantages, rho)
    clipped = rho.clamp(1 - low, 1 + high)
    bounded = rho if delta is None else rho.clamp(max=delta)
    return torch.minimum(bounded * per_token, clipped * per_token)


def kl(new: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(π || π_ref) per token from the two log-probabilities of the sampled token.

    k1 = log π - log π_ref is unbiased as a value, but its gradient on-policy is zero in the mean:
    it regularises nothing. k3 = π_ref/π - log(π_ref/π) - 1 (Schulman, 2020, "Approximating KL
    divergence") is never negative; times ρ, its mean gradient is the divergence's own.
    """
    one_of(estimator, "KL estimator", get_args(Estimator))
    alike(new=new, reference=reference)
    log_ratio = reference - new
    return -log_ratio if estimator == "k1" else log_ratio.exp() - log_ratio - 1


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

    ``new`` carries the gradient; ``old`` is the policy that sampled, ``reference`` the one that
    ``beta`` holds π to; beyond the mask anything may stand in them. ``advantages`` has shape
    (completions,), or (completions, tokens). ``loss_type`` says what a token weighs:

    - ``grpo``: 1 / length of its completion, completions alike. On-policy the loss is 0 for
      group-relative advantages, whatever was learned: its gradient is what counts.
    - ``bnpo``: 1 / tokens of this micro-batch.
    - ``dr_grpo``: 1 / (completions × ``max_completion_length``), a constant.
    - ``dapo``: 1 / ``window_tokens``, the tokens of all micro-batches of one step (of this
      one if it is left out): the parts of a step add up, where the others are averaged.
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
    # Beyond the mask anything may stand; NaN times 0 would still be NaN.
    new, old, reference = (torch.where(sampled, values, 0.0) for values in (new, old, reference))
    rho, divergence = ratio(new, old), torch.zeros_like(new)
    if beta:
        divergence = kl(new, reference, estimator) * (rho if kl_times_ratio else 1)
    surrogate = clipped_surrogate(rho, advantages, epsilon, epsilon_high=epsilon_high, delta=delta)
    tensors.finite(
        advantages=advantages, new=new, old=old, reference=reference, ratio=rho, kl=divergence
    )
    per_token = -(surrogate - beta * divergence) * sampled
    if loss_type == "grpo":
        return (per_token.sum(1) / sampled.sum(1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return per_token.sum() / sampled.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return per_token.sum() / (len(new) * float(max_completion_length))
    return per_token.sum() / (window_tokens or sampled.sum().clamp(min=1))


def _unit(greatest: Tensor) -> Tensor:
    """Return the power of two next to the greatest of some rewards, to divide them all by.

    It takes no digit from them, and then no square of a difference vanishes or overflows.
    """
    size = greatest.detach().clamp(min=torch.finfo(greatest.dtype).tiny)
    return size / (2 * torch.frexp(size).mantissa)
