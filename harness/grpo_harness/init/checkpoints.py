"""A folder as a policy: is it one, was it trained, and from what. Weights are not loaded."""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_harness.policy import PolicyError, PolicyName, find

_NAMED = {"nano-base", "nano-trained", "smollm2"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\S+)?", re.ASCII)
STEP = re.compile(r"checkpoint-(\d+)", re.ASCII)
_SIGNS = {"adapter_config.json", "recipe.json", "trainer_state.json", "training_args.bin"}
"""Files that only a training leaves."""

_BASE = re.compile(r"(^|[-_.])(base|sft|ref|reference|init|pretrained)($|[-_.])", re.IGNORECASE)
_MOST = 1 << 24
_GENERATES = re.compile("CAUSAL_LM|CausalLM|LMHead|ConditionalGeneration")


@dataclass(frozen=True)
class Checkpoint:
    """A policy in the repository; ``path`` is its name in the table.

    ``made`` is when its weights were written. ``trained`` tells whether a training has left its
    signs, and ``base`` names what it was trained from, where a file says so.
    """

    path: str
    folder: Path
    made: float
    trained: bool
    base: str | None

    @property
    def adapter(self) -> bool:
        """Whether it is an adapter of PEFT."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def named_base(self) -> bool:
        """Whether its name says that a training starts from it."""
        return bool(_BASE.search(self.folder.name))

    @property
    def age(self) -> tuple[float, int, bool, str]:
        """Sorts checkpoints, the newest last: by weights, step, and a link after its target."""
        step = STEP.fullmatch(self.folder.resolve().name)
        return self.made, int(step[1]) if step else 0, self.folder.is_symlink(), self.path


def checkpoint_in(folder: Path, home: Path) -> Checkpoint | None:
    """Return the policy that a folder is, if it is one. Raises ``PolicyError`` if it is damaged."""
    files = {path.name for path in folder.iterdir()}
    adapter = "adapter_config.json" in files
    if not (adapter or "config.json" in files):
        return None
    weights = [
        name for name in files if name.endswith((".safetensors", ".bin")) and "model" in name
    ]
    if not weights:
        return None
    config = _json(folder / ("adapter_config.json" if adapter else "config.json"))
    kind = str(config.get("task_type" if adapter else "architectures") or "CAUSAL_LM")
    if not _GENERATES.search(kind):
        raise PolicyError(f"its weights are of {kind}, which generates nothing")
    name = name_of(folder, home)
    if adapter and "adapter_model.safetensors" not in files:
        raise PolicyError("an adapter without adapter_model.safetensors")
    if not adapter:
        find(PolicyName(name, home))
    steps = any(map(STEP.fullmatch, files))
    return Checkpoint(
        name,
        folder,
        max((folder / name).stat().st_mtime for name in weights),
        bool(_SIGNS & files or STEP.fullmatch(folder.resolve().name) or steps),
        _base(folder, home, config, files),
    )


def name_of(path: Path, home: Path) -> str:
    """Return the name of a path below the project. Raises ``ValueError`` if no text can be it."""
    name = path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
    if name.startswith("~"):
        raise ValueError("a name that begins with ~ means a home folder: rename it")
    return f"./{name}" if name in _NAMED else name


def policy_named(text: str, home: Path, *places: Path) -> str | None:
    """Return the name of a policy that some file names, seen from a place or from the project."""
    for place in (*places, home):
        if text and PolicyName(text, place).folder:
            return name_of(Path(os.path.abspath(place / Path(text).expanduser())), home)  # noqa: PTH100
    return text if text in _NAMED or _HUB_ID.fullmatch(text) else None


def _base(
    folder: Path, home: Path, config: Mapping[str, Any], files: Collection[str]
) -> str | None:
    """Return what a policy was trained from, if one of its files says so."""
    recipe = _json(folder / "recipe.json") if "recipe.json" in files else {}
    said = (
        config.get("base_model_name_or_path"),
        recipe["base"].get("name") if isinstance(recipe.get("base"), dict) else None,
        config.get("_name_or_path"),
    )
    for text in said:
        if isinstance(text, str) and (name := policy_named(text, home, folder)):
            return name
    return None


def _json(path: Path) -> Mapping[str, Any]:
    """Return the object in a file, or an empty one: what is needed of it is checked elsewhere."""
    if path.stat().st_size > _MOST:
        raise PolicyError(f"its {path.name} is larger than 16 MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
