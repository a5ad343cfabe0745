"""What the store holds, and what is left of it: prune it by age and by size, mend it."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from grpo_harness.store import (
    ROW,
    committed,
    connect,
    read_row,
    reported,
    write_draw,
    write_rows,
    writing,
)
from grpo_harness.text import escape

_ROW_BYTES = 120
"""Bytes of a row beside its text and token ids, about: keys, numbers, its entry in the index."""

_GIVE_UP = 20_000
"""Rows in succession that cannot be read before a repair takes the rest for lost."""

_MOST_LENGTHENED = 100
"""How many times as long as it is a file can have been; more is a damaged header."""

_SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}


@dataclass(frozen=True)
class Holding:
    """The samples of one policy by one engine: how many, their bytes (about), when drawn."""

    policy: str
    fingerprint: str
    engine: str
    runs: int
    samples: int
    size: int
    oldest: float
    newest: float


def holdings(file: Path) -> list[Holding]:
    """Return what the store in a file holds, the newest first. Raises ``StoreError``."""
    with closing(connect(file)) as database, reported(file):
        sums = f"count(*), sum(length(text) + length(ids) + {_ROW_BYTES})"
        found = database.execute(
            f"SELECT policy, identity, drawn, {sums} FROM samples LEFT JOIN draws USING (draw) "  # noqa: S608
            "GROUP BY draw"
        ).fetchall()
    groups: dict[tuple[str, str, str], list[tuple[Any, ...]]] = {}
    for policy, identity, drawn, *rest in found:
        name = policy.decode(errors="backslashreplace") if policy else "?"
        seed, fingerprint, engine = _described(identity or b"")
        group = groups.setdefault((name, fingerprint, engine), [])
        group.append((seed, drawn or 0.0, *rest))
    listed = [
        Holding(*group, len(set(seeds)), sum(counts), sum(sizes), min(drawn), max(drawn))
        for group, rows in groups.items()
        for seeds, drawn, counts, sizes in [tuple(zip(*rows, strict=True))]
    ]
    return sorted(listed, key=lambda holding: -holding.newest)


def _described(identity: bytes) -> tuple[Any, str, str]:
    """Return the seed, the fingerprint and the engine of a draw; question marks if damaged."""
    try:
        what = json.loads(identity)
        engine = {"engine": "", **what["engine"], "class": ""}
        parts = " ".join(dict.fromkeys(str(part) for part in engine.values() if part))
        return what["run_seed"], str(what["policy"]), parts
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "?", "?"


def size(file: Path) -> int:
    """Return the bytes of a store's file and its log."""
    parts = (file, file.with_name(f"{file.name}-wal"))
    return sum(part.stat().st_size for part in parts if part.exists())


def shown(file: Path) -> str:
    """Return a table of what a store holds. Raises ``StoreError``."""
    held = holdings(file)
    rows = [
        {
            "policy": escape(holding.policy),
            "fingerprint": escape(holding.fingerprint),
            "engine": escape(holding.engine),
            "runs": holding.runs,
            "samples": f"{holding.samples:,}",
            "size": megabytes(holding.size),
            "drawn": _ages(holding.newest, holding.oldest),
        }
        for holding in held
    ]
    total = sum(holding.samples for holding in held)
    said = f"{file}: {total:,} samples, {megabytes(size(file))}"
    return "\n".join([said, *([tabulate(rows, "keys", "simple")] if rows else [])])


def megabytes(size: int) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{size / 1e6:,.1f} MB"


def prune(file: Path, *, before: float | None, most: int | None, dry_run: bool) -> tuple[int, int]:
    """Delete the samples drawn before a time, and the oldest until ``most`` bytes are left.

    Samples of one policy, task type and run go together. Returns how many go, and the bytes that
    are left. Raises ``StoreError``.
    """
    with closing(connect(file)) as database, reported(file):
        database.execute("BEGIN IMMEDIATE")
        gone = 0
        # A draw's entry is written with its samples: those without one are left by damage.
        gone += _delete(database, "draw NOT IN (SELECT draw FROM draws)")
        oldest = database.execute("SELECT draw, drawn FROM draws ORDER BY drawn").fetchall()
        for draw, drawn in oldest:
            old = before is not None and drawn < before
            if not old and (most is None or _used(database) <= most):
                break
            gone += _delete(database, "draw = ?", draw)
            database.execute("DELETE FROM draws WHERE draw = ?", (draw,))
        left = _used(database)
        if dry_run:
            database.execute("ROLLBACK")
        else:
            database.execute("COMMIT")
            # By a script: `execute` takes one step, which frees one page.
            database.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")
    return gone, left


def _delete(database: sqlite3.Connection, which: str, *values: bytes) -> int:
    return database.execute(f"DELETE FROM samples WHERE {which}", values).rowcount  # noqa: S608


def _used(database: sqlite3.Connection) -> int:
    pages, free, bytes_of_page = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * bytes_of_page)


def repair(file: Path) -> tuple[int, Path]:
    """Move a damaged store aside, and keep in a new one what can be read.

    No run may use the store meanwhile. Returns the number of samples kept, and where the damaged
    file is. Raises ``StoreError``.
    """
    mended, aside = (file.with_name(f"{file.name}.{what}") for what in ("mended", "damaged"))
    with writing(file):
        _remove(mended)
        _lengthen(file)
        with closing(connect(mended)) as new, reported(mended), committed(new):
            kept = 0
            with closing(sqlite3.connect(file, isolation_level=None)) as old:
                old.text_factory = bytes
                for row in _readable(old, "draws", "draw, policy, task, identity, drawn"):
                    if isinstance(row[0], bytes) and isinstance(row[4], float):
                        write_draw(new, tuple(row))
                for row in _readable(old, "samples", ROW):
                    if read_row(row) is not None:
                        write_rows(new, [tuple(row)])
                        kept += 1
        _remove(aside)
        file.replace(aside)
        _remove(file)
        mended.replace(file)
    return kept, aside


def _lengthen(file: Path) -> None:
    """Fill up a file that was cut short: SQLite reads nothing of one without its last pages."""
    with file.open("r+b") as opened:
        header = opened.read(32)
        page, pages = (int.from_bytes(header[at : at + n]) for at, n in ((16, 2), (28, 4)))
        end = opened.seek(0, 2)
        if end < page * pages <= _MOST_LENGTHENED * end:
            opened.truncate(page * pages)


def _readable(database: sqlite3.Connection, table: str, columns: str) -> Iterator[list[Any]]:
    """Yield the rows that can be read, one query each: a damaged page costs its own rows."""
    select = f"SELECT rowid, {columns} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT 1"  # noqa: S608
    number = failed = 0
    while failed < _GIVE_UP:
        try:
            found = database.execute(select, (number,)).fetchone()
        except sqlite3.Error as error:
            if not error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_IOERR")):
                return  # no database at all, or without this table
            number, failed = number + 1, failed + 1
            continue
        if found is None:
            return
        if found[0] <= number:  # a page that is in the wrong place
            number, failed = number + 1, failed + 1
            continue
        number, failed = found[0], 0
        yield list(found[1:])


def _remove(file: Path) -> None:
    """Remove a store's file with its log and index, if they are there."""
    for end in ("", "-wal", "-shm"):
        file.with_name(f"{file.name}{end}").unlink(missing_ok=True)


def former(file: Path) -> list[Path]:
    """Return the files of the format before this one, a folder of JSON Lines, which none reads."""
    kinds = (".jsonl", ".lock", ".mended")
    return [path for path in file.with_suffix("").glob("*") if path.suffix in kinds]


def seconds(text: str) -> float:
    """Read an age such as ``12h``, ``30d`` or ``2w``. Raises ``ValueError``."""
    found = re.fullmatch(r"(\d+)([hdw])", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no age: write hours, days or weeks, such as 12h, 30d or 2w")
    return int(found[1]) * _SECONDS[found[2]]


def size_of(text: str) -> int:
    """Read a size such as ``500MB``. Raises ``ValueError``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size: write such as 500MB or 2GB")
    return int(float(found[1]) * _BYTES[found[2].lower()])


def _ages(*moments: float) -> str:
    """Return how long ago moments were, each once."""
    return " to ".join(dict.fromkeys(map(_age, moments))) + " ago"


def _age(moment: float) -> str:
    passed = max(0.0, time.time() - moment)
    for unit, length in (("days", 86_400), ("hours", 3600)):
        if passed >= 2 * length:
            return f"{passed / length:.0f} {unit}"
    return f"{passed / 60:.0f} minutes"
