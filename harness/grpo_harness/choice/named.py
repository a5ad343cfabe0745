"""Policies by name: found on disk, comparable with each other, asked the same problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grpo_harness import checks
from grpo_harness.errors import HarnessError
from grpo_harness.gate.bounds import MINIMUM_PROBLEMS
from grpo_harness.policy import Policy, PolicyName, find, load
from grpo_harness.settings import Settings, candidates
from grpo_harness.sizing import UNPLANNED
from grpo_harness.text import escape, together

if TYPE_CHECKING:
    from grpo_harness.asked import Task
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.gate.inputs import Floats
    from grpo_harness.policy import Checkpoint
    from grpo_harness.session import Session

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class ChoiceError(HarnessError):
    """Policies cannot be compared, or there is nothing to find. One line."""


def policies(texts: Iterable[str], cwd: Path) -> list[PolicyName]:
    """Return the policies that are named, in this order, each once.

    A pattern means the folders that it matches, in the order of their steps. Raises
    ``SettingsError`` if there are none.
    """
    named = (name for text in texts for name in candidates(text, cwd, "policy"))
    return list({(name.slug, name.folder or name.text): name for name in named}.values())


def between(good: PolicyName, bad: PolicyName, texts: list[str], cwd: Path) -> list[PolicyName]:
    """Return the checkpoints between a good and a bad one, in the order of their steps.

    If the good one is among them, those before it are left out; and those after the bad one.
    """
    found = candidates(texts, cwd, "candidates")
    places = [_place(name) for name in found]
    first = places.index(_place(good)) + 1 if _place(good) in places else 0
    last = places.index(_place(bad)) if _place(bad) in places else len(found)
    if not found[first:last]:
        raise ChoiceError(
            f"there is no checkpoint between {escape(good.text)} and {escape(bad.text)} among the "
            f"{len(found)} candidates: name some, such as out/checkpoint-*"
        )
    return found[first:last]


def _place(name: PolicyName) -> Path | str:
    return name.folder.resolve() if name.folder else name.text


def check_alike(names: Sequence[PolicyName]) -> None:
    """Check that all files are there, and that all have one tokenizer and chat template.

    No weights are read, unless the files of two tokenizers differ. Raises ``HarnessError``.
    """
    first, *others = (find(name) for name in names)
    files = _files(first)
    for other in others:
        if _files(other) == files:
            continue
        ours, theirs = load(other.name).fingerprint, load(first.name).fingerprint
        for what in ("tokenizer", "chat_template"):
            if getattr(ours, what) != getattr(theirs, what):
                raise ChoiceError(
                    f"{other} has another {what.replace('_', ' ')} than {first}: they are no "
                    "checkpoints of one training, so name those of one"
                )


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    folder = checkpoint.with_tokenizer.path
    paths = [folder / name for name in _TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def check_apart(found: Sequence[Policy]) -> None:
    """Raise ``ChoiceError`` if two policies are the same, or have the same name in a report."""
    for number, policy in enumerate(found):
        for other in found[:number]:
            names = f"{escape(other.name)} and {escape(policy.name)}"
            if policy.fingerprint.weights == other.fingerprint.weights:
                raise ChoiceError(f"{names} have the same weights: name two different policies")
            if policy.slug == other.slug:
                raise ChoiceError(f"{names} are both called {policy.slug}: rename one of them")


def chosen(settings: Settings, names: Sequence[str] | None) -> list[Task]:
    """Return the tasks of these names, or all whose completions can be correct."""
    answered = {task.source.name: task for task in settings.answered()}
    if not answered:
        raise ChoiceError(
            "no task has completions that can be correct: set correct in a table of "
            "[tool.grpo-harness.data], or name task types in tasks"
        )
    for name in names or ():
        if name not in answered:
            raise ChoiceError(
                f"--task {escape(name)} is none of {together(sorted(answered))}, the tasks whose "
                "completions can be correct"
            )
    return [task for name, task in answered.items() if names is None or name in names]


def problems(settings: Settings, task: Task, usual: int = UNPLANNED) -> int:
    """Return how many problems of a task are asked: as set, or ``usual`` or all there are.

    Raises ``ChoiceError`` if they are too few to judge.
    """
    n = settings.problems
    n = n if isinstance(n, int) else len(task.source.at_most(usual))
    if n < MINIMUM_PROBLEMS:
        raise ChoiceError(
            f"{n} problems of {task.source.name} are too few to judge: "
            f"{MINIMUM_PROBLEMS} are needed"
        )
    return n


class Measured:
    """The rates of policies on rounds of problems, one of each task, drawn as they are needed.

    ``names`` has the candidates, in their order, and after them the bad and the good one: by the
    numbers that `search` has for them.
    """

    def __init__(
        self, session: Session, tasks: Sequence[Task], most: int, names: Sequence[PolicyName]
    ) -> None:
        self._session = session
        self._tasks = tasks
        self._most = most
        self._names = names
        self._policies: dict[int, Policy] = {}
        self._rates: dict[int, Floats] = {}
        self.completions = 0
        self.drawn = 0

    def rates(self, number: int, n: int) -> Floats:
        """Return the share of correct completions in each of the first ``n`` rounds, shape (n,)."""
        known = self._rates.get(number, np.empty(0))
        if len(known) < n:
            known = np.append(known, self._ask(self.policy(number), len(known), n))
            self._rates[number] = known
        return known[:n]

    def policy(self, number: int) -> Policy:
        """Return a policy, loaded once."""
        if number not in self._policies:
            self._policies[number] = load(self._names[number])
        return self._policies[number]

    def _ask(self, policy: Policy, start: int, stop: int) -> Floats:
        shares = []
        for task in self._tasks:
            questions = self._session.questions(policy, task.source, self._most)
            k = self._session.settings.draws(task.source)
            evaluation = self._session.ask(questions.part(start, stop), k)
            if reason := checks.failed([evaluation]):
                raise ChoiceError(reason)
            self.completions += (stop - start) * k
            self.drawn += evaluation.drawn
            shares.append([group.count("correct") / k for group in evaluation.groups])
        return np.asarray(np.mean(shares, axis=0))


def evaluations(
    session: Session, found: Sequence[Policy], asked: Mapping[str, int]
) -> list[list[Evaluation]]:
    """Ask every policy the problems of every task: as many as ``asked`` has, by its name.

    All questions are made before anything is drawn. Raises ``HarnessError``.
    """
    tasks = session.settings.tasks
    questions = [
        [session.questions(policy, tasks[name].source, n) for name, n in asked.items()]
        for policy in found
    ]
    return [[session.ask(q, session.settings.draws(q.task_type)) for q in of] for of in questions]
