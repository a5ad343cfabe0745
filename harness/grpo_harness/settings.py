"""The settings of a run: options over ``[tool.grpo-harness]`` over defaults, in one model.

The options of the command line, the keys of the table, their types and the messages about wrong
values derive from :class:`Table`. Importing the model loads nothing heavy, no task and no reward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from grpo_harness.asked import Defaults, GateTable, Task, bounds, tasks
from grpo_harness.engines.endpoint import Endpoint
from grpo_harness.engines.engine import Sampling
from grpo_harness.gate.bounds import MOST_PROBLEMS, MOST_SAMPLES, Sizes
from grpo_harness.served import Role, served
from grpo_harness.tables import SettingsError, converted
from grpo_harness.text import escape, one_line, plain

if TYPE_CHECKING:
    from grpo_harness.policy import PolicyName
    from grpo_harness.tasks import Source

ROLES: tuple[Role, ...] = ("base", "trained")
"""The roles of policies in a run."""

TABLE = "tool.grpo-harness"


def _key(
    description: str,
    metavar: str | None = None,
    *,
    option: bool = True,
    repeats: bool = False,
    **limits: Any,
) -> Meta:
    """Describe a key and its limits.

    With ``option`` the command line has it too, and with ``repeats`` several times.
    """
    extra = {"option": option, "metavar": metavar, "repeats": repeats}
    return Meta(description=description, extra=extra, **limits)


_Name = Annotated[str, Meta(min_length=1)]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, with its type, its limits and its description."""

    base: Annotated[
        str,
        _key(
            "the base policy: a folder, nano-base, nano-trained, smollm2, or the id "
            "of a model on ModelScope or Hugging Face, which may end in @revision",
            "POLICY",
            min_length=1,
        ),
    ] = "nano-base"
    trained: Annotated[
        _Name | Annotated[list[_Name], Meta(min_length=1)],
        _key(
            "the GRPO-trained policy, named like the base policy; or several candidates: a quoted "
            "pattern of folders such as 'out/checkpoint-*', or the option several times (in the "
            "table: a list)",
            "POLICY",
            repeats=True,
        ),
    ] = "nano-trained"
    tasks: Annotated[
        list[_Name] | None,
        _key(
            "a list of tasks: built-in types, paths of .py files, and data sets of the table data",
            option=False,
        ),
    ] = None
    data: Annotated[
        dict[str, Any], _key("a table with a table for each data set", option=False)
    ] = {}
    problems: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_PROBLEMS)] | Literal["auto"],
        _key(
            f"a number of problems per task type, 1 to {MOST_PROBLEMS}, or auto: as many as find "
            "the margin",
            "N",
        ),
    ] = "auto"
    samples: Annotated[
        int,
        _key(
            f"completions per problem, 1 to {MOST_SAMPLES}; with auto problems the least number",
            "K",
            ge=1,
            le=MOST_SAMPLES,
        ),
    ] = 4
    minutes: Annotated[
        Annotated[float, Meta(gt=0, le=1e6)] | None,
        _key("a number of minutes, above 0: each row asks what finds most in them", "M"),
    ] = None
    sampling: Annotated[Sampling, _key("how completions are drawn", option=False)] = Sampling()
    reward: Annotated[
        str | None, _key("a reward as module:function; the rule reward if left out", option=False)
    ] = None
    system: Annotated[
        str, _key("the system message of generated tasks; empty for none", option=False)
    ] = "You are a helpful assistant."
    chat_template_kwargs: Annotated[
        dict[str, Any], _key("a table of variables of the chat template", option=False)
    ] = {}
    gate: Annotated[
        GateTable, _key("a table: alpha, margin, minimum, allow_floor", option=False)
    ] = GateTable()
    reward_seconds: Annotated[
        float, _key("seconds that a reward may take for 64 completions", option=False, gt=0, le=1e6)
    ] = 60.0
    baselines: Annotated[str, _key("the folder of the baselines", "DIR", min_length=1)] = (
        "baselines"
    )
    sequential: Annotated[bool, _key("stop drawing once every check is decided")] = False
    engine: Annotated[
        Literal["local", "ray"],
        _key("local or ray: what draws, this machine or the workers of a Ray cluster", "ENGINE"),
    ] = "local"
    device: Annotated[
        str, _key("auto (CUDA where there is one), cpu, cuda, …", "DEVICE", min_length=1)
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _key("auto, bfloat16, float16 or float32: the number format", "DTYPE"),
    ] = "auto"
    serve: Annotated[
        dict[str, Any],
        _key("a table with a table (url, model, …) for each role or policy served", option=False),
    ] = {}
    resident: Annotated[
        Literal["auto", "one", "all"],
        _key("auto, one or all: how many policies hold their weights at once", option=False),
    ] = "auto"
    recipe: Annotated[
        _Name | list[_Name] | None,
        _key("a recipe in a .yaml file, or a list of them, to guard", option=False),
    ] = None
    recipe_policy: Annotated[
        _Name | None,
        _key("the policy of the recipes' smoke runs; the recipe's own, small", option=False),
    ] = None
    training: Annotated[
        _Name | None, _key("the folder of a training run, whose log is judged", "DIR")
    ] = None
    history: Annotated[
        _Name | None, _key("the folder of a history, to which each run adds a small file", "DIR")
    ] = None


@dataclass(frozen=True)
class Setting:
    """One key of :class:`Table` as the command line and messages need it."""

    name: str
    kind: Callable[[str], Any]
    description: str
    metavar: str | None
    is_option: bool
    repeats: bool


_NUMBERS = {"problems", "minutes"}
"""The keys that may be a number, and something else too."""


def _number(text: str) -> int | float | str:
    """Return the number that a text is, or the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def table_settings() -> Iterator[Setting]:
    """Yield every key of the table, in its order."""
    for name, hint in get_type_hints(Table, include_extras=True).items():
        kind, meta = get_args(hint)
        numbers = {int, float} & {
            *get_args(kind),
            *(part for a in get_args(kind) for part in get_args(a)),
        }
        plain = kind if isinstance(kind, type) else _number if numbers else str
        of = meta.extra
        yield Setting(name, plain, meta.description, of["metavar"], of["option"], of["repeats"])


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, resolved.

    ``root`` is the project's folder. ``trained`` has the candidates, at least one, in the order of
    their steps. ``configured`` has the project's policies of each role; the baseline of the first
    that has one is used for a policy that has none. ``bounds`` has the project's own, by rule; a
    task has its own over them. ``served`` has the policies that servers draw. ``sources`` says
    where the value of each key comes from, and ``table`` has the keys as they were set.
    """

    root: Path
    base: PolicyName
    trained: tuple[PolicyName, ...]
    configured: Mapping[Role, Sequence[PolicyName]]
    tasks: Mapping[str, Task]
    bounds: Mapping[str, Sizes]
    problems: int | Literal["auto"]
    samples: int
    minutes: float | None
    sampling: Sampling
    baselines: Path
    sequential: bool
    engine: Literal["local", "ray"]
    device: str
    dtype: str
    served: Mapping[PolicyName, Endpoint]
    resident: Literal["auto", "one", "all"]
    recipes: tuple[Path, ...]
    training: Path | None
    history: Path | None
    sources: Mapping[str, str]
    table: Table

    def task(self, source: Source) -> Task:
        """Return how a source is asked; one that is not configured is asked as by default."""
        found = self.tasks.get(source.name)
        if found is not None and found.source is source:
            return found
        from grpo_harness.evaluation import RULE

        return Task(
            source,
            RULE,
            self.sampling,
            self.table.system,
            self.table.chat_template_kwargs,
            self.bounds,
            bool(self.table.gate.allow_floor),
        )

    def draws(self, source: Source) -> int:
        """Return how many completions of each problem of a source are drawn: one if greedily."""
        return 1 if self.task(source).sampling.greedy else self.table.samples

    def answered(self) -> list[Task]:
        """Return the tasks whose completions can be correct."""
        return [task for task in self.tasks.values() if task.asks("accuracy")]

    def decisive(self) -> set[str]:
        """Return the names of the rewards that decide what is correct, of all data sets."""
        correct = (task.rewards.correct for task in self.tasks.values())
        return {of.reward for of in correct if of is not None}

    def content(self) -> dict[str, Any]:
        """Return the resolved table as plain data, without servers: addresses may be secret."""
        table = msgspec.to_builtins(self.table)
        return {name: value for name, value in table.items() if name != "serve"}

    def policy(self, role: str, candidate: int = 0) -> PolicyName:
        """Return the name of the policy in a role: the base, or the numbered candidate."""
        return self.base if role == "base" else self.trained[candidate]

    def recorded_as(self, role: str, own: PolicyName) -> list[PolicyName]:
        """Return whose records may be a policy's: its own, or else those configured in its role."""
        return [own, *self.configured["base" if role == "base" else "trained"]]

    def policies(self) -> Iterator[tuple[Role, int, PolicyName]]:
        """Yield every policy with its role and its number among those of the role."""
        yield "base", 0, self.base
        for number, name in enumerate(self.trained):
            yield "trained", number, name

    def labels(self) -> list[str]:
        """Return a short name for each candidate, all different: ``trained`` if there is one."""
        if len(self.trained) == 1:
            return ["trained"]
        slugs = [name.slug for name in self.trained]
        short = [name.folder.name if name.folder else name.slug for name in self.trained]
        plain = all(re.fullmatch(r"[\w.-]+", label, re.ASCII) for label in short)
        return short if plain and len({"base", *short}) > len(short) else slugs


def resolve(root: Path, cwd: Path, options: Mapping[str, Any], prefix: str = "--grpo-") -> Settings:
    """Resolve the settings of a run below ``root``.

    ``options`` holds what the command line set, by the names of the keys plus ``greedy``, and
    ``serve_base`` and ``serve_trained``, lists of addresses; ``None`` means not set. Paths of the
    command line are relative to ``cwd``, those of a ``pyproject.toml`` to its folder. ``prefix`` is
    that of the options. Raises ``SettingsError``.
    """
    from grpo_harness.policy import PolicyName

    file, table_given = nearest_table(root)
    given = table_given or {}
    home = file.parent if file else root
    where = ""
    if file:
        shown_as = file.relative_to(cwd) if file.is_relative_to(cwd) else file
        where = f"{shown_as}: [{TABLE}"
    table = converted(given, Table, lambda path: f"{where}{''.join(f'.{p}' for p in path[:-1])}] ")
    set_here = {name: value for name, value in options.items() if value is not None}
    greedy = bool(set_here.pop("greedy", False))
    addresses = {role: set_here.pop(f"serve_{role}", None) for role in ROLES}
    chosen = converted(set_here, Table, lambda _: prefix)
    resolved = msgspec.structs.replace(table, **{name: getattr(chosen, name) for name in set_here})
    resolved = _one_size(resolved, set_here, f"{where}] ")
    sampling = resolved.sampling
    if greedy:
        sampling = msgspec.structs.replace(sampling, greedy=True)
    if sampling.greedy and set_here.get("samples", 1) != 1:
        raise SettingsError(
            "--grpo-greedy draws one completion per problem, so more --grpo-samples than 1 would "
            "count it several times: leave one of the two out"
        )
    if resolved.engine == "ray" and resolved.device not in ("auto", "cpu", "cuda"):
        raise SettingsError(
            f"the engine ray has no device '{escape(resolved.device)}': its workers have a GPU or "
            "a CPU each, so name auto, cuda or cpu"
        )
    overridden = "trained" in set_here
    configured: dict[Role, Sequence[PolicyName]] = {
        "base": (PolicyName(table.base, home),),
        "trained": candidates(table.trained, home, None if overridden else f"{where}] trained"),
    }
    base = PolicyName(set_here["base"], cwd) if "base" in set_here else configured["base"][0]
    trained = configured["trained"]
    if overridden:
        trained = candidates(chosen.trained, cwd, "--grpo-trained")
    _distinct(base, trained)
    folder = (cwd if "baselines" in set_here else home) / resolved.baselines
    if "\0" in resolved.baselines or folder.is_file():
        place = "--grpo-" if "baselines" in set_here else f"{where}] "
        raise SettingsError(
            f"{place}baselines '{escape(resolved.baselines)}' is not a folder: name one, which may "
            "be new"
        )
    sources = {
        name: "command line" if name in set_here else str(file) if name in given else "default"
        for name in Table.__struct_fields__
    }
    if any(addresses.values()):
        sources["serve"] = "command line"
    for name in Sampling.__struct_fields__:
        in_file = name in given.get("sampling", {})
        sources[f"sampling.{name}"] = str(file) if in_file else "default"
    if greedy:
        sources["sampling.greedy"] = "command line"
        sources["samples"] = "greedy draws one"
    own = bounds(resolved.gate, f"{where}.gate]")
    return Settings(
        root=home,
        base=base,
        trained=tuple(trained),
        configured=configured,
        tasks=tasks(
            resolved.tasks,
            resolved.data,
            Defaults(
                resolved.reward,
                resolved.reward_seconds,
                sampling,
                resolved.system,
                resolved.chat_template_kwargs,
                resolved.gate,
                own,
            ),
            home,
            lambda key: f"{where}.{key}]" if "." in key else f"{where}] {key}",
        ),
        bounds=own,
        problems=resolved.problems,
        samples=1 if sampling.greedy else resolved.samples,
        minutes=resolved.minutes,
        sampling=sampling,
        baselines=folder,
        sequential=resolved.sequential,
        engine=resolved.engine,
        device=resolved.device,
        dtype=resolved.dtype,
        served=served(
            table.serve,
            addresses,
            {"base": [base], "trained": trained},
            {name.text for names in configured.values() for name in names},
            f"{where}.serve",
        ),
        resident=resolved.resident,
        recipes=_recipes(resolved.recipe, home, f"{where}] recipe"),
        training=_folder(resolved.training, cwd if "training" in set_here else home),
        history=_folder(resolved.history, cwd if "history" in set_here else home),
        sources=sources,
        table=resolved,
    )


def _one_size(table: Table, set_here: Mapping[str, Any], place: str) -> Table:
    """Leave one of ``problems`` and ``minutes``: that of the command line, if it has one.

    Raises ``SettingsError`` if both are set in one place.
    """
    if table.minutes is None or table.problems == "auto":
        return table
    own = [name for name in ("problems", "minutes") if name in set_here]
    if len(own) != 1:
        raise SettingsError(
            f"{'--grpo-' if own else place}minutes and problems are both set, and both say how "
            "much is drawn: leave one out"
        )
    other: dict[str, Any] = {"problems": "auto"} if own == ["minutes"] else {"minutes": None}
    return msgspec.structs.replace(table, **other)


def _recipes(given: str | list[str] | None, home: Path, place: str) -> tuple[Path, ...]:
    names = [] if given is None else [given] if isinstance(given, str) else given
    if given is not None and not names:
        raise SettingsError(f"{place} names no file: name one, or leave it out")
    found = [home / name for name in names]
    for name, path in zip(names, found, strict=True):
        if not path.is_file():
            raise SettingsError(f"{place}: there is no file '{escape(name)}' in {home}")
    stems = [path.stem for path in found]
    for stem in stems:
        if stems.count(stem) > 1:
            raise SettingsError(f"{place} has two files called '{escape(stem)}': rename one")
    return tuple(found)


def _folder(given: str | None, home: Path) -> Path | None:
    return None if given is None else home / Path(given).expanduser()


def shown(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield every resolved setting as its key, its value and where that comes from."""
    for setting in table_settings():
        if setting.name == "sampling":
            for name in Sampling.__struct_fields__:
                key = f"sampling.{name}"
                value = getattr(settings.sampling, name)
                yield key, plain(str(value)), settings.sources[key]
            continue
        value = getattr(settings, setting.name, getattr(settings.table, setting.name))
        if setting.name in ("tasks", "data"):
            value = ", ".join(value) or "none"
        elif setting.name == "gate":
            value = " ".join(
                f"{k}={v}" for k, v in msgspec.structs.asdict(value).items() if v is not None
            )
        elif setting.name == "serve":
            value = ", ".join(
                f"{name} by {' '.join(endpoint.urls)}" for name, endpoint in settings.served.items()
            )
            value = value or "none"
        elif setting.name == "reward":
            value = value or "the rule reward"
        elif setting.name == "trained":
            value = ", ".join(map(str, value))
        yield setting.name, escape(str(value), 1000), settings.sources[setting.name]


def project_file(place: Path) -> Path | None:
    """Return the nearest ``pyproject.toml`` in a folder or above it, if there is one."""
    files = (folder / "pyproject.toml" for folder in (place, *place.parents))
    return next((file for file in files if file.is_file()), None)


def has_table(place: Path) -> bool:
    """Tell whether the project around a folder has our table; other files are not parsed."""
    file = project_file(place)
    try:
        if file is None or b"grpo-harness" not in file.read_bytes():
            return False
    except OSError:
        return False
    return nearest_table(place)[1] is not None


def nearest_table(place: Path) -> tuple[Path | None, Mapping[str, Any] | None]:
    """Return the project's file and its table, if it has one. Raises ``SettingsError``."""
    import tomllib

    file = project_file(place)
    if file is None:
        return None, None
    try:
        tools = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file} cannot be read: {one_line(error)}") from error
    table = tools.get("grpo-harness") if isinstance(tools, dict) else None
    if table is not None and not isinstance(table, dict):
        raise SettingsError(f"{file}: [{TABLE}] is {table!r}, not a table")
    return file, table


def candidates(given: str | list[str], home: Path, place: str | None) -> list[PolicyName]:
    """Return the policies that are named, in the order of their steps, each once.

    A pattern means the folders that it matches from ``home``. Raises ``SettingsError`` if there are
    none, unless ``place``, what they are named by, is ``None``.
    """
    from grpo_harness.policy import PolicyName

    named = []
    for text in [given] if isinstance(given, str) else given:
        name = PolicyName(text, home)
        if not has_magic(text) or name.folder:
            named.append(name)
            continue
        pattern = str(Path(text).expanduser())
        found = glob(pattern, root_dir=home, recursive=True)  # noqa: PTH207 - or an absolute one
        matches = [PolicyName(str(Path(match)), home) for match in sorted(found, key=_by_numbers)]
        folders = [match for match in matches if match.folder]
        if place and not folders:
            raise SettingsError(
                f"{place} '{escape(text)}' matches no folder (looked for from {home}): "
                "correct the pattern, or train first"
            )
        named += folders
    once = {(name.slug, name.folder or name.text): name for name in named}
    return sorted(once.values(), key=_step)


def _by_numbers(text: str) -> list[tuple[str, int]]:
    """Return a key that sorts the numbers in texts by their values."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", text)]


def _step(name: PolicyName) -> float:
    """Return the number at the end of a folder's name; whatever has none comes last."""
    number = re.search(r"[-_](\d+)$", name.folder.name) if name.folder else None
    return int(number[1]) if number else math.inf


def _distinct(base: PolicyName, trained: Sequence[PolicyName]) -> None:
    """Raise ``SettingsError`` if two policies would keep their baselines in one folder."""
    roles = [("base", base), *(("trained", name) for name in trained)]
    for (role, one), (other_role, other) in combinations(roles, 2):
        folders = [name.folder.resolve() if name.folder else None for name in (one, other)]
        same = one.text == other.text and one.folder == other.folder
        if folders[0] is not None:
            same = same or folders[0] == folders[1]
        if not same and one.slug == other.slug:
            raise SettingsError(
                f"{role} '{escape(one.text)}' and {other_role} '{escape(other.text)}' would keep "
                f"their baselines in one folder, {one.slug!r}: rename one of them"
            )
