"""Load, call and check reward functions with TRL's calling convention; weigh several of them.

Evaluation and training both use it: an error of a reward is one line that names the reward.
"""

import asyncio
import atexit
import copy
import importlib
import inspect
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import fmean
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
    """Return the reward that ``module:function`` names, or ``module.function`` as in TRL.

    Raises ``RewardError``. A class is a reward by its instance, made without arguments.
    """
    module, _, function = source.partition(":") if ":" in source else source.rpartition(".")
    with user_code(
        lambda error: RewardError(
            f"'{escape(source)}' is not the module:function of a reward that can be imported "
            f"({one_line(error)})"
        )
    ):
        reward = getattr(importlib.import_module(module), function)
        if inspect.isclass(reward):
            reward = reward()
    if any(kind.__module__.startswith("torch.nn.") for kind in type(reward).__mro__):
        raise RewardError(
            f"'{escape(source)}' is a reward model, and what it is given depends on its tokenizer: "
            "name a function that calls it on texts"
        )
    if not callable(reward):
        raise RewardError(f"'{escape(source)}' is {type(reward).__name__}, not a function")
    found: RewardFunction = reward
    return found


def reward_name(reward: RewardFunction) -> str:
    """Return the name by which TRL logs a reward, which may be any callable."""
    while isinstance(reward, partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def score(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    where: str,
) -> list[float | None]:
    """Return one reward per completion, in order; ``None`` is a reward that does not apply.

    The function gets copies of ``prompts`` and ``completions``; ``columns`` are passed on as they
    are. ``where`` begins the message of an error. Raises ``RewardError`` if the function raises,
    exits, or changes what it is given, or returns anything but one number or ``None`` for each
    completion; infinities and NaN are not numbers.
    """
    given = {"prompts": prompts, "completions": completions}
    (found,) = _called([reward], given, columns, where)
    if isinstance(found, RewardError):
        raise found
    return found


async def score_awaited(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    where: str,
) -> list[float | None]:
    """Score as `score` does, by a coroutine function, so that several can wait together."""
    given = {"prompts": prompts, "completions": completions}
    own = {name: _copied(values) for name, values in given.items()}
    try:
        returned: Any = _listed(await reward(**own, **columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        returned = error
    return _scores(f"{where}: the reward {escape(reward_name(reward))}", given, own, returned)


def waits(reward: RewardFunction) -> bool:
    """Tell whether a reward is a coroutine function, or an object that is called as one."""
    while isinstance(reward, partial):
        reward = reward.func
    return any(map(inspect.iscoroutinefunction, (reward, reward.__call__)))  # type: ignore[operator]


def _called(
    rewards: Sequence[RewardFunction],
    given: Mapping[str, Sequence[Any]],
    also: Mapping[str, Any],
    where: str,
    of: str = "",
    seconds: float | None = None,
) -> list[list[float | None] | RewardError]:
    """Call rewards, and return what each scored, or its error.

    Coroutine functions wait together, as in TRL. Each function gets copies of what is ``given``,
    which it may not change, and ``also`` as it is. ``of`` tells which completion it is.
    """
    copies = [{name: _copied(values) for name, values in given.items()} for _ in rewards]

    def call(reward: RewardFunction, own: Mapping[str, Any]) -> Any:
        with _limited(seconds):
            return _listed(reward(**own, **also))

    returned = [
        _tried(partial(call, reward, own)) for reward, own in zip(rewards, copies, strict=True)
    ]
    if waiting := [i for i, value in enumerate(returned) if inspect.isawaitable(value)]:
        values = _tried(lambda: _awaited([returned[i] for i in waiting], seconds))
        for place, i in enumerate(waiting):
            returned[i] = values if isinstance(values, BaseException) else values[place]
    found: list[list[float | None] | RewardError] = []
    for reward, own, value in zip(rewards, copies, returned, strict=True):
        named = f"{where}: the reward {escape(reward_name(reward))}{of}"
        try:
            found.append(_scores(named, given, own, value))
        except RewardError as error:
            found.append(error)
    return found


def _scores(
    named: str, given: Mapping[str, Sequence[Any]], own: Mapping[str, Any], returned: Any
) -> list[float | None]:
    """Check what a reward returned, or raised, and what it did to its ``own`` copies."""
    with user_code(
        lambda error: RewardError(
            f"{named} {error}: make it faster, or raise reward_seconds"
            if isinstance(error, _TooSlowError)
            else f"{named} raised {one_line(error)}: fix it, or let it return None for what it "
            "cannot score"
        )
    ):
        if isinstance(returned, BaseException):
            raise returned
        scores: Any = returned.tolist() if hasattr(returned, "tolist") else returned
    for name, values in given.items():
        if own[name] != [list(v) if isinstance(v, tuple) else v for v in values]:
            raise RewardError(
                f"{named} changes the {escape(name)} that it is given, which other rewards and the "
                "training get too: let it work on a copy"
            )
    completions = given["completions"]
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
                of = _of(batch, i)
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
        return _called(functions, batch.given, also, where, of, self.seconds)


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
    for i, again in enumerate(rewards.score(batch, source.name)):
        for name, first in found[i].items():
            if not alike(first, again[name]):
                raise RewardError(
                    f"{source.name}: the reward {escape(name)}{_of(batch, i)} scored the same "
                    f"completion {first} and then {again[name]}: it must not differ from call to "
                    "call"
                )
    if len(rewards.functions) == 1 and rewards.functions[0].weight == 1 and not rewards.correct:
        return digest(json.dumps([value for scores in found for value in scores.values()]))
    how = [[reward.name, reward.weight] for reward in rewards.functions]
    return digest(json.dumps([how, repr(rewards.correct), [list(s.values()) for s in found]]))


def alike(one: float | None, other: float | None) -> bool:
    """Tell whether two scores are equal, but for the last digits of a reward that is a network."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-8)


def completion_of(prompt: Any, text: str) -> Any:
    """Return a completion as rewards get it: a text, or a message where the prompt has some."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a text or a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _of(batch: Batch, i: int) -> str:
    """Tell which completion of a batch a message is about."""
    return f" (problem {batch.names[i]}, completion '{escape(text_of(batch.completions[i]), 80)}')"


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


class _TooSlowError(BaseException):
    """A reward did not return in time. No ``except Exception`` of the reward's own stops it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"did not return within {seconds:g} seconds")


@contextmanager
def _limited(seconds: float | None, grace: float = 0.0) -> Iterator[None]:
    """Raise ``_TooSlowError`` inside after so many seconds, or at the end if that was prevented.

    It is raised inside only in the main thread, and ``grace`` seconds later. A thread sends the
    alarm, again and again, because a reward may use the process's timer, as math-verify does.
    """
    if seconds is None:
        yield
        return
    end, ended = time.monotonic() + seconds + grace, threading.Event()
    main = threading.current_thread() is threading.main_thread()
    caller = threading.get_ident()

    def ring(*how: Any) -> None:
        if time.monotonic() >= end:
            raise _TooSlowError(seconds)
        if callable(before):
            before(*how)

    def watch() -> None:
        while not ended.wait(seconds + grace):
            if signal.getsignal(signal.SIGALRM) is ring:
                signal.pthread_kill(caller, signal.SIGALRM)

    before = signal.getsignal(signal.SIGALRM)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        if main:
            signal.signal(signal.SIGALRM, ring)
            watcher.start()
        yield
    finally:
        ended.set()
        if main:
            watcher.join()
            signal.signal(signal.SIGALRM, before)
    if time.monotonic() > end:
        raise _TooSlowError(seconds)


def _awaited(coroutines: Sequence[Any], seconds: float | None) -> list[Any]:
    """Wait for coroutines together: what each returned or raised. Also where a loop is running."""

    async def one(coroutine: Any) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return _listed(await coroutine)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if seconds is not None and isinstance(error, TimeoutError) and limit.expired():
                return _TooSlowError(seconds)
            return error

    async def together() -> list[Any]:
        return await asyncio.gather(*map(one, coroutines))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Those that wait tell by themselves which of them is slow.
        with _limited(seconds, grace=1):
            return _run(together)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, together()).result()


@cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # leaves the current loop alone
    atexit.register(runner.close)
    return runner


def _run(function: Callable[[], Coroutine[Any, Any, list[Any]]]) -> list[Any]:
    """Run a coroutine function in the loop of all rewards: clients that they keep belong to it."""
    try:
        return _runner().run(function())
    except BaseException:  # what it left running ends with the loop
        _runner().close()
        _runner.cache_clear()
        raise


def _tried(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or what it raises: also an exit, or a skip of pytest."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error


def _listed(values: Any) -> Any:
    return list(values) if isinstance(values, Iterator) else values


def _copied(values: Sequence[Any]) -> list[Any]:
    """Copy values that have an entry for each completion; token ids as lists, as in TRL."""
    return [list(v) if isinstance(v, tuple) else copy.deepcopy(v) for v in values]


def _number(value: Any) -> float | None:
    """Return a score as a float, or ``None`` if it is not a finite number."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # a foreign type may raise anything
        return None
    return number if abs(number) <= GREATEST else None
