"""A YAML file as a recipe: the file that ``trl grpo --config`` or ``grpo-harness train`` takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MOST = 1 << 17
_OF_GRPO = {"reward_funcs", "num_generations", "max_completion_length", "grpo_harness"}
"""Keys that a recipe of another trainer does not have."""

_TRL_REWARDS = {"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe in the repository, and when it was written."""

    path: str
    values: Mapping[str, Any]
    made: float

    def text(self, key: str) -> str | None:
        """Return a value that is a text, if it is one."""
        value = self.values.get(key)
        return value if isinstance(value, str) and value else None

    def number(self, key: str) -> float | None:
        """Return a value that is a number above 0, if it is one."""
        value: Any = self.values.get(key)
        return value if _is_number(value) and value > 0 else None

    @property
    def rewards(self) -> list[str]:
        """The rewards, as ``module:function``."""
        named = self.values.get("reward_funcs") or []
        named = named if isinstance(named, list) else [named]
        names = [f"trl.rewards.{name}" if name in _TRL_REWARDS else str(name) for name in named]
        return [":".join(name.rsplit(".", 1)) for name in names]

    @property
    def weights(self) -> list[float] | None:
        """The weights of the rewards, if they are numbers."""
        given = self.values.get("reward_weights")
        if not isinstance(given, list) or len(given) != len(self.rewards):
            return None
        return given if all(map(_is_number, given)) else None


def recipe_in(file: Path, name: str) -> RecipeFile | None:
    """Return the recipe that a file is, if it is one for GRPO.

    Raises ``ValueError`` or ``OSError`` for one that is damaged.
    """
    if file.stat().st_size > _MOST:
        return None
    text = file.read_bytes()
    if b"model_name_or_path" not in text:
        return None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML: {error}") from error
    if not isinstance(values, dict) or not _OF_GRPO & {*map(str, values)}:
        return None
    return RecipeFile(name, {str(key): of for key, of in values.items()}, file.stat().st_mtime)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
