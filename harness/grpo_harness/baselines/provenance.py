"""What made a measurement, besides the policy: commit, environment and code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_harness.policy.checkpoint import digest

if TYPE_CHECKING:
    from grpo_harness.policy.policy import Policy

_LIBRARIES = ("torch", "transformers", "tokenizers", "grpo-harness")


def environment(policy: Policy) -> dict[str, Any]:
    """Return what a policy ran on: versions, hardware class, number format."""
    hardware = platform.machine()
    if policy.device.type == "cuda":
        import torch

        hardware = torch.cuda.get_device_name(policy.device)
    return {
        "hardware": hardware,
        "device": policy.device.type,
        "dtype": str(policy.dtype).removeprefix("torch."),
        **versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that decide what is sampled."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def code_digest(files: Iterable[Path]) -> str:
    """Digest the code that samples and judges: library versions, this package, ``files``.

    The same policy sampled by other code is another measurement, whatever its settings say.
    """
    sources = {*Path(__file__).parents[1].rglob("*.py"), *files}
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
