"""What a run is to do: options over ``[tool.grpo-harness]`` over defaults."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_harness.engines.engine import MOST_SAMPLES, Sampling
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import RewardFunction
from grpo_harness.policy.checkpoint import slug
from grpo_harness.rewards.rule import reward_func
from grpo_harness.tasks import load_task_type, task_types

ROLES = ("base", "trained")
"""What a policy can be in a run."""


class SettingsError(HarnessError):
    """A setting that cannot be used: which, where it stands, and what it may be."""


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, resolved.

    ``root`` is the project's folder. ``baseline_of`` names, for each role, the policy whose
    baseline a policy without one of its own is judged by: the one that the project configured.
    """

    root: Path = Path()
    base: str = "nano-base"
    trained: str = "nano-trained"
    baseline_of: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    problems: int = 256
    samples: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    baselines: Path = Path("baselines")
    reward: RewardFunction = reward_func
    sequential: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def policy(self, role: str) -> str:
        """Return the name of the policy in a role."""
        return self.base if role == "base" else self.trained


_KEYS: dict[str, type | tuple[type, ...]] = {
    "base": str,
    "trained": str,
    "tasks": list,
    "problems": int,
    "samples": int,
    "baselines": str,
    "reward": str,
    "sampling": dict,
}


def resolve(root: Path, cwd: Path, options: Mapping[str, Any]) -> Settings:
    """Resolve the settings of a run below ``root``.

    ``options`` holds what the command line set, by the names of the keys plus ``greedy``,
    ``sequential``, ``device`` and ``dtype``; ``None`` means not set. Paths of the command line are
    relative to ``cwd``, those of a ``pyproject.toml`` to its folder. Raises ``SettingsError``.
    """
    file, table = _nearest_table(root)
    home = file.parent if file else root
    given = {name: value for name, value in options.items() if value is not None}
    sampling = _sampling(table.get("sampling", {}), bool(given.get("greedy")), file)
    greedy = sampling.greedy
    configured = {
        role: _policy(str(table.get(role, default)), home)
        for role, default in (("base", Settings.base), ("trained", Settings.trained))
    }
    if greedy and given.get("samples", 1) != 1:
        raise SettingsError(
            "--grpo-greedy draws the one most likely answer, so more --grpo-samples than 1 would "
            "count it several times: leave one of the two out"
        )
    problems = given.get("problems", table.get("problems", Settings.problems))
    samples = 1 if greedy else given.get("samples", table.get("samples", Settings.samples))
    for name, count in (("problems", problems), ("samples", samples)):
        if count < 1:
            raise SettingsError(f"{name} is {count}: it must be at least 1")
    if samples > MOST_SAMPLES:
        raise SettingsError(f"samples is {samples}: {MOST_SAMPLES} a problem are the most")
    baselines = cwd / given["baselines"] if "baselines" in given else None
    base, trained = (given.get(role, configured[role]) for role in ROLES)
    if _identity(base) != _identity(trained) and slug(base) == slug(trained):
        raise SettingsError(
            f"base {base!r} and trained {trained!r} would keep their baselines in one folder, "
            f"{slug(base)!r}: rename one of them"
        )
    return Settings(
        root=home,
        base=base,
        trained=trained,
        baseline_of=configured,
        tasks=_tasks(table.get("tasks"), home, file),
        problems=problems,
        samples=samples,
        sampling=sampling,
        baselines=baselines or home / str(table.get("baselines", Settings.baselines)),
        reward=_reward(table["reward"], file) if "reward" in table else reward_func,
        sequential=bool(given.get("sequential")),
        device=given.get("device", Settings.device),
        dtype=given.get("dtype", Settings.dtype),
    )


def project_file(place: Path) -> Path | None:
    """Return the nearest ``pyproject.toml`` in a folder or above it, if there is one."""
    files = (folder / "pyproject.toml" for folder in (place, *place.parents))
    return next((file for file in files if file.is_file()), None)


def _nearest_table(root: Path) -> tuple[Path | None, Mapping[str, Any]]:
    file = project_file(root)
    if file is None:
        return None, {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    table = table.get("grpo-harness", {})
    for key, value in table.items():
        if key not in _KEYS:
            raise SettingsError(
                f"{file}: [tool.grpo-harness] has no key {key!r}; it has {', '.join(_KEYS)}"
            )
        kind = _KEYS[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SettingsError(f"{file}: [tool.grpo-harness] {key} is {value!r}, not a {kind}")
    return file, table


def _policy(name: str, home: Path) -> str:
    # A folder of the project is found from wherever pytest was started.
    return str(home / name) if (home / name).is_dir() else name


def _identity(name: str) -> str | Path:
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else name


def _tasks(names: list[Any] | None, home: Path, file: Path | None) -> tuple[str, ...]:
    found = []
    for name in task_types() if names is None else names:
        source = str(home / str(name)) if str(name).endswith(".py") else str(name)
        try:
            found.append(load_task_type(source).name)
        except Exception as error:  # a user's own file can raise anything
            raise SettingsError(f"{file}: [tool.grpo-harness] tasks: {error}") from error
    if not found:
        raise SettingsError(f"{file}: [tool.grpo-harness] tasks is empty: there is nothing to ask")
    return tuple(found)


def _sampling(table: Mapping[str, Any], greedy: bool, file: Path | None) -> Sampling:
    try:
        return Sampling(**{**table, "greedy": greedy or bool(table.get("greedy"))})
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{file}: [tool.grpo-harness.sampling]: {error}") from error


def _reward(name: str, file: Path | None) -> RewardFunction:
    module, _, function = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{file}: [tool.grpo-harness] reward is {name!r}, not the module:function of an "
            f"importable reward ({error})"
        ) from error
    if not callable(reward):
        raise SettingsError(f"{file}: [tool.grpo-harness] reward {name!r} is not a function")
    result: RewardFunction = reward
    return result
