"""Find and delete stale baselines. Nothing else deletes recorded data."""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo_harness.baselines.examples import examples_of
from grpo_harness.baselines.file import BaselineError, load, write
from grpo_harness.baselines.provenance import git
from grpo_harness.errors import HarnessError
from grpo_harness.tasks import Source
from grpo_harness.text import escape


@dataclass(frozen=True)
class Stale:
    """A stale baseline: a whole file, or some ``problems`` of it; or examples without one."""

    path: Path
    why: str
    problems: frozenset[str] = frozenset()

    @property
    def paths(self) -> list[Path]:
        """The file, and its examples if it has some."""
        return [path for path in (self.path, examples_of(self.path)) if path.exists()]

    def __str__(self) -> str:
        what = f"{len(self.problems)} problems of {self.path}" if self.problems else str(self.path)
        return f"{what}: {self.why}"


def stale(
    folder: Path, slugs: Collection[str], task_types: Mapping[str, Source], problems: int
) -> list[Stale]:
    """List the stale baselines: those that no run of ``slugs`` on ``task_types`` uses.

    A problem is stale when its task type no longer draws it, neither among the first ``problems``
    nor among the number that was planned when it was recorded. Files that cannot be read as a
    baseline are skipped: loading them is an error elsewhere.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            stored = load(path)
        except BaselineError:
            continue
        task_type = task_types.get(path.stem)
        if path.parent.name not in slugs:
            found.append(Stale(path, f"{escape(stored.policy)} is neither base nor trained"))
        elif task_type is None:
            found.append(Stale(path, f"{path.stem} is not a configured task type"))
        else:
            try:
                drawn = task_type.problems(max(problems, stored.header.planned))
            except (ValueError, HarnessError):  # a run that asks for them reports it
                continue
            gone = frozenset(stored.records) - {problem.id for problem in drawn}
            if gone:
                found.append(Stale(path, f"{path.stem} no longer asks them", gone))
    for path in sorted(folder.glob("*/*.examples.jsonl")):
        of = path.with_name(path.name.removesuffix(".examples.jsonl") + ".json")
        if not of.exists():
            found.append(Stale(path, f"there is no baseline {of}"))
    return found


def check_restorable(found: Iterable[Stale]) -> None:
    """Raise ``BaselineError`` if a deletion could not be undone: in CI, or without git."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise BaselineError("nothing is pruned in CI (CI is set): do it by hand, and commit")
    for path in (path.resolve() for entry in found for path in entry.paths):
        known = git("ls-files", "--", f":(literal){path}", cwd=path.parent)
        changed = git("status", "--porcelain", "--", f":(literal){path}", cwd=path.parent)
        if not known or changed or changed is None:
            raise BaselineError(
                f"nothing is pruned: git could not restore {path}. Commit it first, or "
                "delete it by hand"
            )


def prune(found: Iterable[Stale]) -> None:
    """Delete what is stale, and files in which nothing is left."""
    for entry in found:
        left = {}
        if entry.problems:
            stored = load(entry.path)
            left = {n: r for n, r in stored.records.items() if n not in entry.problems}
        if not left:
            # The baseline first: examples without one are stale.
            for path in entry.paths:
                path.unlink()
            continue
        write(entry.path, stored.header, left)
