"""Check the numbers that callers pass.

Counts may be lists, arrays, series or tensors of Python's, numpy's or torch's numbers. Everything
else is a ValueError with the argument, the problem (by index) and its value.
"""

import math
import reprlib
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from grpo_harness.gate.bounds import LEAST_LEVEL, MOST_SAMPLES, NO_ROOM, Bounds

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = Sequence[float] | npt.NDArray[Any]
Table: TypeAlias = Sequence[Numbers] | npt.NDArray[Any]
Samples: TypeAlias = int | Sequence[int] | npt.NDArray[Any]

GREATEST_LOG = 700.0
"""Numbers with logarithms up to here fit into a float."""

GREATEST_REWARD = 1e100
"""Rewards up to here have squares that fit into a float."""


def paired(now: Numbers, then: Numbers) -> tuple[Floats, Floats]:
    """Check two sequences of logarithms, one per problem; returns both as shape (n,).

    Raises ValueError with the problem (by index) that has no counterpart, or no number from
    -`GREATEST_LOG` to `GREATEST_LOG`.
    """
    sides = []
    for name, values in (("now", now), ("then", then)):
        entries = _entries(values, name)
        for i, entry in enumerate(entries):
            if isinstance(entry, bool) or not is_real(entry, -GREATEST_LOG, GREATEST_LOG):
                wanted = f"not a logarithm from {-GREATEST_LOG:g} to {GREATEST_LOG:g}"
                raise ValueError(f"problem {i}: {name} is {brief(entry)}, {wanted}")
        sides.append(np.asarray(entries, dtype=np.float64))
    same_length(*map(len, sides))
    return sides[0], sides[1]


def rewards(values: Any, name: str) -> list[Floats]:
    """Check rewards, a sequence per problem; returns one array per problem.

    Raises ValueError with the problem (by index) that does not have 1 to `MOST_SAMPLES` numbers
    from -`GREATEST_REWARD` to `GREATEST_REWARD`, and with the number.
    """
    checked = []
    for i, entry in enumerate(_entries(values, name)):
        if not isinstance(entry, Sequence) or isinstance(entry, (str, bytes, bytearray)):
            raise ValueError(f"problem {i}: {name} is {brief(entry)}, not a sequence of rewards")
        if not 1 <= len(entry) <= MOST_SAMPLES:
            wanted = f"not 1 to {MOST_SAMPLES}"
            raise ValueError(f"problem {i}: {name} has {len(entry)} rewards, {wanted}")
        numbers = [number if type(number) is float else plain(number) for number in entry]
        for number in numbers:
            if not is_real(number, -GREATEST_REWARD, GREATEST_REWARD):
                wanted = f"not a number from {-GREATEST_REWARD:g} to {GREATEST_REWARD:g}"
                raise ValueError(f"problem {i}: {name} has the reward {brief(number)}, {wanted}")
        checked.append(np.asarray(numbers, dtype=np.float64))
    return checked


def brief(value: object) -> str:
    """Return a value's repr on one line, shortened, for a message."""
    return " ".join(reprlib.repr(value).split())


def plain(value: Any) -> Any:
    """Convert numbers of numpy, pandas or torch to Python's types; return all else as it is."""
    # Not dates and durations: they would become whole numbers of nanoseconds.
    if getattr(getattr(value, "dtype", None), "kind", "f") in "biufO":
        try:
            return value.tolist()
        except (AttributeError, TypeError, RuntimeError):
            return value
    return value


def is_real(value: Any, low: float, high: float) -> bool:
    """Tell whether a `plain` value is one real number from `low` to `high`."""
    return isinstance(value, (int, float, np.floating)) and bool(low <= value <= high)


def whole(values: Any, name: str, least: int = 0) -> Ints:
    """Check whole numbers from `least` to `MOST_SAMPLES`, one per problem; returns shape (n,).

    Raises ValueError with `name`, the problem (by index) and its value.
    """
    entries = _entries(values, name)
    for i, entry in enumerate(entries):
        # The usual case first: this runs thousands of times in every judgement.
        if type(entry) is int and least <= entry <= MOST_SAMPLES:
            continue
        if not is_real(entry, least, MOST_SAMPLES) or entry % 1:
            wanted = f"not a whole number from {least} to {MOST_SAMPLES}"
            raise ValueError(f"problem {i}: {name} is {brief(entry)}, {wanted}")
    return np.asarray(entries, dtype=np.int64)


def samples(k: Any, n: int, name: str) -> Ints:
    """Check numbers of samples, one for all `n` problems or one per problem; returns shape (n,).

    Raises ValueError as `whole` does, and if there are not `n`.
    """
    if isinstance(plain(k), (int, float, np.floating)):
        return np.repeat(whole([k], name, least=1), n)
    drawn = whole(k, name, least=1)
    if len(drawn) != n:
        raise ValueError(
            f"{name} is given for {len(drawn)} of {n} problems: "
            f"problem {min(len(drawn), n)} has no counterpart"
        )
    return drawn


def real_number(
    value: Any, name: str, *, positive: bool = False, most: float = sys.float_info.max
) -> float:
    """Check a number from 0 to ``most``, above 0 if ``positive``.

    Raises ValueError with `name` and the value; true and false are not numbers.
    """
    number = plain(value)
    if isinstance(number, bool) or not is_real(number, 0, most) or (positive and not number):
        kind = "a number" if most == math.inf else "a finite number"
        least = "above 0" if positive else "from 0 on"
        raise ValueError(f"{name} is {brief(number)}, not {kind} {least}")
    return float(number)


def whole_number(value: Any, name: str, least: int, most: int = sys.maxsize) -> int:
    """Check a whole number from ``least`` to ``most``. Raises ValueError as `real_number` does."""
    number = plain(value)
    if isinstance(number, bool) or not is_real(number, least, most) or number % 1:
        end = "on" if most == sys.maxsize else f"to {most}"
        raise ValueError(f"{name} is {brief(number)}, not a whole number from {least} {end}")
    return int(number)


def one_of(value: Any, name: str, known: Sequence[str]) -> None:
    """Raise ValueError with `name` if a value is not one of ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {brief(value)} is none of {', '.join(known)}")


def truth(value: Any, name: str) -> bool:
    """Check a boolean, Python's or numpy's. Raises ValueError with `name` for all else."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {brief(value)}, neither True nor False")
    return bool(value)


def below(most: float, name: str, value: Any) -> float:
    """Check a number from 0 to below ``most``. Raises ValueError with `name`."""
    number = plain(value)
    if isinstance(number, bool) or not is_real(number, 0.0, most) or number == most:
        raise ValueError(f"{name} is {brief(number)}, not a number from 0 to below {most:g}")
    return float(number)


def sizes(bounds: Bounds, most: float = 1.0) -> tuple[float, float]:
    """Return margin and minimum, checked: 0 <= minimum < margin < ``most``. Raises ValueError."""
    margin, minimum = below(most, "margin", bounds.margin), below(most, "minimum", bounds.minimum)
    if margin - minimum < NO_ROOM:
        raise ValueError(
            f"minimum is {minimum!r} and margin {margin!r}: need 0 <= minimum < margin"
        )
    return margin, minimum


def level(alpha: Any) -> float:
    """Check the false-alarm risk of one check. Raises ValueError."""
    alpha = below(1.0, "alpha", alpha)
    if alpha < LEAST_LEVEL:
        raise ValueError(f"alpha is {alpha!r}, less than {LEAST_LEVEL:g}, the strictest level")
    return float(alpha)


def _entries(values: Any, name: str) -> list[Any]:
    listed = plain(values)
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, bytearray)):
        raise ValueError(f"problem 0: {name} is {brief(values)}, not real numbers, one a problem")
    return [entry if type(entry) is int else plain(entry) for entry in listed]


def same_length(now: int, then: int) -> None:
    """Raise ValueError unless two measurements have equally many problems, and at least one."""
    if now != then:
        raise ValueError(
            f"now has {now} problems and then has {then}: "
            f"problem {min(now, then)} has no counterpart"
        )
    if now == 0:
        raise ValueError("no problems: not even problem 0 was measured")
