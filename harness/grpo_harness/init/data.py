"""A file as a data set: its columns, by its first row. No file is read further than that."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

_MOST = 1 << 20
"""Bytes of a file that are read for its first row."""

_PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input")
_ANSWERS = ("answer", "solution", "ground_truth", "target", "label", "reference", "expected")
_OF_TRL = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
_KIND = re.compile(r"(?<![a-z])(test|eval|evaluation|val|valid|validation|dev)(?![a-z])")


@dataclass(frozen=True)
class DataFile:
    """A data set in the repository. ``prompt`` and ``answer`` name columns."""

    path: str
    columns: tuple[str, ...]
    prompt: str
    answer: str | None

    @property
    def held_out(self) -> bool:
        """Whether its name says that no training sees it."""
        return bool(_KIND.search(self.path.lower()))


def data_in(file: Path, name: str) -> DataFile | None:
    """Return the data set that a file is, if its columns look like prompts.

    Raises ``ValueError`` or ``OSError`` for one that is damaged.
    """
    row = _READERS[file.suffix.lower()](file)
    if row is None or not all(isinstance(column, str) for column in row):
        return None
    prompt = next((column for column in _PROMPTS if column in row), None)
    answer = next((column for column in _ANSWERS if column in row), None)
    # A table with a column "input" may be anything, and one with an answer beside it is not.
    if prompt is None or (prompt != "prompt" and answer is None) or not _asks(row[prompt]):
        return None
    if reserved := sorted(_OF_TRL & row.keys()):
        raise ValueError(
            f"a column {reserved[0]}, which is an argument that TRL itself gives to rewards"
        )
    return DataFile(name, tuple(row), prompt, answer)


def _asks(prompt: Any) -> bool:
    """Tell whether a value can be a prompt: a text, or a list of messages."""
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(of, dict) and "role" in of for of in prompt)
    return isinstance(prompt, str) and bool(prompt)


def _json_lines(file: Path) -> Mapping[str, Any] | None:
    with file.open("rb") as lines:
        line = lines.readline(_MOST)
    if len(line) == _MOST:
        raise ValueError("its first row is longer than 1 MiB")
    if not line.strip():
        raise ValueError("it has no first row")
    return _row(json.loads(line))


def _json(file: Path) -> Mapping[str, Any] | None:
    """Return the first row of a list, or of JSON Lines; another object is not a table."""
    with file.open("rb") as start:
        text = start.read(_MOST).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not any(f'"{name}"' in text for name in _PROMPTS):
        return None
    try:
        row, end = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except ValueError:
        if len(text) > _MOST // 2:
            raise ValueError("its first row is longer than 1 MiB, or damaged") from None
        raise
    rest = text.removeprefix("[").lstrip()[end:].strip()
    return _row(row) if text.startswith("[") or rest.startswith("{") else None


def _csv(file: Path) -> Mapping[str, Any] | None:
    with file.open("rb") as start:
        text = start.read(_MOST).decode("utf-8-sig", errors="replace")
    try:
        return next(csv.DictReader(StringIO(text, newline="")), None)
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _parquet(file: Path) -> Mapping[str, Any] | None:
    """Return a row made of the types of the columns, which the file's end says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def like(kind: Any) -> Any:
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return "a text"
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            return [{field.name: "" for field in kind.value_type}]
        return None

    return {field.name: like(field.type) for field in pq.read_schema(file)}


def _row(content: Any) -> Mapping[str, Any] | None:
    return content if isinstance(content, dict) else None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
KINDS = frozenset(_READERS)
"""The ends of the names of files that may be data sets."""
