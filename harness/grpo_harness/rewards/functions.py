"""Several reward functions: completions to score, weights, and what makes one correct."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

from grpo_harness.rewards.calls import (
    RewardError,
    RewardFunction,
    called,
    completion_of,
    reward_name,
    text_of,
)
from grpo_harness.tasks import Problem, Reading, Source
from grpo_harness.text import escape


@dataclass(frozen=True)
class Reward:
    """One reward function, and its weight in the total reward."""

    function: RewardFunction
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The function's name, by which TRL logs it."""
        return reward_name(self.function)


@dataclass(frozen=True)
class Correct:
    """A completion is correct if the reward of this name is at least ``at_least``."""

    reward: str
    at_least: float

    def reading(self, score: float | None) -> Reading:
        """Judge a completion by the score that decides; one without a score is unparsable."""
        if score is None:
            return "unparsable"
        return "correct" if score >= self.at_least else "wrong"


@dataclass(frozen=True)
class Batch:
    """Completions to score, as TRL hands them over. ``names`` are their ids, for messages.

    Every field has one entry per completion; ``completion_ids`` are token ids without padding.
    """

    names: Sequence[str]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        problems: Sequence[Problem],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Self:
        """Make a batch of one text per problem; a prompt that is a conversation gets a message.

        Texts without ``completion_ids`` have their bytes instead, which are as good for a trial.
        """
        columns = [source.columns(problem) for problem in problems]
        return cls(
            names=[problem.id for problem in problems],
            prompts=[problem.prompt for problem in problems],
            completions=[
                completion_of(p.prompt, text) for p, text in zip(problems, texts, strict=True)
            ],
            completion_ids=completion_ids or [list(text.encode()) for text in texts],
            columns={
                name: [row[name] for row in columns] for name in (columns[0] if columns else {})
            },
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def given(self) -> Mapping[str, Sequence[Any]]:
        """What a reward function gets of the completions, by the names of its arguments."""
        own = {"prompts": self.prompts, "completions": self.completions}
        own["completion_ids"] = self.completion_ids
        return {**own, **self.columns, **own}

    def part(self, first: int, last: int) -> "Batch":
        """Return the completions from ``first`` to before ``last``."""
        here = slice(first, last)
        return Batch(
            self.names[here],
            self.prompts[here],
            self.completions[here],
            self.completion_ids[here],
            {name: values[here] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class Log:
    """What rewards log beside their scores: for each completion its own values, and its batch's.

    A number that several calls log for a batch is their mean, as in TRL.
    """

    extra: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    _numbers: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def blank(cls, n: int) -> Self:
        """Return the log of a batch of ``n`` completions of which nothing is logged yet."""
        return cls([{} for _ in range(n)], [{} for _ in range(n)])

    def add(self, other: "Log") -> None:
        """Add the log of a further batch."""
        self.extra.extend(other.extra)
        self.metrics.extend(other.metrics)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Log a value for each completion, as TRL's ``log_extra`` does."""
        given = list(values)
        if len(given) != len(self.extra):
            raise ValueError(
                f"log_extra {column!r} has {len(given)} values for {len(self.extra)} completions"
            )
        for row, value in zip(self.extra, given, strict=True):
            row[str(column)] = value

    def log_metric(self, name: str, value: float) -> None:
        """Log a number of the batch, as TRL's ``log_metric`` does."""
        numbers = self._numbers.setdefault(str(name), [])
        numbers.append(float(value))
        for row in self.metrics:
            row[str(name)] = fmean(numbers)


Scores = Mapping[str, float | None]
"""The rewards of one completion, by the functions' names; ``None`` where one does not apply."""


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a task, and what makes a completion correct, if a reward does.

    ``seconds`` is the time that a function may take for ``batch`` completions; ``None`` is no
    limit.
    """

    functions: tuple[Reward, ...]
    correct: Correct | None = None
    seconds: float | None = None
    batch: int = 64

    def score(self, batch: Batch, where: str, log: Log | None = None) -> list[Scores]:
        """Score completions, some at a time, in order; ``log`` takes what the functions log.

        Raises ``RewardError`` as `score` does, also for a function that needs more than
        ``seconds``.
        """
        scores: list[Scores] = []
        for first in range(0, len(batch), self.batch):
            part = batch.part(first, first + self.batch)
            functions = [reward.function for reward in self.functions]
            own = Log.blank(len(part))
            found = self._called(functions, part, own, where)
            self._check(functions, part, where, found)
            names = [reward.name for reward in self.functions]
            scores += [dict(zip(names, row, strict=True)) for row in zip(*found, strict=True)]
            if log is not None:
                log.add(own)
        return scores

    def total(self, scores: Scores) -> float | None:
        """Return the weighted sum of a completion's scores, or ``None`` if no reward applies."""
        parts = [
            reward.weight * value
            for reward in self.functions
            if (value := scores[reward.name]) is not None
        ]
        return sum(parts) if parts else None

    def judge_answers(self, source: Source) -> bool:
        """Tell whether a completion can be correct: the source or a reward decides it."""
        return source.reads or self.correct is not None

    def reading(self, scores: Scores) -> Reading | None:
        """Judge a completion by the reward that decides, if there is one."""
        correct = self.correct
        return None if correct is None else correct.reading(scores[correct.reward])

    def _check(
        self, functions: Sequence[RewardFunction], batch: Batch, where: str, found: Sequence[object]
    ) -> None:
        """Raise the error of a function, if one has failed: of a completion, if it is one alone."""
        errors = [
            (function, error)
            for function, error in zip(functions, found, strict=True)
            if isinstance(error, RewardError)
        ]
        for function, _ in errors:
            for i in range(len(batch)):
                of = described(batch, i)
                (alone,) = self._called([function], batch.part(i, i + 1), Log.blank(1), where, of)
                if isinstance(alone, RewardError):
                    raise alone
        if errors:
            raise errors[0][1]

    def _called(
        self, functions: Sequence[RewardFunction], batch: Batch, log: Log, where: str, of: str = ""
    ) -> list[list[float | None] | RewardError]:
        also = {
            "trainer_state": None, "log_extra": log.log_extra, "log_metric": log.log_metric
        }  # fmt: skip
        return called(functions, batch.given, also, where, of, self.seconds)


def described(batch: Batch, i: int) -> str:
    """Tell which completion of a batch a message is about."""
    return f" (problem {batch.names[i]}, completion '{escape(text_of(batch.completions[i]), 80)}')"
