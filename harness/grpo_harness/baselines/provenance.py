"""The provenance of a measurement: commit, environment and code."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from grpo_harness.text import digest

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "grpo-harness")

_SAMPLES_AND_JUDGES = (
    *("text.py", "tasks", "rewards", "policy", "engines", "evaluation.py", "gate"),
    *("rules.py", "reruns.py", "asked.py", "session.py"),
)
"""The modules that decide what is sampled, how it is scored and the verdict."""


def environment(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the environment of a run: the engine's identity, the machine, the versions."""
    return {**engine, "machine": platform.machine(), **versions()}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that affect sampling."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def code_digest(files: Iterable[Path]) -> str:
    """Digest the code that samples and judges: library versions, this package, ``files``.

    Other code makes another measurement, even with the same policy and settings. Code that only
    displays results, such as the report, is left out.
    """
    own = (file for name in _SAMPLES_AND_JUDGES for file in _modules(name))
    return _digest({*files, *own})


def _modules(name: str) -> Iterable[Path]:
    """Return the file of a module of this package, or those of a folder of it."""
    place = Path(__file__).parents[1] / name
    return [place] if place.is_file() else place.glob("*.py")


def _digest(files: Iterable[Path]) -> str:
    contents = sorted(file.read_bytes().hex() for file in files)
    return digest("\n".join([str(versions()), *contents]))


@cache
def drawing_digest() -> str:
    """Digest the code that draws: library versions, and this package's policies and engines."""
    return _digest(file for room in ("policy", "engines") for file in _modules(room))


def git(*arguments: str, cwd: Path) -> str | None:
    """Run git in a folder and return its output, or ``None`` if it fails."""
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
