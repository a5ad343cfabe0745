"""The YAML of a recipe as plain values: read safely, and no key lost."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from grpo_harness.text import escape, one_line
from grpo_harness.training.keys import RecipeError

_MOST_BYTES = 1 << 20


def content_of(path: Path) -> dict[Any, Any]:
    """Return the mapping in a file. Raises ``RecipeError`` with its place."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError("larger than 1 MiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 — a SafeLoader
    except FileNotFoundError:
        raise RecipeError(f"there is no {path}: name a recipe's .yaml file") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as YAML ({one_line(error)}): fix it") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping from TRL's keys to values")
    return content


def assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value`` of the command line; the value is YAML. Raises ``RecipeError``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {escape(text, 80)}: write key=value")
    try:
        return key.strip(), yaml.load(value, _Loader)  # noqa: S506 — a SafeLoader
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"--set {escape(text, 80)}: the value is not YAML ({one_line(error)})"
        ) from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """A safe loader that refuses a key that is there twice, of which one would be lost.

    It also refuses what contains itself, which has no end.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        if node.end_mark is None:  # of an alias: what it names has not ended yet
            line = node.start_mark.line + 1
            raise RecipeError(f"what begins in line {line} contains itself")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        # Keys that are no scalars are refused by the base class, and << is no key.
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        merge = "tag:yaml.org,2002:merge"
        keys = Counter(self.construct_object(key) for key in scalars if key.tag != merge)
        for key, times in keys.items():
            if times > 1:
                line = node.start_mark.line + 1
                raise RecipeError(f"the mapping of line {line} has {escape(repr(key), 60)} twice")
        return super().construct_mapping(node, deep)
