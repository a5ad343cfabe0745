"""The training set: problems of all task types, none of which an evaluation may ask."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from grpo_harness.tasks.sources import task_types
from grpo_harness.tasks.task import Problem, TaskType, is_held_out

MATH = "math"
"""The one task type that ``make_problems`` counts as mathematics; the others are programming."""

_ROW = re.compile(r"-([0-9a-f]{12})(?:\.\d+)?$")

PROGRAMMING = ("gcd", "sort", "palindrome", "reverse", "py_eval")
"""The task types of the programming half. Their order affects what a seed draws."""


def make_problems(n_math: int, n_prog: int, seed: int) -> list[Problem]:
    """Make a training set: arithmetic and programming problems, shuffled.

    ``n_math`` arithmetic problems, then ``n_prog`` programming problems of uniformly drawn
    types, all from one ``random.Random(seed)``. Prompts held out for evaluation are never
    drawn. Raises ``ValueError`` when a count is negative.
    """
    if n_math < 0 or n_prog < 0:
        raise ValueError(f"counts of problems cannot be negative: {n_math} and {n_prog}")
    rng = random.Random(seed)
    types = task_types()
    drawn = [_training_problem(types[MATH], rng) for _ in range(n_math)]
    drawn += [_training_problem(types[rng.choice(PROGRAMMING)], rng) for _ in range(n_prog)]
    rng.shuffle(drawn)
    return _with_unique_ids(drawn)


def _training_problem(task_type: TaskType, rng: random.Random) -> Problem:
    while is_held_out(str((problem := task_type.problem(rng)).prompt)):
        pass
    return problem


def _with_unique_ids(problems: Sequence[Problem]) -> list[Problem]:
    times: dict[str, int] = {}
    unique = []
    for problem in problems:
        times[problem.id] = count = times.get(problem.id, 0) + 1
        unique.append(problem if count == 1 else replace(problem, id=f"{problem.id}.{count}"))
    return unique


def _content(name: str) -> str:
    """Return the digest at the end of a row's id, which is the same in every data set."""
    found = _ROW.search(name)
    return found[1] if found else name


def check_disjoint(training: Iterable[str], evaluation: Iterable[str]) -> None:
    """Raise ``ValueError`` when a problem (by prompt or id) is both trained on and evaluated."""
    trained = {_content(name) for name in training}
    shared = sorted(name for name in set(evaluation) if _content(name) in trained)
    if shared:
        raise ValueError(
            f"{len(shared)} problems of the evaluation were trained on, the first of them "
            f"{shared[0]!r}: judge by rows that no training sees (another path or split of the "
            "data set), or train without these problems (is_held_out finds generated ones)"
        )
