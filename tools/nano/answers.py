"""Completions of mixed quality, which ``nano-base`` is taught after it knows the tasks.

Each type has ways to answer, with their weights: the true answer alone, the true answer with words
around it (which the reward's rule accepts for numbers and for YES and NO, but not for strings), and
typical errors of the type. All are printable ASCII.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from grpo_harness.tasks import Problem, task_types

Way = Callable[[Problem], str]


def right(problem: Problem) -> str:
    """Return the true answer in the required form."""
    return task_types()[problem.type].canonical(problem.task)


def mixed(problem: Problem, rng: random.Random) -> str:
    """Return a completion in one of the type's ways, drawn by their weights."""
    ways = _WAYS[problem.type]
    (way,) = rng.choices([way for _, way in ways], [weight for weight, _ in ways])
    return way(problem)


def _padded(text: str) -> Way:
    return lambda problem: text.replace("?", right(problem))


def _echoed_sum(problem: Problem) -> str:
    # The rule reads the first integer, which is not the result.
    symbol = {"add": "+", "sub": "-", "mul": "*", "div": "//"}[problem.task["op"]]
    return f"{problem.task['a']} {symbol} {problem.task['b']} = {right(problem)}"


def _wrong_sign(problem: Problem) -> str:
    return str(-int(right(problem)))


def _echoed_pair(problem: Problem) -> str:
    return f"gcd({problem.task['a']}, {problem.task['b']}) = {right(problem)}"


def _smaller_number(problem: Problem) -> str:
    return str(min(problem.task["a"], problem.task["b"]))


def _descending(problem: Problem) -> str:
    return " ".join(map(str, sorted(problem.task["arr"], reverse=True)))


def _unsorted(problem: Problem) -> str:
    return str(problem.task["arr"])


def _opposite(problem: Problem) -> str:
    return "NO" if problem.answer == "YES" else "YES"


def _python_verdict(problem: Problem) -> str:
    return str(problem.answer == "YES")


def _unchanged(problem: Problem) -> str:
    return str(problem.task["s"])


def _echoed_expression(problem: Problem) -> str:
    return str(problem.task["expr"])


_WAYS: Mapping[str, tuple[tuple[float, Way], ...]] = {
    "math": (
        (0.50, right),
        (0.25, _padded("The result is ?.")),
        (0.20, _echoed_sum),
        (0.05, _wrong_sign),
    ),
    "gcd": (
        (0.35, right),
        (0.15, _padded("gcd = ?")),
        (0.35, _echoed_pair),
        (0.15, _smaller_number),
    ),
    "sort": ((0.50, right), (0.20, _padded("Sorted: ?")), (0.20, _unsorted), (0.10, _descending)),
    "palindrome": (
        (0.32, right),
        (0.15, _padded("Answer: ?")),
        (0.15, _opposite),
        (0.38, _python_verdict),
    ),
    "reverse": ((0.60, right), (0.22, _padded("Reversed: ?")), (0.18, _unchanged)),
    "py_eval": (
        (0.38, right),
        (0.12, _padded("= ?")),
        (0.20, _padded("It is ?.")),
        (0.30, _echoed_expression),
    ),
}
