"""The recorded runs of a training: ``<baselines>/training/<name>.json``, in git.

The runs differ in their seeds alone, so that their spread is that of one more run. Of each run the
file has its figures, and its curves as means over equal windows of steps.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated

import msgspec
from msgspec import Meta

from grpo_harness.atomic import replace
from grpo_harness.logs.figures import figures
from grpo_harness.logs.read import Log, LogError
from grpo_harness.text import escape, one_line

FOLDER = "training"
"""The folder below the baselines that holds ``<name>.json`` for each training."""

TRAINING = "default"
"""The name of a training whose runs do not say one."""

LEAST_RUNS = 3
"""Of fewer runs nobody knows how much one more may differ."""

WINDOWS = 20
"""A curve is divided into this many windows, or into its logged steps if they are fewer."""

_SCHEMA = 1
_NAME = re.compile(r"\w([\w .+-]{0,62}[\w.+-])?")
_Number = Annotated[float, Meta(gt=-1e30, lt=1e30)]
_Error = Annotated[float, Meta(ge=0, lt=1e30)]
_Count = Annotated[int, Meta(ge=0, lt=10**9)]


class Window(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The mean of a curve from its logged step ``first`` to ``last``."""

    first: _Count
    last: _Count
    mean: _Number


class RecordedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One recorded run. ``figures`` has (number, standard error) by the figure's name."""

    steps: _Count
    rewards: list[str]
    hardware: str | None
    figures: dict[str, tuple[_Number, _Error]]
    curves: dict[str, Annotated[list[Window], Meta(min_length=1)]]


class Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The recorded runs of a training, at least three that can be compared."""

    schema: int
    training: str
    runs: Annotated[list[RecordedRun], Meta(min_length=LEAST_RUNS)]


def windows(log: Log, key: str) -> list[Window]:
    """Return a curve as means over windows of equally many logged steps, nearly."""
    series = log.series(key)
    n = min(WINDOWS, len(series))
    ends = [round(i * len(series) / n) for i in range(n + 1)] if n else []
    parts = [series[a:b] for a, b in pairwise(ends)]
    return [Window(part[0][0], part[-1][0], fmean(v for _, v in part)) for part in parts]


def summed_up(log: Log) -> RecordedRun:
    """Return what is recorded of a run."""
    measured = [*figures(log)]
    return RecordedRun(
        steps=log.steps,
        rewards=log.rewards,
        hardware=log.hardware,
        figures={f.name: (v.number, v.error) for f, v in measured},
        curves={f.key: found for f, _ in measured if (found := windows(log, f.key))},
    )


def path_of(name: str, baselines: Path) -> Path:
    """Return the path of a training's recorded runs. Raises ``LogError`` for a name of no file."""
    if not _NAME.fullmatch(name):
        raise LogError(
            f"'{escape(name, 80)}' cannot be the name of a training: use up to 64 letters, digits, "
            "spaces, '_', '-', '+' and '.' (--name)"
        )
    return baselines / FOLDER / f"{name}.json"


def load(path: Path) -> Recorded:
    """Load recorded runs. Raises ``LogError``."""
    if not path.is_file():
        raise LogError(
            f"no recorded runs: there is no {path}. Train at least {LEAST_RUNS} times with "
            "different seeds, then: grpo-harness log RUN RUN RUN --record"
        )
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Recorded)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LogError(
            f"{path} is damaged ({one_line(error)}): restore it from git, or record it anew"
        ) from error
    if found.schema != _SCHEMA:
        raise LogError(
            f"{path} has the schema {found.schema}, and this version reads {_SCHEMA}: install the "
            "version that wrote it, or record it anew"
        )
    if found.training != path.stem:
        raise LogError(
            f"{path} has the runs of '{escape(found.training)}': give it that name, or record anew"
        )
    _check_alike([(str(number), run) for number, run in enumerate(found.runs)], path)
    return found


def record(name: str, logs: Sequence[Log], baselines: Path) -> Path:
    """Write the recorded runs of a training and return the file's path. Raises ``LogError``."""
    path = path_of(name, baselines)
    if len(logs) < LEAST_RUNS:
        raise LogError(
            f"{len(logs)} runs cannot be recorded: the spread of runs needs at least {LEAST_RUNS}, "
            "with different seeds; five or more find smaller changes"
        )
    runs = [summed_up(log) for log in logs]
    _check_alike([(str(log.path), run) for log, run in zip(logs, runs, strict=True)], path)
    same = next((i for i in range(len(runs)) if runs[i] in runs[:i]), None)
    if same is not None:
        raise LogError(
            f"{logs[same].path} has the same curves as another of these runs: give each run "
            "another seed"
        )
    content = msgspec.to_builtins(Recorded(_SCHEMA, name, runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, _lines(content))
    return path


def difference(run: RecordedRun, of: RecordedRun) -> str:
    """Return why two runs cannot be compared, or an empty text."""
    if run.steps != of.steps:
        return f"{of.steps} steps, against {run.steps}"
    if run.rewards != of.rewards:
        names = [", ".join(map(escape, names)) or "none" for names in (of.rewards, run.rewards)]
        return f"the rewards {names[0]}, against {names[1]}"
    return ""


def _check_alike(runs: Sequence[tuple[str, RecordedRun]], path: Path) -> None:
    first, of = runs[0]
    for name, run in runs[1:]:
        if why := difference(run, of):
            raise LogError(
                f"{path}: the runs {first} and {name} are not of one training ({why}): record runs "
                "that differ in their seeds alone"
            )


def _lines(content: Mapping[str, object]) -> str:
    """Format as JSON with a line for each figure and curve, which a review can read."""
    text = json.dumps(content, indent=1, ensure_ascii=True)
    # Lists of numbers on one line, of windows too.
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return re.sub(r"\],\n\s+\[", "], [", text) + "\n"
