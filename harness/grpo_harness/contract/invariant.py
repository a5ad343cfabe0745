"""An invariant: a named check, with the usual cause of its failure.

Every check takes the run (some take two) and the oracle. It computes the figures from the raw
completions and the weights before each step, and compares them with those of TRL. Issue numbers
such as trl#3029 are reports of the mistake in the libraries.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from grpo_harness.contract.trace import Batch, Trace

Check = Callable[..., None]

INVARIANTS: dict[str, Check] = {}
"""All invariants by name."""


class BrokenInvariantError(AssertionError):
    """An invariant does not hold: its name, the number, the place and the usual cause."""


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
                    f"  broken in run {run.recipe.name!r}: {broken}\n"
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
