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
unit; the mask is 1 on the tokens that were sampled. Invalid arguments raise ``ValueError``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Estimator = Literal["k1", "k3"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log π(token) of shape ``tokens.shape`` from logits of shape (*tokens.shape, vocab).

    A policy that was sampled at a temperature is the one whose logits are divided by it.
    """
    _require(temperature > 0, f"temperature is {temperature}: it must be above 0")
    _require(
        logits.shape[:-1] == tokens.shape,
        f"logits of shape {tuple(logits.shape)} do not fit tokens of shape {tuple(tokens.shape)}",
    )
    every = torch.log_softmax(logits / temperature, dim=-1)
    return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next token, in nats, for logits of shape (..., vocab)."""
    _require(temperature > 0, f"temperature is {temperature}: it must be above 0")
    every = torch.log_softmax(logits / temperature, dim=-1)
    return -(every.exp() * every).sum(-1)


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
    _require(scale in get_args(Scale), f"scale {scale!r} is none of {', '.join(get_args(Scale))}")
    _require(rewards.dim() == 1, f"rewards have shape {tuple(rewards.shape)}, not (completions,)")
    _require(
        group_size > 1 and len(rewards) > 0 and len(rewards) % group_size == 0,
        f"{len(rewards)} rewards do not divide into groups of {group_size} (at least 2)",
    )
    _require(ddof in (0, 1), f"ddof is {ddof}: it is 0 (population) or 1 (sample)")
    _require(math.isfinite(eps) and eps >= 0, f"eps is {eps}: it must be 0 or more")
    counted = ~rewards.isnan() if skip_nan else torch.ones_like(rewards, dtype=torch.bool)
    bad = (counted & ~rewards.isfinite()).nonzero().flatten().tolist()
    _require(not bad, f"rewards {bad} are not finite")
    of_group, by_group = counted.view(-1, group_size), rewards.view(-1, group_size)
    n = of_group.sum(1, keepdim=True)
    mean = torch.where(of_group, by_group, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    lowest = torch.where(of_group, by_group, math.inf).amin(1, keepdim=True)
    highest = torch.where(of_group, by_group, -math.inf).amax(1, keepdim=True)
    # Asked of the rewards themselves: the mean of equal numbers may be off by a rounding.
    relative = torch.where(of_group & (lowest < highest), by_group - mean, 0.0)
    if scale == "none":
        return relative.flatten()
    if scale == "group":
        squares = (relative**2).sum(1, keepdim=True)
    else:
        off = rewards[counted] - rewards[counted].mean()
        squares, n = (off**2).sum(), counted.sum()
    sigma = (squares / (n - ddof).clamp(min=1)).sqrt()
    # Where σ is 0 so is the numerator; without this, eps = 0 would make 0 / 0 of it.
    return torch.where(sigma > 0, relative / (sigma + eps), 0.0).flatten()


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return ρ = π / π_old per token from the two log-probabilities.

    On-policy, π_old is π itself without gradient: ρ is exactly 1, and its gradient is ∇ log π.
    """
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
    unbounded where A < 0. The tutorial has neither.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _require(epsilon >= 0 and high >= 0, f"epsilon is {epsilon}, {high}: it must be 0 or more")
    _require(delta is None or delta > 0, f"delta is {delta}: it must be above 0")
    per_token = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    clipped = rho.clamp(1 - epsilon, 1 + high)
    bounded = rho if delta is None else rho.clamp(max=delta)
    return torch.minimum(bounded * per_token, clipped * per_token)


def kl(new: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(π || π_ref) per token from the two log-probabilities of the sampled token.

    k1 = log π - log π_ref is unbiased as a value, but its gradient on-policy is zero in the mean:
    it regularises nothing. k3 = π_ref/π - log(π_ref/π) - 1 (Schulman, 2020, "Approximating KL
    divergence") is never negative; times ρ, its mean gradient is the divergence's own.
    """
    known = ", ".join(get_args(Estimator))
    _require(estimator in get_args(Estimator), f"KL estimator {estimator!r} is none of {known}")
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
    ``beta`` holds π to. ``loss_type`` says what a token weighs:

    - ``grpo``: 1 / length of its completion, completions alike. On-policy the loss is 0 for
      group-relative advantages, whatever was learned: its gradient is what counts.
    - ``bnpo``: 1 / tokens of this micro-batch.
    - ``dr_grpo``: 1 / (completions × ``max_completion_length``), a constant.
    - ``dapo``: 1 / ``window_tokens``, the tokens of all micro-batches of one step (of this
      one if it is left out): the parts of a step add up, where the others are averaged.
    """
    known = ", ".join(get_args(LossType))
    _require(loss_type in get_args(LossType), f"loss_type {loss_type!r} is none of {known}")
    _require(math.isfinite(beta) and beta >= 0, f"beta is {beta}: it must be 0 or more")
    _require(beta == 0 or reference is not None, f"beta is {beta}, and there is no reference")
    _require(bool(advantages.isfinite().all()), "not all advantages are finite")
    sampled = mask.bool()
    for name, values in (("new", new), ("old", old), ("mask", mask), ("reference", reference)):
        _require(
            values is None or values.shape == new.shape,
            f"{name} has not the shape of new, {tuple(new.shape)}",
        )
        _require(
            values is None or bool(values[sampled].isfinite().all()),
            f"{name} is not finite on every sampled token",
        )
    # Beyond the mask anything may stand; NaN times 0 would still be NaN.
    new, old = (torch.where(sampled, values, 0.0) for values in (new, old))
    rho = ratio(new, old)
    per_token = -clipped_surrogate(rho, advantages, epsilon, epsilon_high=epsilon_high, delta=delta)
    if beta and reference is not None:
        divergence = kl(new, torch.where(sampled, reference, 0.0), estimator)
        per_token = per_token + beta * (divergence * rho if kl_times_ratio else divergence)
    per_token = per_token * sampled
    if loss_type == "grpo":
        return (per_token.sum(1) / sampled.sum(1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return per_token.sum() / sampled.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        _require(bool(max_completion_length), "dr_grpo divides by max_completion_length: give it")
        return per_token.sum() / (len(new) * float(max_completion_length or 0))
    _require(window_tokens is None or window_tokens > 0, f"window_tokens is {window_tokens}")
    return per_token.sum() / (window_tokens or sampled.sum().clamp(min=1))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
