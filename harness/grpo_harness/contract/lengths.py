"""Norms of gradients, and distances between them. A gradient is one tensor per parameter."""

import math

from grpo_harness.contract.trace import Tensors

GRADIENT_TOLERANCE = 1e-4
"""Largest relative L2 distance between two gradients that count as equal."""


def distance(seen: Tensors, right: Tensors) -> float:
    """Return the L2 distance divided by the norm of ``right`` (by 1 if that is 0)."""
    off = norm({name: seen[name] - right[name] for name in right})
    return off / (norm(right) or 1.0)


def scale(seen: Tensors, right: Tensors) -> float | None:
    """Return the factor that makes ``right`` into ``seen``, or None if no factor does."""
    dot = sum(float((seen[name].double() * right[name].double()).sum()) for name in right)
    times = dot / (norm(right) ** 2 or 1.0)
    scaled = {name: times * values for name, values in right.items()}
    return times if distance(seen, scaled) <= GRADIENT_TOLERANCE else None


def norm(gradient: Tensors) -> float:
    """Return the L2 norm of all tensors together."""
    return math.sqrt(sum(float((values.double() ** 2).sum()) for values in gradient.values()))
