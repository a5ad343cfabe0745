"""GRPO in plain torch, to be read with the paper.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath", section 4.1) draws a group
of completions for each prompt, scores them, and makes those more likely that did better than their
group::

    A = (r - mean(r)) / (σ(r) + ε_σ)                        advantages
    ρ = π(token) / π_old(token)                             ratio
    S = min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)                   clipped_surrogate
    L = mean over completions of mean over tokens of -(S - β KL)        grpo_loss

The defaults are these formulas as tutorials write them. TRL 1.16 deviates from them, and every
deviation is an option here:

==================  ==========================  ==========================================
                    the default                 TRL 1.16
==================  ==========================  ==========================================
σ                   ``ddof=0``, population      ``ddof=1``, sample
KL                  ``estimator="k1"``          ``"k3"``, times ρ (``kl_times_ratio=True``)
mean over tokens    ``loss_type="grpo"``        ``"dapo"``: all tokens weigh the same
log π               ``temperature=1.0``         of the logits over the sampling temperature
==================  ==========================  ==========================================

Log-probabilities, ratios and masks have shape (completions, tokens), in nats where they have a
unit; the mask is true on the tokens that were sampled. Arguments are not checked here, but in
``guarded.py``, whose functions `grpo_harness.grpo` exports.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Estimator = Literal["k1", "k3"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log π(token) of shape ``tokens.shape`` from logits of shape (*tokens.shape, vocab).

    Sampling at a temperature divides the logits by it.
    """
    every = torch.log_softmax(logits / temperature, dim=-1)
    return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next token, in nats, for logits of shape (..., vocab)."""
    every = torch.log_softmax(logits / temperature, dim=-1)
    # p log p is 0 where p is 0, and 0 times -inf would be NaN.
    return -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)


def advantages(
    rewards: Tensor, ddof: int = 0, eps: float | Tensor = 1e-4, scale: Scale = "group"
) -> Tensor:
    """Return each completion's reward relative to its group; both of shape (groups, size).

    ``scale`` says by which σ to divide: the group's, the whole batch's, or none (Dr. GRPO). A group
    whose rewards are all equal has advantage 0. A NaN reward is left out of mean and σ and has
    advantage 0, as in TRL, where it is a reward that does not apply.
    """
    counted = ~rewards.isnan()
    n = counted.sum(1, keepdim=True)
    mean = rewards.nansum(1, keepdim=True) / n.clamp(min=1)
    lowest = torch.where(counted, rewards, math.inf).amin(1, keepdim=True)
    highest = torch.where(counted, rewards, -math.inf).amax(1, keepdim=True)
    # By the rewards themselves: the mean of equal numbers may have a rounding error.
    relative = torch.where(counted & (lowest < highest), rewards - mean, 0.0)
    if scale == "none":
        return relative
    squares = (relative**2).sum(1, keepdim=True)
    if scale == "batch":
        off = rewards[counted] - rewards[counted].mean()
        squares, n = (off**2).sum(), counted.sum()
    sigma = (squares / (n - ddof).clamp(min=1)).sqrt()
    # If σ is 0, so is the numerator; without this, eps = 0 would give 0 / 0.
    return torch.where(sigma > 0, relative / (sigma + eps), 0.0)


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return ρ = π / π_old per token from the two log-probabilities.

    On-policy, π_old is π itself without gradient: ρ is exactly 1, and its gradient is ∇ log π.
    """
    return torch.exp(new - old)


def clipped_surrogate(
    rho: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:
    """Return min(ρ A, clip(ρ, 1 - ``low``, 1 + ``high``) A) per token, to be maximised.

    Tutorials have one ε for both; DAPO's clip-higher has two. ``delta`` is an upper bound of ρ
    itself, which the minimum leaves unbounded if A < 0.
    """
    bounded = rho if delta is None else rho.clamp(max=delta)
    return torch.minimum(bounded * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def kl(new: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(π || π_ref) per token from the two log-probabilities of the sampled token.

    k1 = log π - log π_ref is unbiased as a value, but its gradient on-policy is zero in the mean:
    it regularises nothing. k3 = π_ref/π - log(π_ref/π) - 1 (Schulman, 2020, "Approximating KL
    divergence") is never negative; times ρ, its mean gradient is that of the divergence.
    """
    log_ratio = reference - new
    return -log_ratio if estimator == "k1" else log_ratio.exp() - log_ratio - 1


def loss(
    objective: Tensor,
    mask: Tensor,
    loss_type: LossType = "grpo",
    *,
    window_tokens: float | None = None,
    max_completion_length: float = 1.0,
) -> Tensor:
    """Return the loss of a (micro-)batch, a number, from the objective S - β KL of every token.

    ``loss_type`` is the weight of a token:

    - ``grpo``: 1 / length of its completion; all completions weigh the same. On-policy the loss is
      0 for group-relative advantages, whatever was learned: only its gradient matters.
    - ``bnpo``: 1 / tokens of this micro-batch.
    - ``dr_grpo``: 1 / (completions × ``max_completion_length``), a constant.
    - ``dapo``: 1 / ``window_tokens``, the tokens of all micro-batches of one step (of this
      one if it is left out): micro-batches are added up; with the others they are averaged.
    """
    per_token = -objective * mask
    if loss_type == "grpo":
        return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return per_token.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return per_token.sum() / (len(mask) * max_completion_length)
    return per_token.sum() / (window_tokens or mask.sum().clamp(min=1))
