"""A table of the user's rows: a file, a data set, or what a function of the user's returns.

Read with `datasets`, from local caches first. Every row is a problem, and all its columns go to the
reward functions, as in TRL. Nothing is held out: the splits of a data set are its owner's.
"""

import glob
import importlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from grpo_harness.errors import HarnessError, user_code
from grpo_harness.tasks.task import Problem, Prompt, Reading, Source
from grpo_harness.text import digest, escape, one_line, shown

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NO_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not pass on, because the reward's own arguments have these names."""

_RESERVED = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
"""Columns that would be taken for the arguments of a reward that TRL makes itself."""


class DataError(HarnessError):
    """A data set cannot be used. One line: which, the row, and what to do."""


@dataclass(frozen=True)
class DatasetSource(Source):
    """The rows of a table as problems.

    ``path`` is a .jsonl, .json, .csv or .parquet file or a folder that `datasets` saved, looked for
    from ``home``; ``module:function``; or the id of a data set on the Hub, with its ``config`` and
    ``revision``. ``prompt``, ``answer``, ``row_id`` and ``slices`` name columns.
    ``settings`` are what to look at where the table cannot be read.
    """

    name: str
    path: str
    home: Path = Path()
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    prompt: str = "prompt"
    answer: str | None = None
    row_id: str | None = None
    slices: tuple[str, ...] = field(default=())
    settings: str = "path, split and name"
    reads: bool = field(default=False, init=False)

    def problems(self, n: int) -> list[Problem]:
        """Return at most ``n`` problems, in the order of their ids. Raises ``DataError``."""
        return self._problems[:n]

    def conversation(self, problem: Problem, system: str | None) -> Prompt:
        """Return the row's prompt; ``system`` replaces its system message, or removes it if empty.

        Raises ``DataError`` for a ``system`` and a prompt that is a text.
        """
        if system is None:
            return problem.prompt
        if isinstance(problem.prompt, str):
            raise DataError(
                f"data {self.name!r}: a prompt that is a text goes to the policy as it is, without "
                "a system message: remove system, or make the prompt a list of messages"
            )
        others = [m for m in problem.prompt if m["role"] != "system"]
        return [{"role": "system", "content": system}, *others] if system else others

    def columns(self, problem: Problem) -> Mapping[str, Any]:
        """Return the other columns of the row."""
        return problem.task

    def wanted(self, problem: Problem) -> str | None:
        """Return the column of the true answer, if one is named."""
        return None if problem.answer is None else str(problem.answer)

    def reading(self, problem: Problem, completion: str) -> Reading | None:
        """Leave the judgement to the rewards."""
        return None

    def content(self, problem: Problem) -> str:
        """Return a digest of the columns."""
        return digest(_canonical(problem.task))[:12]

    @cached_property
    def _problems(self) -> list[Problem]:
        return sorted(self.in_order, key=lambda problem: problem.id)

    @cached_property
    def in_order(self) -> list[Problem]:
        """All problems, in the order of the rows. Raises ``DataError``."""
        times: dict[str, int] = {}
        found: dict[str, Problem] = {}
        for number, row in enumerate(self._rows()):
            problem = self._problem(number, row)
            times[problem.id] = count = times.get(problem.id, 0) + 1
            if count > 1 and self.row_id:
                raise DataError(
                    f"{self._where(number)}: {self.row_id} is {escape(repr(row[self.row_id]))}, as "
                    "in a row before: name a column whose values differ, or none"
                )
            own = problem.id if count == 1 else f"{problem.id}.{count}"
            found[own] = replace(problem, id=own)
        if not found:
            raise DataError(f"{self._place} has no rows")
        kinds = {isinstance(problem.prompt, str) for problem in found.values()}
        if len(kinds) > 1:
            raise DataError(
                f"{self._place}: some prompts in {self.prompt} are texts, and some are lists of "
                "messages: make them all of one kind, as TRL takes a batch by its first"
            )
        return list(found.values())

    def _problem(self, number: int, row: Mapping[str, Any]) -> Problem:
        named = (self.prompt, self.answer, self.row_id, *self.slices)
        for column in (name for name in named if name is not None):
            if column not in row:
                raise DataError(
                    f"{self._where(number)}: there is no column {column!r}; it has "
                    f"{', '.join(map(escape, row))}"
                )
        prompt = row[self.prompt]
        if not (isinstance(prompt, str) and prompt) and not _is_conversation(prompt):
            raise DataError(
                f"{self._where(number)}: {self.prompt} is {escape(shown(prompt), 80)}: it must be "
                "a text, or a list of messages with role and content"
            )
        columns = {name: value for name, value in row.items() if name not in _NO_COLUMNS}
        for name in columns.keys() & (_RESERVED - {self.prompt}):
            raise DataError(
                f"{self._place} has a column {name}, which is an argument that TRL itself gives to "
                "rewards: rename the column"
            )
        for name in self.slices:
            if name not in columns:
                raise DataError(
                    f"{self._place}: slices has {name!r}, which is what is asked or drawn: name "
                    "columns that divide the rows"
                )
        own = str(row[self.row_id]) if self.row_id else ""
        if not own or not re.fullmatch(r"[\w.-]{1,64}", own, re.ASCII):
            own = digest(own or _canonical([prompt, columns]))[:12]
        answer = None if self.answer is None or row[self.answer] is None else str(row[self.answer])
        return Problem(f"{self.name}-{own}", self.name, columns, prompt, answer)

    @property
    def _place(self) -> str:
        return f"data {self.name!r}: {escape(self.path)}"

    def _where(self, number: int) -> str:
        return f"data {self.name!r}, row {number} of {escape(self.path)}"

    def _rows(self) -> Iterator[dict[str, Any]]:
        with (
            user_code(
                lambda error: DataError(
                    f"{self._place} has no rows"
                    if _is_empty(error.__cause__ or error)
                    else f"{self._place} cannot be read as a data set "
                    f"({one_line(error.__cause__ or error)}): see {self.settings}"
                )
            ),
            _quiet(),
            tempfile.TemporaryDirectory() as cache,
        ):
            table = self.table(cache)
            if any(name.startswith("__index_level_") for name in table.column_names):
                raise ValueError(
                    "its first line has fewer fields than others: quote texts with commas"
                )
            # A transform makes the rows, as in TRL; any other format is a view of the same values.
            made = table.format["type"] == "custom"
            rows: list[dict[str, Any]] = list(table) if made else table.to_list()
        for number, row in enumerate(rows):
            if odd := row.keys() ^ rows[0].keys():
                raise DataError(
                    f"{self._where(number)}: the column {escape(min(odd))} is in this row or in "
                    "the first, and not in both: give each row the same columns"
                )
        yield from rows

    def table(self, cache: str) -> Any:
        """Return the data set, a ``datasets.Dataset``."""
        import datasets

        path = self.home / self.path
        local = _FUNCTION.fullmatch(self.path) or path.exists() or path.suffix.lower() in _READERS
        if local and (self.config or self.revision):
            raise ValueError(f"{self.path} has no name and revision, as data sets of the Hub have")
        if _FUNCTION.fullmatch(self.path):
            module, _, function = self.path.partition(":")
            table = getattr(importlib.import_module(module), function)()
        elif path.is_dir():
            table = datasets.load_from_disk(str(path))
        elif (reader := _READERS.get(path.suffix.lower())) is not None:
            split = re.match(r"\w+", self.split or "train")
            # Otherwise `datasets` takes a file's name for a pattern, and reads other files.
            name = glob.escape(str(path)) if path.is_file() else str(path)
            files = {split.group() if split else "train": name}
            return datasets.load_dataset(
                reader, data_files=files, split=self.split or "train", cache_dir=cache
            )
        elif path.is_file():
            raise ValueError(f"{path.name} does not end in {', '.join(_READERS)}")
        elif path.parent != self.home and path.parent.is_dir():
            raise FileNotFoundError(f"there is no {path}")
        else:
            return self._downloaded()
        if isinstance(table, datasets.DatasetDict):
            if (self.split or "train") not in table:
                raise ValueError(f"it has the splits {', '.join(table)}: name one with split")
            table = table[self.split or "train"]
        elif self.split:
            raise ValueError(f"it has no splits, so there is no {self.split}: leave split out")
        if not isinstance(table, datasets.Dataset):
            raise TypeError(f"it is {type(table).__name__}, not a Dataset")
        return table

    def _downloaded(self) -> Any:
        import datasets
        from huggingface_hub import constants

        how = {"name": self.config, "split": self.split or "train", "revision": self.revision}
        offline = (
            patch.object(datasets.config, "HF_HUB_OFFLINE", True),
            patch.object(constants, "HF_HUB_OFFLINE", True),
        )
        try:
            with offline[0], offline[1]:
                return datasets.load_dataset(self.path, **how)
        except Exception:  # not in the cache, in one of many ways
            if constants.HF_HUB_OFFLINE:
                raise
        return datasets.load_dataset(self.path, **how)


def _is_empty(error: BaseException) -> bool:
    """Tell whether `datasets` has failed because there is nothing to read."""
    return isinstance(error, StopIteration) or "corresponds to no data" in shown(error, str)


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(given: Any) -> bool:
    """Tell whether it has a role and a text, parts of one, or calls of tools."""
    return (
        isinstance(given, dict)
        and isinstance(given.get("role"), str)
        and (isinstance(given.get("content"), str | list) or bool(given.get("tool_calls")))
    )


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, default=shown)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and log messages of `datasets`: errors are told in one line."""
    import datasets

    bars, before = datasets.is_progress_bar_enabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            datasets.enable_progress_bars()
