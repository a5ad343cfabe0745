"""What no run asks for any more, and its removal: the only deletion of anything recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.baseline import BaselineError, load, write
from harness.tasks import TaskType


@dataclass(frozen=True)
class Stale:
    """What no run asks for any more: a whole file, or some ``problems`` of it."""

    path: Path
    why: str
    problems: frozenset[str] = frozenset()

    def __str__(self) -> str:
        what = f"{len(self.problems)} problems of {self.path}" if self.problems else str(self.path)
        return f"{what}: {self.why}"


def stale(folder: Path, slugs: Collection[str], task_types: Mapping[str, TaskType]) -> list[Stale]:
    """List what no run of the policies ``slugs`` on ``task_types`` can ask for any more.

    A problem is stale when its task type no longer draws it. Files that are no baselines, or
    cannot be read as one, are left alone: reading them is an error elsewhere.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            stored = load(path)
        except BaselineError:
            continue
        task_type = task_types.get(path.stem)
        if path.parent.name not in slugs:
            found.append(Stale(path, f"{stored.policy} is neither base nor trained"))
        elif task_type is None:
            found.append(Stale(path, f"{path.stem} is not a configured task type"))
        else:
            drawn = task_type.problems(len(stored.records))
            gone = frozenset(stored.records) - {problem.id for problem in drawn}
            if gone:
                found.append(Stale(path, f"{path.stem} no longer asks them", gone))
    return found


def prune(found: Iterable[Stale]) -> None:
    """Delete what is stale; a file of which nothing is left is deleted too."""
    for entry in found:
        left = {}
        if entry.problems:
            stored = load(entry.path)
            left = {n: r for n, r in stored.records.items() if n not in entry.problems}
        if not left:
            entry.path.unlink()
            continue
        write(entry.path, stored.header, left)
