"""What a run asks: each task with its source, its rewards and its sampling.

A task is a built-in type, a type in a ``.py`` file, or a data set that
``[tool.grpo-harness.data.NAME]`` describes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from grpo_harness.engines.engine import Sampling
from grpo_harness.errors import user_code
from grpo_harness.gate.bounds import ALPHA, RELATIVE, Sizes
from grpo_harness.tables import Model, SettingsError, converted
from grpo_harness.text import escape, one_line

if TYPE_CHECKING:
    from grpo_harness.rewards.calls import RewardFunction
    from grpo_harness.rewards.functions import Correct, Rewards
    from grpo_harness.tasks import Source

_Text = Annotated[str, Meta(min_length=1)]
_Finite = Annotated[float, Meta(ge=-1e18, le=1e18)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which changes a rule finds, and which it never fails; see `gate.bounds.Sizes`."""

    margin: Annotated[
        float | str | None, Meta(description="a number, a percentage such as '10%', or '0.1 sd'")
    ] = None
    minimum: Annotated[
        float | str | None, Meta(description="a number, a percentage such as '10%', or '0.1 sd'")
    ] = None


class TaskGate(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table of one task, ``[tool.grpo-harness.gate.tasks.NAME]``.

    ``margin`` and ``minimum`` are those of the rules that judge a share of completions; ``rules``
    has those of single rules, by name.
    """

    allow_floor: Annotated[
        bool | None, Meta(description="judge accuracy also where there is nothing to lose")
    ] = None
    rules: Annotated[dict[str, Any], Meta(description="a table with a table for each rule")] = {}


class GateTable(TaskGate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[tool.grpo-harness.gate]``, of a run."""

    alpha: Annotated[
        float, Meta(gt=0, lt=1, description="the risk of a false alarm, of all checks together")
    ] = ALPHA
    tasks: Annotated[dict[str, Any], Meta(description="a table with a table for each task")] = {}


class CorrectTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which reward decides that a completion is correct."""

    reward: Annotated[str, Meta(description="the name of a reward", min_length=1)]
    at_least: Annotated[
        float, Meta(ge=-1e18, le=1e18, description="the least score of a correct one, finite")
    ] = 1.0


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A data set of the project, ``[tool.grpo-harness.data.NAME]``."""

    path: Annotated[
        str,
        Meta(
            min_length=1,
            description="a .jsonl, .json, .csv or .parquet file, a folder that datasets saved, "
            "module:function, or the id of a data set on the Hub",
        ),
    ]
    split: Annotated[str | None, Meta(description="a split")] = None
    name: Annotated[str | None, Meta(description="a config of a data set")] = None
    revision: Annotated[str | None, Meta(description="a revision")] = None
    prompt: Annotated[str, Meta(description="the column of the prompt", min_length=1)] = "prompt"
    answer: Annotated[str | None, Meta(description="the column of the true answer")] = None
    id: Annotated[str | None, Meta(description="the column of the row's id")] = None
    slices: Annotated[list[_Text], Meta(description="a list of columns")] = []
    gate_slices: Annotated[bool, Meta(description="judge the accuracy of each slice")] = False
    system: Annotated[str | None, Meta(description="a system message; empty for none")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Meta(description="a table of variables of the chat template")
    ] = {}
    rewards: Annotated[
        list[_Text] | None, Meta(description="a list of rewards, each as module:function")
    ] = None
    reward_weights: Annotated[
        list[_Finite] | None, Meta(description="a list of finite numbers, one for each reward")
    ] = None
    correct: Annotated[
        CorrectTable | None, Meta(description="reward, and the score that it must reach")
    ] = None
    sampling: Annotated[
        dict[str, Any], Meta(description="a table: what differs from the run's sampling")
    ] = {}


@dataclass(frozen=True)
class Task:
    """What is asked under one name: where problems come from, how they are put, drawn and scored.

    ``system`` is the system message, ``template`` has further variables of the chat template.
    ``bounds`` has the project's own, by rule; with ``allow_floor`` a recorded accuracy may be too
    low to lose its margin, and with ``gate_slices`` each slice is judged.
    """

    source: Source
    rewards: Rewards
    sampling: Sampling
    system: str | None
    template: Mapping[str, Any]
    bounds: Mapping[str, Sizes] = field(default_factory=dict)
    allow_floor: bool = False
    gate_slices: bool = False

    def asks(self, rule: str) -> bool:
        """Tell whether a rule has something to judge on this task."""
        from grpo_harness.rules import ANSWERS

        if rule == "rewards":
            return len(self.rewards.functions) > 1
        if rule == "lenient":
            return self.source.reads
        if rule == "slices" and not (self.gate_slices and self.source.slices):
            return False
        return rule not in ANSWERS or self.rewards.judge_answers(self.source)


@dataclass(frozen=True)
class Defaults:
    """What holds for every task that does not say otherwise."""

    reward: str | None
    seconds: float
    sampling: Sampling
    system: str
    template: Mapping[str, Any]
    gate: GateTable
    bounds: Mapping[str, Sizes]


def tasks(
    names: Sequence[str] | None,
    data: Mapping[str, Any],
    defaults: Defaults,
    home: Path,
    where: Callable[[str], str],
) -> dict[str, Task]:
    """Return the tasks of a run by name, in their order.

    Without ``names`` they are the data sets, or else all built-in types. ``where`` returns the
    place of a key, for messages. Raises ``SettingsError``.
    """
    from grpo_harness.tasks import task_types

    if str(home) not in sys.path:
        sys.path.append(str(home))  # as TRL does, so that rewards in the project are found
    if names is None:
        names = [*data] or [*task_types()]
    found: dict[str, Task] = {}
    for name in names:
        task = _of_data(name, data[name], defaults, home, where) if name in data else None
        if task is None:
            task = _of_type(name, defaults, home, where("tasks"), data)
        if task.source.name in found:
            raise SettingsError(f"{where('tasks')} has {task.source.name!r} twice")
        found[task.source.name] = _judged(task, defaults, where("gate."))
    if not found:
        raise SettingsError(f"{where('tasks')} is empty: there is nothing to ask")
    for name in defaults.gate.tasks.keys() - found.keys():
        raise SettingsError(f"{where('gate.tasks')} has no such task: '{escape(name)}'")
    return found


def _judged(task: Task, defaults: Defaults, where: str) -> Task:
    """Return a task with its bounds: its own over the project's."""
    name, gate = task.source.name, defaults.gate
    place = f"{where.removesuffix('.]')}.tasks.{name}]"
    own = _table(gate.tasks.get(name, {}), TaskGate, place)
    allow_floor = gate.allow_floor if own.allow_floor is None else own.allow_floor
    found = bounds(own, place, defaults.bounds)
    return replace(task, bounds=found, allow_floor=bool(allow_floor))


def bounds(
    table: TaskGate, place: str, project: Mapping[str, Sizes] | None = None
) -> dict[str, Sizes]:
    """Return the bounds that a table sets, by rule: for a rule over for all.

    The table of a task has those of the ``project`` too, and cannot change those of `TOGETHER`.
    Raises ``SettingsError``.
    """
    from grpo_harness.rules import RULES, TOGETHER, rates

    known = [name for name in RULES if project is None or name != TOGETHER]
    for name in table.rules.keys() - known:
        raise SettingsError(
            f"{place} has no rule '{escape(name)}': the rules are {', '.join(known)}"
        )
    limits: dict[str, Limits] = {}
    if (table.margin, table.minimum) != (None, None):
        limits = {name: table for name in rates() if name in known}
    limits |= {
        name: _table(given, Limits, f"{place.removesuffix(']')}.rules.{name}]")
        for name, given in table.rules.items()
    }
    found = dict(project or {})
    for name, limit in limits.items():
        before = found.get(name, RULES[name].bounds)
        margin = before.margin if limit.margin is None else limit.margin
        minimum = before.minimum if limit.minimum is None else limit.minimum
        found[name] = Sizes(margin, minimum)
        _check_sizes(name, found[name], place)
    return found


def _check_sizes(rule: str, sizes: Sizes, where: str) -> None:
    """Raise ``SettingsError`` for sizes that no recorded value makes sense of."""
    from grpo_harness.rules import RULES

    measured = RULES[rule].measure.unit
    numbers: list[tuple[float, str]] = []
    for size in (sizes.margin, sizes.minimum):
        found = RELATIVE.fullmatch(size) if isinstance(size, str) else None
        number, unit = (float(found[1]), found[2]) if found else (size, "")
        if isinstance(number, str) or not 0 <= number < 1e18:
            raise SettingsError(
                f"{where} has the size {escape(repr(size))}: it must be a number from 0 on, a "
                "percentage such as '10%', or '0.1 sd'"
            )
        if unit == "sd" and measured != "reward":
            raise SettingsError(
                f"{where} has the size {size!r} for {rule}: only rewards have a standard deviation"
            )
        if measured == "%" and number >= (100 if unit else 1):
            raise SettingsError(
                f"{where} has the size {size!r} for {rule}: a share of completions is less than "
                "1, or 100%"
            )
        numbers.append((number, unit))
    (margin, one), (minimum, other) = numbers
    # A gain must be above its margin; its minimum is that of a loss.
    if one == other and minimum >= margin and rule != "improvement":
        raise SettingsError(
            f"{where} has minimum {sizes.minimum} and margin {sizes.margin}: the minimum must be "
            "less than the margin"
        )


def _table(given: Any, model: type[Model], place: str) -> Model:
    if not isinstance(given, Mapping):
        raise SettingsError(f"{place} is {escape(repr(given))}: it must be a table")
    return converted(given, model, lambda path: f"{place}{''.join(f'.{p}' for p in path[:-1])} ")


def _of_type(
    name: str, defaults: Defaults, home: Path, where: str, data: Mapping[str, Any]
) -> Task:
    from grpo_harness.rewards.functions import Reward, Rewards
    from grpo_harness.tasks import load_task_type

    source = str(home / name) if name.endswith(".py") else name
    known = f"; data sets are {', '.join(map(escape, data))}" if data else ""
    with user_code(
        lambda error: SettingsError(
            f"{where}: {error if isinstance(error, ValueError) else one_line(error)}{known}"
        )
    ):
        task_type = load_task_type(source)
    function = _function(defaults.reward, where.removesuffix("tasks") + "reward")
    rewards = Rewards((Reward(function),), seconds=defaults.seconds)
    return Task(task_type, rewards, defaults.sampling, defaults.system, defaults.template)


def _of_data(
    name: str, given: Any, defaults: Defaults, home: Path, where: Callable[[str], str]
) -> Task:
    from grpo_harness.tasks import task_types
    from grpo_harness.tasks.dataset import DatasetSource
    from grpo_harness.tasks.sources import NAME

    place = where(f"data.{escape(name)}")
    if not NAME.fullmatch(name) or name in task_types():
        raise SettingsError(
            f"{place}: a data set's name is 1 to 64 letters, digits, '_', '-' and '.', and not "
            "that of a built-in task type"
        )
    table = _table(given, Data, place)
    if table.gate_slices and not (table.slices and table.correct):
        lacks = "correct" if table.slices else "slices"
        raise SettingsError(f"{place} has gate_slices = true and no {lacks}: set it too")
    source = DatasetSource(
        name=name,
        path=table.path,
        home=home,
        split=table.split,
        config=table.name,
        revision=table.revision,
        prompt=table.prompt,
        answer=table.answer,
        row_id=table.id,
        slices=tuple(table.slices),
    )
    sampling = converted(
        {**msgspec.structs.asdict(defaults.sampling), **table.sampling},
        Sampling,
        lambda _: f"{place}.sampling ",
    )
    template = {**defaults.template, **table.chat_template_kwargs}
    rewards = _rewards(table, defaults, place)
    return Task(source, rewards, sampling, table.system, template, gate_slices=table.gate_slices)


def _rewards(table: Data, defaults: Defaults, place: str) -> Rewards:
    from grpo_harness.rewards.functions import Reward, Rewards

    names = table.rewards or ([] if defaults.reward is None else [defaults.reward])
    if not names:
        raise SettingsError(f"{place} has no rewards: name at least one, as module:function")
    weights = [1.0] * len(names) if table.reward_weights is None else table.reward_weights
    if len(weights) != len(names):
        raise SettingsError(
            f"{place} has {len(weights)} reward_weights for {len(names)} rewards: give one each"
        )
    functions = tuple(
        Reward(_function(name, f"{place} rewards"), weight)
        for name, weight in zip(names, weights, strict=True)
    )
    known = [reward.name for reward in functions]
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise SettingsError(
            f"{place} has two rewards of the name {escape(twice)}, by which they are told apart: "
            "rename one of the functions"
        )
    return Rewards(functions, _correct(table, known, place), defaults.seconds)


def _correct(table: Data, known: Sequence[str], place: str) -> Correct | None:
    from grpo_harness.rewards.functions import Correct

    if table.correct is None:
        return None
    name = re.sub(r".*[:.]", "", table.correct.reward)
    if name not in known:
        raise SettingsError(
            f"{place}.correct reward is '{escape(name)}': it must be one of {', '.join(known)}"
        )
    return Correct(name, table.correct.at_least)


def _function(source: str | None, where: str) -> RewardFunction:
    from grpo_harness.rewards.calls import RewardError, load_reward
    from grpo_harness.rewards.rule import reward_func

    if source is None:
        return reward_func
    try:
        return load_reward(source)
    except RewardError as error:
        raise SettingsError(f"{where}: {error}") from error
