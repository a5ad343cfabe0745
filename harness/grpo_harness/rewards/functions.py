"""Load, call and check reward functions with TRL's calling convention; weigh several of them.

Evaluation and training both use it: an error of a reward is one line that names the reward.
"""

import asyncio
import copy
import functools
import importlib
import inspect
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.tasks import Problem, Reading, Source
from grpo_harness.text import digest, escape, one_line, shown

RewardFunction = Callable[..., Any]
"""Scores completions pairwise, ``(prompts, completions, completion_ids, **columns)``, as TRL calls
it: one number or ``None`` for each. It may be a coroutine function.
"""

GREATEST = 1e18
"""The largest reward: the square of a larger one would not fit into TRL's float32 sums."""


class RewardError(HarnessError):
    """A reward cannot be loaded or used. One line: its name, and what it did."""


def load_reward(source: str) -> RewardFunction:
    """Return the reward that ``module:function`` names. Raises ``RewardError``.

    A class is a reward by its instance, made without arguments.
    """
    module, _, function = source.partition(":")
    with user_code(
        lambda error: RewardError(
            f"'{escape(source)}' is not the module:function of a reward that can be imported "
            f"({one_line(error)})"
        )
    ):
        reward = getattr(importlib.import_module(module), function)
        if inspect.isclass(reward):
            reward = reward()
    if not callable(reward):
        raise RewardError(f"'{escape(source)}' is {type(reward).__name__}, not a function")
    found: RewardFunction = reward
    return found


def reward_name(reward: RewardFunction) -> str:
    """Return the name by which TRL logs a reward, which may be any callable."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def score(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    where: str,
    of: str = "",
    seconds: float | None = None,
    **columns: Any,
) -> list[float | None]:
    """Return one reward per completion, in order; ``None`` is a reward that does not apply.

    The function gets copies of ``prompts`` and ``completions``; ``columns`` are passed on as they
    are. ``where`` begins the message of an error, and ``of`` tells which completion it is. Raises
    ``RewardError`` if the function raises, exits, changes what it is given or needs more than
    ``seconds``, or returns anything but one number or ``None`` for each completion; infinities and
    NaN are not numbers.
    """
    named = f"{where}: the reward {escape(reward_name(reward))}{of}"
    with user_code(
        lambda error: RewardError(
            f"{named} {error}: make it faster, or raise reward_seconds"
            if isinstance(error, _TooSlowError)
            else f"{named} raised {one_line(error)}: fix it, or let it return None for what it "
            "cannot score"
        )
    ):
        given = {"prompts": _copies(prompts), "completions": _copies(completions), **columns}
        with _limited(seconds):
            returned: Any = reward(**given)
            if inspect.isawaitable(returned):
                returned = _awaited(returned)
        if given["prompts"] != list(prompts) or given["completions"] != list(completions):
            raise ValueError("it changes the prompts or completions that it is given")
        scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"{named} returned {type(returned).__name__}: it must return a list of one number "
            "for each completion"
        )
    if len(scores) != len(completions):
        raise RewardError(
            f"{named} returned {len(scores)} numbers for {len(completions)} completions: it must "
            "return one each, in order"
        )
    checked = [_number(value) for value in scores]
    for value, number, completion in zip(scores, checked, completions, strict=True):
        if number is None and value is not None:
            raise RewardError(
                f"{named} returned {escape(shown(value), 80)} for the completion "
                f"'{escape(text_of(completion))}': it must return a number within ±{GREATEST:g}, "
                "or None for what it does not apply to"
            )
    return checked


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
                text if isinstance(p.prompt, str) else [{"role": "assistant", "content": text}]
                for p, text in zip(problems, texts, strict=True)
            ],
            completion_ids=completion_ids or [list(text.encode()) for text in texts],
            columns={
                name: [row[name] for row in columns] for name in (columns[0] if columns else {})
            },
        )

    def __len__(self) -> int:
        return len(self.names)

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

    def score(self, batch: Batch, where: str) -> list[Scores]:
        """Score completions, some at a time, in order. Raises ``RewardError`` as `score` does."""
        scores: list[Scores] = []
        for first in range(0, len(batch), self.batch):
            part = batch.part(first, first + self.batch)
            columns = [self._column(reward, part, where) for reward in self.functions]
            names = [reward.name for reward in self.functions]
            scores += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
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

    def _column(self, reward: Reward, batch: Batch, where: str) -> list[float | None]:
        """Score a batch by one reward; an error names the completion, if it is one alone."""
        try:
            return self._called(reward, batch, where)
        except RewardError:
            for i in range(len(batch)):
                text = escape(text_of(batch.completions[i]), 80)
                of = f" (problem {batch.names[i]}, completion '{text}')"
                self._called(reward, batch.part(i, i + 1), where, of)
            raise

    def _called(self, reward: Reward, batch: Batch, where: str, of: str = "") -> list[float | None]:
        return score(
            reward.function,
            batch.prompts,
            batch.completions,
            where=where,
            of=of,
            seconds=self.seconds,
            completion_ids=[list(ids) for ids in batch.completion_ids],
            **copy.deepcopy(dict(batch.columns)),
            trainer_state=None,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
        )


def try_on(rewards: Rewards, source: Source) -> None:
    """Score the true answer, or some text, and no text of a problem. Raises ``RewardError``."""
    (problem,) = source.problems(1)
    batch = Batch.of(source, [problem] * 2, [source.wanted(problem) or "I do not know.", ""])
    rewards.score(batch, source.name)


def trials(source: Source) -> list[tuple[Problem, str]]:
    """Return the texts that rewards are tried on: forms of true answers, and texts without one."""
    found = []
    for problem in source.problems(32):
        right = source.wanted(problem)
        texts = (*(() if right is None else _forms(right)), "", "I know", "x" * 300)
        found += [(problem, text) for text in texts]
    return found


def rewards_digest(rewards: Rewards, source: Source) -> str:
    """Digest what rewards do on a source's problems: their scores of right and wrong texts.

    The scores are hashed, not the code: a changed comment changes nothing, and a changed rule does,
    wherever in the code it is. Raises ``RewardError``, also for a reward whose scores differ from
    call to call or that changes what it is given.
    """
    tried = trials(source)
    batch = Batch.of(source, [problem for problem, _ in tried], [text for _, text in tried])
    found = rewards.score(batch, source.name)
    for first, again in zip(found, rewards.score(batch, source.name), strict=True):
        for name in first:
            if first[name] != again[name]:
                raise RewardError(
                    f"{source.name}: the reward {escape(name)} scored the same completion "
                    f"{first[name]} and then {again[name]}: it must not differ from call to call"
                )
    if len(rewards.functions) == 1 and rewards.functions[0].weight == 1 and not rewards.correct:
        return digest(json.dumps([value for scores in found for value in scores.values()]))
    how = [[reward.name, reward.weight] for reward in rewards.functions]
    return digest(json.dumps([how, repr(rewards.correct), [list(s.values()) for s in found]]))


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a text or a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _forms(right: str) -> tuple[str, ...]:
    return (
        right,
        f"  {right}\n",
        f"```\n{right}\n```",
        f"```python\n{right}\n```",
        f"答案是 {right}。",
        f"{right} {right}",
        f"'{right}'",
        right.lower(),
        right[::-1],
        f"1{right}",
    )


class _TooSlowError(Exception):
    """A reward did not return in time."""


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raise ``_TooSlowError`` inside after so many seconds; only in the main thread."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _TooSlowError(f"did not return within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _awaited(scores: Any) -> Any:
    """Wait for the scores of a coroutine function, also where an event loop is running."""

    async def wait() -> Any:
        return await scores

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(wait())))
    thread.start()
    thread.join()
    return found[0]


def _copies(texts: Sequence[Any]) -> list[Any]:
    """Copy texts, and conversations with their messages."""
    return [text if isinstance(text, str) else copy.deepcopy(text) for text in texts]


def _number(value: Any) -> float | None:
    """Return a score as a float, or ``None`` if it is not a finite number."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # a foreign type may raise anything
        return None
    return number if abs(number) <= GREATEST else None
