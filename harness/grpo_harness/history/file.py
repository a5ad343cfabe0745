"""The file of a run in a history: small, written whole, one writer each.

A history is a folder. Each run adds a file of its own name, so any number of runs can write at
once, from any machine that sees the folder, and git merges it without conflicts.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from grpo_harness.atomic import replace
from grpo_harness.errors import HarnessError
from grpo_harness.gate.verdicts import Verdict
from grpo_harness.text import escape, one_line

SCHEMA: Final = 1

_Count = Annotated[int, Meta(ge=1)]
_NotNegative = Annotated[float, Meta(ge=0)]


class HistoryError(HarnessError):
    """A history cannot be read or written. One line with the place and the cause."""


class _Object(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object that has all of its keys but those with a default, and no others."""


class Figure(_Object, frozen=True, kw_only=True):
    """A figure of an evaluation, as `gate.changepoint.Point` has it."""

    value: float
    noise: Annotated[float, Meta(gt=0)]
    spread: _NotNegative
    completions: _Count


class Reference(_Object, frozen=True, kw_only=True):
    """The baseline that an evaluation was judged by, and its anchor: digests, commits, means.

    ``accuracy`` and ``anchor_accuracy`` are null where no answers are judged.
    """

    digest: str
    commit: str | None
    recorded: str
    accuracy: float | None
    anchor: str
    anchor_commit: str | None
    anchor_accuracy: float | None


class Row(_Object, frozen=True, kw_only=True):
    """A policy on a task type.

    ``problems`` is a digest of the problems that were asked, and ``conditions`` of how: the task
    type's version and the sampling.
    """

    policy: str
    task_type: str
    fingerprint: str
    n: _Count
    planned: _Count
    k: _Count
    problems: str
    conditions: str
    seed: int
    figures: dict[str, Figure]
    baseline: Reference | None = None


class Judged(_Object, frozen=True, kw_only=True):
    """The verdict of a rule, with the two values that it compared."""

    rule: str
    policy: str
    task_type: str
    verdict: Verdict
    then: float | None = None
    now: float | None = None


class Run(_Object, frozen=True, kw_only=True):
    """One run: the whole file.

    ``started`` is in UTC. ``commit`` is git's, with ``-dirty`` if files were changed, and
    ``committed`` its time.
    """

    schema: Literal[1] = SCHEMA
    started: str
    commit: str | None
    committed: str | None
    seed: int
    rows: list[Row]
    checks: list[Judged]


@dataclass(frozen=True, eq=False)
class History:
    """The runs of a folder, by the time of their commit, and a line for each file left out."""

    runs: Sequence[Run]
    damaged: Sequence[str] = ()


def prepare(folder: Path) -> None:
    """Make the folder of a history, if it is not there. Raises ``HistoryError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HistoryError(
            f"the history cannot be kept in {folder} ({one_line(error)}): name a folder"
        ) from error


def append(run: Run, folder: Path) -> Path:
    """Write the file of a run, and return its path. Raises ``HistoryError``."""
    time = "".join(c for c in run.started if c.isalnum())[:15]
    path = folder / f"{time}-{secrets.token_hex(4)}.json"
    try:
        replace(path, msgspec.json.format(msgspec.json.encode(run), indent=1).decode() + "\n")
    except OSError as error:
        raise HistoryError(f"the run cannot be added to {folder} ({one_line(error)})") from error
    return path


def read(folder: Path) -> History:
    """Read all runs of a folder. Raises ``HistoryError`` if there is no such folder.

    A damaged file is named and left out: the others are no less true.
    """
    if not folder.is_dir():
        raise HistoryError(
            f"there is no folder {escape(str(folder), 1000)}: runs of pytest --grpo-history="
            f"{escape(str(folder), 1000)} make it"
        )
    runs, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(msgspec.json.decode(path.read_bytes(), type=Run))
        except (OSError, ValueError, RecursionError) as error:  # msgspec's is a ValueError
            damaged.append(
                f"{escape(str(path), 1000)} is left out, because it is no run of this version "
                f"({one_line(error)}): remove it, or restore it"
            )
    return History(sorted(runs, key=lambda run: (_time(run), run.started)), damaged)


def _time(run: Run) -> str:
    """Return the time that orders runs: an old commit that is run again is still an old one."""
    return run.committed or run.started
