"""What is asked: problems with a known answer, one file per task type.

A task type is a module in this folder, or a ``.py`` file of your own, that defines one
subclass of :class:`TaskType`. Nothing is registered by hand: the modules of this folder are
found by listing it, and your own file is loaded by :func:`load_task_type`.

Two rules keep training and evaluation apart and every run comparable:

* **Held-out prompts.** A prompt belongs to the evaluation or to training by its own hash
  (one in eight is held out), so no seed and no size can make the two overlap.
* **Problems come from a seed alone.** Only ``random.Random`` and integers are used, so the
  same seed gives the same problems on every machine and every supported Python.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pkgutil
import random
import string
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from grpo_harness.text import integers, unquoted

Answer = int | str | list[int]
Reading = Literal["correct", "wrong", "unparsable"]

MATH = "math"
"""The one task type that ``make_problems`` counts as mathematics; the others are programming."""

PROGRAMMING = ("gcd", "sort", "palindrome", "reverse", "py_eval")
"""The task types of the programming half. The order is part of what a seed means."""


@dataclass(frozen=True)
class Problem:
    """One prompt with its true answer.

    ``id`` is the task type and a hash of the prompt; a prompt that a training set draws twice
    gets ``.2``, ``.3`` behind it, so ids are unique within a list and stable across lists.
    """

    id: str
    type: str
    task: Mapping[str, Any]
    prompt: str
    answer: Answer


class TaskType(ABC):
    """How one type of problem is drawn, worded, answered and read.

    A subclass sets ``name`` (the ``"type"`` field of its tasks), bumps ``version`` whenever a
    change makes old and new results incomparable, and fills in the abstract methods. ``task``
    is always the JSON object of the prompt, and may come from anywhere: ``answer`` raises
    ``ValueError``, ``KeyError`` or ``TypeError`` on one that it cannot read.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Draw the fields of one task, in the order in which the prompt shows them."""

    @abstractmethod
    def statement(self, task: Mapping[str, Any]) -> str:
        """Word the question: what stands above the requirement."""

    @abstractmethod
    def requirement(self, task: Mapping[str, Any]) -> str:
        """Word the demanded form of the answer: one line."""

    @abstractmethod
    def answer(self, task: Mapping[str, Any]) -> Answer:
        """Compute the true answer of ``task``."""

    @abstractmethod
    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        """Judge ``text``, one trimmed line of a completion, by the lenient rule of the reward."""

    def canonical(self, task: Mapping[str, Any]) -> str:
        """Write the true answer exactly as the requirement asks for it (the strict reading)."""
        answer = self.answer(task)
        return " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Write the user prompt: statement, requirement and the task as compact JSON."""
        encoded = json.dumps(dict(task), ensure_ascii=False, separators=(",", ":"))
        return f"{self.statement(task)}\n{self.requirement(task)}\nTASK={encoded}"

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem, held out or not."""
        task = {"type": self.name, **self.draw(rng)}
        prompt = self.prompt(task)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
        return Problem(f"{self.name}-{digest}", self.name, task, prompt, self.answer(task))

    def problems(self, n: int, seed: int = 0) -> list[Problem]:
        """Draw ``n`` distinct held-out problems: what a suite asks.

        A shorter list is a prefix of a longer one with the same seed. Raises ``ValueError``
        when the type does not have ``n`` distinct held-out prompts.
        """
        rng = random.Random(f"evaluation {self.name} {seed}")
        found: dict[str, Problem] = {}
        misses = 0
        while len(found) < n:
            problem = self.problem(rng)
            if is_held_out(problem.prompt) and problem.prompt not in found:
                found[problem.prompt] = problem
                misses = 0
            elif (misses := misses + 1) > 10_000:
                raise ValueError(
                    f"task type {self.name!r} has no more than {len(found)} distinct held-out "
                    f"problems within reach, and {n} were asked for: ask for fewer"
                )
        return list(found.values())


def is_int(value: object) -> bool:
    """Tell whether a JSON value is an integer; ``true`` and ``false`` are not."""
    return type(value) is int


def int_field(task: Mapping[str, Any], field: str) -> int:
    """Return an integer field of a task, or raise ``ValueError``."""
    if not is_int(value := task[field]):
        raise ValueError(f"{field} is not an integer: {value!r}")
    return int(value)


def str_field(task: Mapping[str, Any], field: str) -> str:
    """Return a text field of a task, or raise ``ValueError``."""
    if not isinstance(value := task[field], str):
        raise ValueError(f"{field} is not a text: {value!r}")
    return value


def letters(rng: random.Random, n: int) -> str:
    """Draw ``n`` lowercase ASCII letters."""
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(n))


def read_integer(text: str, answer: int) -> Reading:
    """Compare the first integer in ``text`` with ``answer``."""
    for number in integers(text):
        return "correct" if number == answer else "wrong"
    return "unparsable"


def read_text(text: str, answer: str) -> Reading:
    """Compare ``text``, less one pair of surrounding quotes, with ``answer``."""
    if unquoted(text) == answer:
        return "correct"
    return "wrong" if text else "unparsable"


def is_held_out(prompt: str) -> bool:
    """Tell whether ``prompt`` is kept for evaluation: one prompt in eight, by its own hash."""
    return hashlib.sha256(b"held out " + prompt.encode()).digest()[0] < 32


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
    while is_held_out((problem := task_type.problem(rng)).prompt):
        pass
    return problem


def _with_unique_ids(problems: Sequence[Problem]) -> list[Problem]:
    times: dict[str, int] = {}
    unique = []
    for problem in problems:
        times[problem.id] = count = times.get(problem.id, 0) + 1
        identifier = problem.id if count == 1 else f"{problem.id}.{count}"
        unique.append(
            Problem(identifier, problem.type, problem.task, problem.prompt, problem.answer)
        )
    return unique


def check_disjoint(training: Iterable[str], evaluation: Iterable[str]) -> None:
    """Raise ``ValueError`` when a problem (by prompt or id) is both trained on and evaluated."""
    shared = sorted(set(training) & set(evaluation))
    if shared:
        raise ValueError(
            f"{len(shared)} problems of the evaluation were trained on, the first of them "
            f"{shared[0]!r}: remove them from the training set (is_held_out tells them) and "
            "train again"
        )


@cache
def _built_in() -> dict[str, TaskType]:
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        task_type = _only_task_type(importlib.import_module(f"{__name__}.{info.name}"))
        found[task_type.name] = task_type
    return found


_own: dict[Path, TaskType] = {}


def task_types() -> dict[str, TaskType]:
    """Return every known task type by name: those of this folder and those loaded since."""
    return {**_built_in(), **{task_type.name: task_type for task_type in _own.values()}}


def load_task_type(source: str) -> TaskType:
    """Return the task type named ``source``, or load the one that a ``.py`` file defines.

    Raises ``ValueError`` when there is no such type or file, when the file does not define
    exactly one, and when its name is already that of another type.
    """
    if source in task_types():
        return task_types()[source]
    path = Path(source)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"no task type {source!r}: known are {', '.join(task_types())}; a type of your own "
            "is named by the path of its .py file"
        )
    path = path.resolve()
    if path in _own:
        return _own[path]
    name = f"grpo_harness_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: a dataclass in the file looks its own module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        task_type = _only_task_type(module)
        if task_type.name in task_types():
            raise ValueError(
                f"{source} defines the task type {task_type.name!r}, which exists already"
            )
    except BaseException:
        del sys.modules[name]
        raise
    _own[path] = task_type
    return task_type


def _only_task_type(module: ModuleType) -> TaskType:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, TaskType)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(
            f"{module.__file__} defines {len(classes)} subclasses of TaskType: it takes exactly one"
        )
    task_type: TaskType = classes[0]()
    return task_type
