"""Files that are one whole: read as a checked kind, and replaced at once or not at all."""

from pathlib import Path
from typing import TypeVar

import msgspec

from grpo_harness.errors import HarnessError
from grpo_harness.text import one_line

_T = TypeVar("_T")


def read(path: Path, kind: type[_T], schema: int, error: type[HarnessError]) -> _T:
    """Read a value whose ``schema`` must be the one given. Raises ``error``, a line."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
        wrote = getattr(found, "schema", None)
        if wrote != schema:
            raise ValueError(f"schema {wrote}, and this version reads {schema}")
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as cause:
        raise error(
            f"{path} is damaged ({one_line(cause)}): restore it from git, or remove it and record "
            "it anew with --grpo-record"
        ) from cause
    return found


def replace(path: Path, text: str) -> None:
    """Write a file in place of the one that is there; after an error, that one is left."""
    half = path.with_name(f".{path.name}.half")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
