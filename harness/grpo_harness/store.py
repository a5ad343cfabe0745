"""Samples on disk, each drawn once: a run uses what an interrupted run had drawn.

One JSON Lines file for each key (what was sampled, how, and with which run's seed), one sample per
line. Lines are only appended, under a lock, so that parallel workers share the work, and a process
that dies in the middle of a line loses only that line. Each line has a check of its content and of
its file's key: a line that does not match is drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from filelock import FileLock
from msgspec import Meta
from xxhash import xxh3_64_hexdigest

from grpo_harness.engines.engine import Sample
from grpo_harness.errors import HarnessError
from grpo_harness.text import digest, one_line

Key = tuple[str, int]
"""A problem's id and the number of the sample, from 0."""


class StoreError(HarnessError):
    """A store cannot be read or written. One line: the place, the cause, what to do."""


_FORMAT = 2
"""The format of the lines: a part of the key, so that lines of another one are in other files."""


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stored sample. ``check`` is a digest of the other fields and of the file's key."""

    problem: str
    sample: Annotated[int, Meta(ge=0)]
    text: str
    tokens: Annotated[int, Meta(ge=1)]
    truncated: bool
    ids: tuple[int, ...]
    check: str

    def right_check(self, key: str) -> str:
        parts = [getattr(self, name) for name in self.__struct_fields__ if name != "check"]
        return xxh3_64_hexdigest(json.dumps([key, *parts]).encode())


class Store:
    """The samples below one folder. ``notices`` lists what was damaged and will be drawn again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notices: list[str] = []

    @contextmanager
    def open(self, name: str, what: Mapping[str, Any]) -> Iterator[Samples]:
        """Lock and read the samples of ``what``; the file's name begins with ``name``.

        Raises ``StoreError`` if the folder or a file of it cannot be read or written.
        """
        key = digest(json.dumps([_FORMAT, what], sort_keys=True))[:16]
        path = self._folder / f"{name}-{key}.jsonl"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
        try:
            with writing(path):
                samples = Samples(path, key)
            if samples.damaged:
                self.notices.append(
                    f"{samples.damaged} of the lines in {path} were damaged: they are removed, "
                    "and their samples drawn again"
                )
            yield samples
        finally:
            lock.release()


class Samples(dict[Key, Sample]):
    """The samples of one file; ``add`` writes at once. ``damaged`` counts removed lines."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__()
        self._path = path
        self._key = key
        self.damaged = 0
        *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
        sound = []
        for line in lines:
            try:
                # The standard library's json accepts half of a surrogate pair, as texts may have.
                entry = msgspec.convert(json.loads(line), _Line)
                if entry.check != entry.right_check(key):
                    raise ValueError
                sample = Sample(entry.text, entry.tokens, entry.truncated, ids=entry.ids)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                self.damaged += 1
                continue
            sound.append(line)
            self[entry.problem, entry.sample] = sample
        # A line without an end was being written when the process died: not damage, no sample.
        if self.damaged or cut:
            replacement = path.with_suffix(".mended")
            replacement.write_bytes(b"".join(line + b"\n" for line in sound))
            replacement.replace(path)

    def add(self, samples: Mapping[Key, Sample]) -> None:
        """Keep ``samples``, in memory and on disk. Failed draws are not written to disk."""
        lines = [
            _Line(problem, number, sample.text, sample.tokens, sample.truncated, sample.ids, "")
            for (problem, number), sample in samples.items()
            if sample.error is None
        ]
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            for line in lines:
                content = {**msgspec.structs.asdict(line), "check": line.right_check(self._key)}
                file.write(json.dumps(content) + "\n")
        self.update(samples)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ``StoreError`` for an ``OSError`` on a file of the cache."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read or written ({one_line(error)}): make room, or let pytest keep "
            "its cache elsewhere (-o cache_dir=DIR)"
        ) from error
