"""Problems, and task types: how problems are drawn, written and read.

Two rules keep training and evaluation separate and every run comparable:

* **Held-out prompts.** The hash of a prompt decides whether it is for evaluation or training
  (one in eight is held out), so the two never overlap, whatever the seed and size.
* **Problems come only from a seed.** Only ``random.Random`` and integers are used, so the
  same seed gives the same problems on every machine and every supported Python.
"""

import hashlib
import json
import random
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from grpo_harness.text import first_line, integers, unquoted

Answer = int | str | list[int]
Reading = Literal["correct", "wrong", "unparsable"]
Message = dict[str, Any]
Prompt = str | list[Message]
"""A text, or a conversation: messages with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its true answer, if that is known.

    ``id`` is the source's name and a hash of what is asked. A problem that occurs twice gets
    ``.2``, ``.3`` at the end, so ids are unique within a list and stable across lists. ``task`` has
    the problem's fields by name.
    """

    id: str
    type: str
    task: Mapping[str, Any]
    prompt: Prompt
    answer: Answer | None = None


class TooFewError(ValueError):
    """A task type has fewer distinct problems than were asked for: ``found``."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


class Source(ABC):
    """Where problems come from, by name: a task type, or a table of rows.

    ``version`` increases whenever a change makes old and new results incomparable. ``slices`` are
    the columns whose values have rows of their own in the report, and ``reads`` tells whether it
    judges completions itself.
    """

    name: str
    version: int = 1
    slices: tuple[str, ...] = ()
    reads: bool = True

    @abstractmethod
    def problems(self, n: int) -> list[Problem]:
        """Return the first ``n`` problems that a suite asks, always in the same order."""

    def at_most(self, n: int) -> list[Problem]:
        """Return the first ``n`` problems, or all if there are fewer."""
        try:
            return self.problems(n)
        except TooFewError as error:
            return self.problems(error.found)

    @abstractmethod
    def conversation(self, problem: Problem, system: str | None) -> Prompt:
        """Return what the policy is asked; ``system`` is the system message, if not empty."""

    @abstractmethod
    def columns(self, problem: Problem) -> Mapping[str, Any]:
        """Return what reward functions get of a problem, beside prompt and completion."""

    @abstractmethod
    def wanted(self, problem: Problem) -> str | None:
        """Return the true answer as a policy should write it, if it is known."""

    @abstractmethod
    def reading(self, problem: Problem, completion: str) -> Reading | None:
        """Judge a completion; ``None`` if only a reward can."""

    def content(self, problem: Problem) -> str:
        """Return a digest of what a problem has beside its prompt, if that may change."""
        return ""


class TaskType(Source):
    """How one type of problem is drawn, written, answered and read.

    A subclass sets ``name`` (the ``"type"`` field of its tasks), increases ``version`` whenever a
    change makes old and new results incomparable, and implements the abstract methods. ``task`` has
    the fields that ``draw`` returned, and the type's name as ``"type"``. It may come from anywhere:
    ``answer`` raises ``ValueError``, ``KeyError`` or ``TypeError`` on one that it cannot read.
    """

    @abstractmethod
    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Draw the fields of one task, in the order in which the prompt shows them."""

    @abstractmethod
    def statement(self, task: Mapping[str, Any]) -> str:
        """Write the question, which comes before the requirement."""

    @abstractmethod
    def requirement(self, task: Mapping[str, Any]) -> str:
        """Write the required form of the answer: one line."""

    @abstractmethod
    def answer(self, task: Mapping[str, Any]) -> Answer:
        """Compute the true answer of ``task``."""

    @abstractmethod
    def read(self, task: Mapping[str, Any], text: str) -> Reading:
        """Judge ``text``, a whole completion, by the lenient rule of the reward."""

    def canonical(self, task: Mapping[str, Any]) -> str:
        """Write the true answer exactly as the requirement asks for it (the strict reading)."""
        answer = self.answer(task)
        return " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Write the user prompt: statement and requirement."""
        return f"{self.statement(task)}\n{self.requirement(task)}"

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem, held out or not."""
        return self._problem(*self._draw(rng))

    def _draw(self, rng: random.Random) -> tuple[dict[str, Any], str]:
        """Draw a task, and write its prompt."""
        task = {"type": self.name, **self.draw(rng)}
        return task, self.prompt(task)

    def _problem(self, task: dict[str, Any], prompt: str) -> Problem:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
        return Problem(f"{self.name}-{digest}", self.name, task, prompt, self.answer(task))

    def conversation(self, problem: Problem, system: str | None) -> Prompt:
        """Return the user prompt as a message, after the system message if there is one."""
        user = {"role": "user", "content": problem.prompt}
        return [{"role": "system", "content": system}, user] if system else [user]

    def columns(self, problem: Problem) -> Mapping[str, Any]:
        """Return the task, from which the rule reward knows the answer."""
        return {"task": problem.task}

    def wanted(self, problem: Problem) -> str:
        """Return the true answer in the required form."""
        return self.canonical(problem.task)

    def reading(self, problem: Problem, completion: str) -> Reading:
        """Judge a completion by ``read``."""
        return self.read(problem.task, completion)

    def problems(self, n: int, seed: int = 0) -> list[Problem]:
        """Draw ``n`` distinct held-out problems: what a suite asks.

        A shorter list is a prefix of a longer one with the same seed. Raises ``ValueError``
        when the type does not have ``n`` distinct held-out prompts.
        """
        if seed:
            return self._held_out(n, seed)
        if n > len(self._asked):
            self._asked[:] = self._held_out(n, seed)
        return self._asked[:n]

    @cached_property
    def _asked(self) -> list[Problem]:
        # Plan, questions, checks and what is stale ask for the same problems.
        return []

    def _held_out(self, n: int, seed: int) -> list[Problem]:
        rng = random.Random(f"evaluation {self.name} {seed}")
        found: dict[str, Problem] = {}
        misses = 0
        while len(found) < n:
            task, prompt = self._draw(rng)
            if is_held_out(prompt) and prompt not in found:
                found[prompt] = self._problem(task, prompt)
                misses = 0
            elif (misses := misses + 1) > 10_000:
                raise TooFewError(
                    f"task type {self.name!r} has no more than {len(found)} distinct held-out "
                    f"problems within reach, and {n} were asked for: ask for fewer",
                    len(found),
                )
        return list(found.values())


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class TutorialType(TaskType):
    """A type of the tutorial, whose prompts also show the task, as compact JSON."""

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Write the user prompt: statement, requirement and ``TASK={…}``."""
        return f"{super().prompt(task)}\nTASK={_COMPACT.encode(dict(task))}"


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
    """Compare the first integer in the first line of ``text`` with ``answer``."""
    for number in integers(first_line(text)):
        return "correct" if number == answer else "wrong"
    return "unparsable"


def read_text(text: str, answer: str) -> Reading:
    """Compare the first line of ``text``, without a pair of quotes around it, with ``answer``."""
    line = first_line(text)
    if unquoted(line) == answer:
        return "correct"
    return "wrong" if line else "unparsable"


def is_held_out(prompt: str) -> bool:
    """Tell whether ``prompt`` is kept for evaluation: one prompt in eight, by its own hash."""
    return hashlib.sha256(b"held out " + prompt.encode()).digest()[0] < 32
