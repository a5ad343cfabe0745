"""Load and call reward functions with TRL's calling convention.

Evaluation and training both use it: an error of a reward is one line that names the reward.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.rewards.timed import TooSlowError, awaited, limited, listed, tried
from grpo_harness.text import escape, one_line, shown

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


def waits(reward: RewardFunction) -> bool:
    """Tell whether a reward is a coroutine function, or an object that is called as one."""
    while isinstance(reward, partial):
        reward = reward.func
    return any(map(inspect.iscoroutinefunction, (reward, reward.__call__)))  # type: ignore[operator]


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
    (found,) = called([reward], given, columns, where)
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
        returned: Any = listed(await reward(**own, **columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        returned = error
    return _scores(f"{where}: the reward {escape(reward_name(reward))}", given, own, returned)


def called(
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
        with limited(seconds):
            return listed(reward(**own, **also))

    returned = [
        tried(partial(call, reward, own)) for reward, own in zip(rewards, copies, strict=True)
    ]
    if waiting := [i for i, value in enumerate(returned) if inspect.isawaitable(value)]:
        values = tried(lambda: awaited([returned[i] for i in waiting], seconds))
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
            if isinstance(error, TooSlowError)
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


def completion_of(prompt: Any, text: str) -> Any:
    """Return a completion as rewards get it: a text, or a message where the prompt has some."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a text or a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


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
