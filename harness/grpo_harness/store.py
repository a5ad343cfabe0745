"""Every sample, once, on disk: what an interrupted run had drawn, the next one does not draw again.

One JSON Lines file for each key (what was sampled, how, and with which run's seed), one sample a
line. Lines are only ever appended, under a lock, so that parallel workers share the work instead
of doing it twice, and a process that dies in the middle of a line loses that line alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from grpo_harness.engines.engine import Sample

Key = tuple[str, int]
"""A problem's id and the number of the sample, from 0."""


class Store:
    """The samples below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def open(self, name: str, what: Mapping[str, Any]) -> Iterator[Shelf]:
        """Lock and read the samples of ``what``; ``name`` begins the file's name for a reader."""
        self._folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / f"{name}-{digest}.jsonl"
        with FileLock(path.with_suffix(".lock")):
            yield Shelf(path)


class Shelf(dict[Key, Sample]):
    """The samples of one file; what is added is on disk before ``add`` returns."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        for line in lines[:-1]:
            entry = json.loads(line)
            key = entry.pop("problem"), entry.pop("sample")
            self[key] = Sample(**entry)
        if lines[-1]:
            # A line without its end was being written when the process died.
            whole = "".join(f"{line}\n" for line in lines[:-1])
            path.write_text(whole, encoding="utf-8")

    def add(self, samples: Mapping[Key, Sample]) -> None:
        """Keep ``samples``, in memory and on disk. Failed draws are not kept."""
        drawn = {key: sample for key, sample in samples.items() if sample.error is None}
        with self._path.open("a", encoding="utf-8") as file:
            for (problem, number), sample in drawn.items():
                entry = {"problem": problem, "sample": number, **asdict(sample)}
                file.write(json.dumps(entry, ensure_ascii=True) + "\n")
        self.update(samples)
