"""What made a measurement, besides the policy: commit, environment and code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo_harness.text import digest

_LIBRARIES = ("torch", "transformers", "tokenizers", "grpo-harness")

_SAMPLES_AND_JUDGES = (
    *("text.py", "tasks", "rewards", "policy", "engines", "evaluation.py", "gate"),
    *("rules.py", "reruns.py", "session.py"),
)
"""The rooms of this package that decide what is drawn, how it is scored and what is concluded."""


def environment(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a policy ran on: what the engine says of itself, the machine, versions."""
    return {**engine, "machine": platform.machine(), **versions()}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that decide what is sampled."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def code_digest(files: Iterable[Path]) -> str:
    """Digest the code that samples and judges: library versions, this package, ``files``.

    The same policy sampled by other code is another measurement, whatever its settings say. What
    only shows a measurement, such as the report, is left out.
    """
    package = Path(__file__).parents[1]
    sources = set(files)
    for room in _SAMPLES_AND_JUDGES:
        sources |= {package / room} if room.endswith(".py") else set((package / room).glob("*.py"))
    contents = sorted(file.read_bytes().hex() for file in sources)
    return digest("\n".join([str(versions()), *contents]))


def git(*arguments: str, cwd: Path) -> str | None:
    """Run git in a folder and return what it says, or ``None`` where it cannot answer."""
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
