"""The recorded configs of recipes, and what has changed since.

A default that changes in an upgrade of TRL or transformers shows as a difference with a name. The
recorded configs are the project's, in git beside its baselines:
``<baselines>/recipes/<name>.json``.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_harness.errors import HarnessError
from grpo_harness.training.config import settings
from grpo_harness.training.files import Recipe

FOLDER = "recipes"
"""The folder below the baselines that holds ``<name>.json`` for each recipe."""

_OF_THE_MACHINE = ("local_rank", "use_cpu", "dataloader_pin_memory")
"""Keys that depend on the machine, not on the recipe."""

_AS_WRITTEN = ("bf16", "fp16", "activation_checkpointing", "gradient_checkpointing")
"""Keys that the device may overrule: what the recipe says is recorded."""

_OF_EXPERTS = ("router_aux_loss_coef",)
"""Keys that mean nothing for a dense model, which all built-in recipes train."""


def path_of(name: str, baselines: Path) -> Path:
    """Return the path of a recipe's recorded config below a project's ``baselines``."""
    return baselines / FOLDER / f"{name}.json"


def recorded(name: str, baselines: Path) -> Mapping[str, Any]:
    """Return the recorded ``versions`` and ``config`` of a recipe. Raises ``HarnessError``."""
    path = path_of(name, baselines)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["config"], dict) and isinstance(record["versions"], dict):
            return dict(record)
    except FileNotFoundError:
        raise HarnessError(
            f"no config is recorded of the recipe {name!r} ({path}): run "
            "`grpo-harness recipes --record` and commit what it writes"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise HarnessError(f"{path} is not a recorded config: take it from git again")


def differences(recipe: Recipe, against: Mapping[str, Any], *, device: str = "auto") -> list[str]:
    """List how the config of ``recipe`` differs from the ``recorded`` one, key by key.

    Keys that depend on the folder or the device are left out. Raises ``RecipeError``.
    """
    was = {key: of for key, of in against["config"].items() if not _left_out(recipe, key)}
    now = portable(recipe, device)
    return sorted(
        [f"{key} is new: {now[key]!r}" for key in now.keys() - was.keys()]
        + [f"{key} is gone: it was {was[key]!r}" for key in was.keys() - now.keys()]
        + [
            f"{key} is {now[key]!r}: it was {was[key]!r}"
            for key in was.keys() & now.keys()
            if was[key] != now[key]
        ]
    )


def record(recipe: Recipe, baselines: Path) -> Path:
    """Record the current config of ``recipe``, with the versions, and return the file."""
    config = portable(recipe, "cpu")
    path = path_of(recipe.name, baselines)
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("trl", "transformers")}
    content = {"versions": versions, "config": dict(sorted(config.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def portable(recipe: Recipe, device: str) -> dict[str, Any]:
    """Return what a recipe means on every machine: its config, and what it names beside it."""
    values = settings(recipe.config(Path("out"), device=device)) | recipe.beside()
    values |= {key: recipe.values.get(key) for key in _AS_WRITTEN}
    return {key: value for key, value in values.items() if not _left_out(recipe, key)}


def _left_out(recipe: Recipe, key: str) -> bool:
    return key in _OF_THE_MACHINE or (recipe.built_in and key in _OF_EXPERTS)
