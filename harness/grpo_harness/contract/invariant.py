"""What an invariant is: a check with a name, and what it usually means when it breaks.

Every check takes the run (some take two) and the oracle. The figures come from the raw
completions and from the weights before each step; what TRL itself says of them is the other side
of the comparison. The numbers of issues are those of the libraries in which the field met them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from grpo_harness.contract.trace import Batch, Trace

Check = Callable[..., None]

INVARIANTS: dict[str, Check] = {}
"""All invariants by name."""


class BrokenInvariantError(AssertionError):
    """An invariant that does not hold: its name, the number, the place, what it usually means."""


def invariant(usually: str) -> Callable[[Check], Check]:
    """Make a check an invariant: named in its failure, with what such a failure usually means."""

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
    """Raise `BrokenInvariantError` where something does not hold."""
    if not holds:
        raise BrokenInvariantError(otherwise)


def equal(
    place: str, seen: float | None, right: float, absolute: float = 1e-6, relative: float = 1e-5
) -> None:
    """Raise `BrokenInvariantError` where a figure that was seen is not the right one."""
    close = seen is not None and abs(seen - right) <= absolute + relative * abs(right)
    require(close, f"{place} is {seen}, and {right:.7g} is right")


def where(batch: Batch, i: int, g: int) -> str:
    """Say which completion is meant, of groups of ``g``."""
    return f"step {batch.step + 1}, completion {i} (group {i // g})"


def average(values: Sequence[float]) -> float:
    """Return the mean, exactly rounded."""
    return math.fsum(values) / len(values)
