"""Samples on disk, each drawn once: a run uses what an interrupted run had drawn.

One SQLite file in WAL mode, and one commit for each batch: what was added is there after any end of
the process. A *draw* is everything that decides samples but the prompt and the number: policy, task
type, settings, engine, code and run seed. One process at a time draws for it, and those that wait
use its samples. Every row has a check of its content and its key: one that does not match is
removed, and drawn again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from filelock import FileLock
from xxhash import xxh3_64_digest

from grpo_harness.engines.engine import Sample
from grpo_harness.errors import HarnessError
from grpo_harness.text import digest, one_line

Draws = Literal["missing", "all", "none"]
"""What a run draws: the samples that are not stored, all of them anew, or none."""

FILE = "samples.db"
"""The name of the store's file in the folder of the cache."""

_FORMAT = 1
_APPLICATION = 0x6772706F  # "grpo"

_SCHEMA = """
CREATE TABLE draws (
    draw BLOB PRIMARY KEY, policy BLOB, task BLOB, identity TEXT, drawn REAL
);
CREATE TABLE samples (
    draw BLOB, problem BLOB, prompt BLOB, number INTEGER,
    text BLOB, tokens INTEGER, truncated INTEGER, ids BLOB, run BLOB, sum BLOB,
    PRIMARY KEY (draw, problem, prompt, number)
);
"""
ROW = "draw, problem, prompt, number, text, tokens, truncated, ids, run, sum"
"""The columns of a sample. Texts are blobs: an SQLite text holds no half of a surrogate pair."""

_WAIT = 60
"""Seconds to wait for another process that is writing."""

ELSEWHERE = "let pytest keep its cache elsewhere (-o cache_dir=DIR)"

_REMEDIES = {
    "SQLITE_FULL": f"make room (`grpo-harness store --prune --to SIZE`), or {ELSEWHERE}",
    "SQLITE_IOERR": f"make room, or {ELSEWHERE}: on a local disk, not one of a network",
    "SQLITE_READONLY": f"make the folder and the file writable, or {ELSEWHERE}",
    "SQLITE_CANTOPEN": f"make the folder and the file writable, or {ELSEWHERE}",
    "SQLITE_CORRUPT": "`grpo-harness store --repair` keeps the samples that can still be read",
    "SQLITE_NOTADB": "`grpo-harness store --repair` puts the file aside",
    "SQLITE_BUSY": "another process has been writing for a minute: let it end, and run again",
}


class StoreError(HarnessError):
    """A store cannot be read or written. One line: the place, the cause, what to do."""


class Key(NamedTuple):
    """A problem's id, a digest of the exact prompt, and the number of the sample, from 0."""

    problem: str
    prompt: bytes
    number: int

    @classmethod
    def of(cls, problem: str, prompt: str, number: int) -> Key:
        """Return the key of a sample of a prompt."""
        return cls(problem, bytes.fromhex(digest(prompt))[:16], number)


class Store:
    """The samples in one file.

    ``draws`` says which samples a run draws, and ``run`` names the run: if it draws all anew,
    it uses what its own processes have drawn. ``notices`` lists what was damaged and is drawn
    again.
    """

    def __init__(self, file: Path, *, draws: Draws = "missing", run: str = "") -> None:
        self.file = file
        self.draws = draws
        self.notices: list[str] = []
        self._run = run

    def anew(self) -> Store:
        """Return this store for draws that use nothing that was stored before the run."""
        if self.draws == "none":
            return self
        other = Store(self.file, draws="all", run=self._run)
        other.notices = self.notices
        return other

    @contextmanager
    def open(self, policy: str, task: str, what: Mapping[str, Any]) -> Iterator[Samples]:
        """Read the samples of ``what``, and let no other process draw them meanwhile.

        ``policy`` is the policy's name, only to be shown. Raises ``StoreError``.
        """
        identity = json.dumps({**what, "task": task}, sort_keys=True)
        draw = bytes.fromhex(digest(identity))[:16]
        reads_only = self.draws == "none"
        nowhere = reads_only and not self.file.exists()
        with (
            nullcontext() if reads_only else self._alone(draw),
            closing(sqlite3.connect(":memory:") if nowhere else connect(self.file)) as database,
        ):
            shown = (_bytes(policy), _bytes(task), identity)
            samples = Samples(database, self.file, draw, self._run, shown)
            if not nowhere:
                self._load(samples)
            yield samples

    def _load(self, samples: Samples) -> None:
        damaged = samples.load(only_own=self.draws == "all", remove=self.draws != "none")
        if damaged:
            self.notices.append(
                f"{damaged} of the samples in {self.file} were damaged: they are drawn again"
            )

    @contextmanager
    def _alone(self, draw: bytes) -> Iterator[None]:
        # A few files for all draws: two draws that share one wait for each other, no more.
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.file.with_name(f"{self.file.name}-lock-{draw[:1].hex()}"))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


class Samples(dict[Key, Sample]):
    """The samples of one draw; ``add`` commits at once.

    ``shown`` is what is written of the draw beside its samples: policy, task type and identity.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        file: Path,
        draw: bytes,
        run: str,
        shown: tuple[bytes, bytes, str],
    ) -> None:
        super().__init__()
        self._database = database
        self._file = file
        self._draw = draw
        self._run = run.encode()
        self._shown = shown

    def load(self, *, only_own: bool, remove: bool) -> int:
        """Read the stored samples; ``only_own``: those of this run. Returns how many were damaged.

        Damaged ones are deleted if ``remove``.
        """
        damaged = []
        with reported(self._file):
            select = f"SELECT rowid, {ROW} FROM samples WHERE draw = ?"  # noqa: S608 - constants
            for rowid, *row in self._database.execute(select, (self._draw,)):
                sample = read_row(row)
                if sample is None or row[0] != self._draw:
                    damaged.append((rowid,))
                elif not only_own or row[8] == self._run:
                    self[_key(row)] = sample
            if damaged and remove:
                with committed(self._database):
                    self._database.executemany("DELETE FROM samples WHERE rowid = ?", damaged)
        return len(damaged)

    def add(self, samples: Mapping[Key, Sample]) -> None:
        """Keep ``samples``, in memory and on disk. Failed draws are not written to disk.

        Raises ``StoreError``; then none of them is kept.
        """
        rows = [self._row(key, s) for key, s in samples.items() if s.error is None]
        with reported(self._file), committed(self._database):
            write_draw(self._database, (self._draw, *self._shown, time.time()))
            write_rows(self._database, rows)
        self.update(samples)

    def _row(self, key: Key, sample: Sample) -> tuple[Any, ...]:
        row = (
            *(self._draw, _bytes(key.problem), key.prompt, key.number),
            *(_bytes(sample.text), sample.tokens, int(sample.truncated)),
            *(msgspec.msgpack.encode(sample.ids), self._run),
        )
        return (*row, _sum(row))


def write_draw(database: sqlite3.Connection, row: tuple[Any, ...]) -> None:
    """Write, or replace, what is known of a draw."""
    database.execute("REPLACE INTO draws VALUES (?, ?, ?, ?, ?)", row)


def write_rows(database: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Write, or replace, rows of ``ROW``."""
    places = ", ".join("?" * 10)
    database.executemany(f"REPLACE INTO samples ({ROW}) VALUES ({places})", rows)  # noqa: S608


def read_row(row: list[Any]) -> Sample | None:
    """Return the sample of a row of ``ROW``, or ``None`` if the row is damaged."""
    try:
        if row[-1] != _sum(tuple(row[:-1])):
            return None
        text, tokens, truncated, ids = row[4:8]
        ids = msgspec.msgpack.decode(ids, type=tuple[int, ...])
        return Sample(text.decode(errors="surrogatepass"), tokens, bool(truncated), ids=ids)
    except (msgspec.MsgspecError, ValueError, TypeError):
        return None


def _key(row: list[Any]) -> Key:
    return Key(row[1].decode(errors="surrogatepass"), row[2], row[3])


def _sum(row: tuple[Any, ...]) -> bytes:
    return xxh3_64_digest(msgspec.msgpack.encode(row))


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def connect(file: Path) -> sqlite3.Connection:
    """Open the store in a file, which is made if there is none. Raises ``StoreError``."""
    with reported(file):
        database = sqlite3.connect(file, timeout=_WAIT, isolation_level=None)
        database.text_factory = bytes  # a damaged text need not be UTF-8
        try:
            if _version(database) == 0:
                _create(database, file)
            if _version(database) != _FORMAT or _pragma(database, "application_id") != _APPLICATION:
                raise StoreError(
                    f"{file} is no store of this version of grpo-harness: install the newer one, "
                    f"{ELSEWHERE}, or put the file aside by `grpo-harness store --repair`"
                )
            database.execute("PRAGMA synchronous = FULL")
        except BaseException:
            database.close()
            raise
    return database


def _create(database: sqlite3.Connection, file: Path) -> None:
    # Two processes may come here at once, and the switch to WAL does not wait for another.
    with writing(file), FileLock(file.with_name(f"{file.name}-lock")):
        if _version(database) != 0:
            return
        # So that a prune gives its room back, without a second copy of the file on a full disk.
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION}; "
            f"PRAGMA user_version = {_FORMAT}; COMMIT"
        )


def _version(database: sqlite3.Connection) -> int:
    return _pragma(database, "user_version")


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


@contextmanager
def committed(database: sqlite3.Connection) -> Iterator[None]:
    """Write what is executed inside in one transaction, or nothing of it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def reported(file: Path) -> Iterator[None]:
    """Raise ``StoreError`` for an error of SQLite on the store's file."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        remedy = next((text for code, text in _REMEDIES.items() if name.startswith(code)), "")
        raise StoreError(
            f"the store {file} cannot be read or written ({one_line(error)}): "
            f"{remedy or _REMEDIES['SQLITE_CORRUPT']}"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ``StoreError`` for an ``OSError`` on a file of the cache."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read or written ({one_line(error)}): make room, or {ELSEWHERE}"
        ) from error
