"""Read what a run of TRL's trainer has logged, from the files that it left.

``trainer_state.json`` is written by every trainer of transformers, in the output folder or in its
checkpoints; ``log.json`` by `grpo-harness train`. The files are untrusted: they may come with a
downloaded checkpoint.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any

from grpo_harness.errors import HarnessError
from grpo_harness.text import escape, one_line
from grpo_harness.training.resources import FILE, ResourcesError, read_resources

_STATE, _LOG, _RECIPE = "trainer_state.json", "log.json", "recipe.json"
_MOST_BYTES = 1 << 30
_GREATEST = 1e30
_FINITE = ("loss", "grad_norm", "reward")


class LogError(HarnessError):
    """A log cannot be read or compared. One line: the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Log:
    """The log of one run: the file it was read from, and a row for each logged step, in order.

    A row has ``step`` and the figures by TRL's names. ``training`` is the name of the recipe, and
    ``hardware``, ``peak_memory`` (bytes) and the number of ``processes`` are known of runs of
    `grpo-harness train` alone.
    """

    path: Path
    rows: tuple[Mapping[str, float], ...]
    training: str | None = None
    hardware: str | None = None
    peak_memory: float | None = None
    processes: int | None = None

    @property
    def steps(self) -> int:
        """The number of the last logged step."""
        return int(self.rows[-1]["step"])

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return the steps that logged a figure, each with its value."""
        return [(int(row["step"]), row[key]) for row in self.rows if key in row]

    @property
    def rewards(self) -> list[str]:
        """The names of the reward functions, in the order in which they were logged."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key[8:-5] for key in keys if key.startswith("rewards/") and key.endswith("/mean")]


def reward_key(name: str) -> str:
    """Return the key by which TRL logs the mean of a reward function."""
    return f"rewards/{name}/mean"


def read(path: Path) -> Log:
    """Read the log of the run in a folder, or one of the two kinds of file itself.

    Of a folder of checkpoints, the one of the last step is read. Raises ``LogError`` for a file
    that is missing, damaged, or without two steps that logged a reward.
    """
    file = _find(path)
    content = _json(file)
    if file.name != _LOG and isinstance(content, Mapping):
        content = content.get("log_history")
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise LogError(f"{file} is no log of a trainer: name the folder that a training run wrote")
    rows = _rows(content, file)
    if sum("reward" in row for row in rows) < 2:
        raise LogError(
            f"{file} has fewer than two steps that logged a reward: it must be the log of a "
            "GRPOTrainer, with logging_steps well below max_steps"
        )
    name, processes = _said(file.parent / _RECIPE)
    measured = None
    if (file.parent / FILE).is_file():
        try:
            measured = read_resources(file.parent)
        except ResourcesError as error:
            raise LogError(str(error)) from error
    return Log(
        path=file,
        rows=rows,
        training=name,
        hardware=measured.hardware if measured else None,
        peak_memory=float(measured.peak_memory_bytes) if measured else None,
        processes=processes,
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (_LOG, _STATE):
        if (path / name).is_file():
            return path / name
    checkpoints = {
        int(match[1]): state
        for state in path.glob(f"checkpoint-*/{_STATE}")
        if (match := re.fullmatch(r"checkpoint-(\d{1,9})", state.parent.name))
    }
    if not checkpoints:
        what = "has" if path.is_dir() else "does not exist, so there is"
        raise LogError(
            f"{path} {what} no {_LOG}, {_STATE} or checkpoint-N/{_STATE}: name the folder that a "
            "training run wrote"
        )
    return checkpoints[max(checkpoints)]


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("larger than 1 GiB")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LogError(
            f"{file} cannot be read ({one_line(error)}): copy it anew from where the run wrote it"
        ) from error


def _rows(content: Sequence[Mapping[str, Any]], file: Path) -> tuple[Mapping[str, float], ...]:
    """Return the rows of training steps in order. Raises ``LogError`` for one logged otherwise."""
    rows: dict[int, Mapping[str, float]] = {}
    for number, row in enumerate(content):
        if "loss" not in row and "reward" not in row:  # the summary at the end, an evaluation
            continue
        figures = {k: v for k, v in row.items() if k in _FINITE or not _is_note(v)}
        for key, value in figures.items():
            # The trainer logs None for a number that JSON does not have.
            if value is None and key not in _FINITE:
                continue
            has = f"{file}: row {number} has {escape(key, 60)} = {escape(repr(value), 40)}"
            if not (value is None or _is_number(value)):
                raise LogError(f"{has}, which is no number: copy the log anew from where it is")
            if value is None or not -_GREATEST < value < _GREATEST:
                raise LogError(f"{has}, from which no training recovers: see what that step did")
        step = figures.get("step")
        if step is None or step != int(step) or not 0 <= step < 1e9:
            raise LogError(f"{file}: row {number} has no step: it is no log of a trainer")
        found = {key: float(v) for key, v in figures.items() if v is not None}
        before = rows.setdefault(int(step), found)
        for key in before.keys() & found.keys():
            if before[key] != found[key]:
                raise LogError(
                    f"{file}: step {step:g} is logged twice, with {escape(key, 60)} = "
                    f"{before[key]:g} and {found[key]:g}: name the log of one run, whole"
                )
        rows[int(step)] = {**before, **found}
    _check_whole(sorted(rows), file)
    return tuple(rows[step] for step in sorted(rows))


def _check_whole(steps: Sequence[int], file: Path) -> None:
    """Raise ``LogError`` if steps are missing: between two is more than the usual distance."""
    if len(steps) < 2:
        return
    distances = [b - a for a, b in pairwise((0, *steps))]
    usual = max(mode(distances[1:]), 1)
    for step, distance in zip(steps, distances, strict=True):
        if distance > usual:
            raise LogError(
                f"{file} logs every {usual} steps, and none from {step - distance + 1} to "
                f"{step - 1}: copy the whole log, or train with one logging_steps throughout"
            )


def _is_note(value: Any) -> bool:
    """Tell whether it is a text that is no number."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(file: Path) -> tuple[str | None, int | None]:
    """Return the recipe's name and the processes of a run of `grpo-harness train`, if it says."""
    content = _json(file) if file.is_file() else None
    said = content if isinstance(content, Mapping) else {}
    recipe, processes = said.get("recipe"), said.get("processes")
    name = recipe.get("name") if isinstance(recipe, Mapping) else None
    return (
        name if isinstance(name, str) and name else None,
        processes if isinstance(processes, int) else None,
    )
