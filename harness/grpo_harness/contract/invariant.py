"""An invariant: a named check with the usual cause of its failure, and how it compares figures.

Every check takes the run (some take two) and the oracle. It computes the figures from the raw
completions and the weights before each step, and compares them with those of TRL. Issue numbers
such as trl#3029 are reports of the mistake in the libraries.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from grpo_harness.contract.trace import Batch, Tensors, Trace

Check = Callable[..., None]

INVARIANTS: dict[str, Check] = {}
"""All invariants by name."""

GRADIENT_TOLERANCE = 1e-4
"""Largest relative L2 distance between two gradients that count as equal."""


class BrokenInvariantError(AssertionError):
    """An invariant does not hold: its name, the number, the place and the usual cause."""


class NotLookedAtError(Exception):
    """What an invariant cannot tell of this run, and why: it neither holds nor is broken."""


def invariant(usually: str) -> Callable[[Check], Check]:
    """Register a check as an invariant; ``usually`` is the usual cause of its failure."""

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def named(run: Trace, *others: Any) -> None:
            try:
                check(run, *others)
            except BrokenInvariantError as broken:
                raise BrokenInvariantError(
                    f"{check.__name__}: {(check.__doc__ or '').splitlines()[0]}\n"
                    f"  broken in run {run.name!r}: {broken}\n"
                    f"  usually: {usually}"
                ) from None

        INVARIANTS[check.__name__] = named
        return named

    return decorate


def require(holds: bool, otherwise: str) -> None:
    """Raise `BrokenInvariantError` with ``otherwise`` unless ``holds``."""
    if not holds:
        raise BrokenInvariantError(otherwise)


def equal(
    place: str, seen: float | None, right: float, absolute: float = 1e-6, relative: float = 1e-5
) -> None:
    """Raise `BrokenInvariantError` unless ``seen`` is close to ``right``."""
    close = seen is not None and abs(seen - right) <= absolute + relative * abs(right)
    require(close, f"{place} is {seen}, and {right:.7g} is right")


def where(batch: Batch, i: int, g: int) -> str:
    """Return the place of completion ``i``, in groups of ``g``, for a message."""
    return f"step {batch.step + 1}, completion {i} (group {i // g})"


def average(values: Sequence[float]) -> float:
    """Return the mean, exactly rounded."""
    return math.fsum(values) / len(values)


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
