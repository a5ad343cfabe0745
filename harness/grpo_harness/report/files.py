"""The report and its samples on disk, written atomically, and only of one run."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from grpo_harness.atomic import replace
from grpo_harness.baselines.file import Baseline
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Evaluation
from grpo_harness.report.page import page
from grpo_harness.report.problems import problems
from grpo_harness.report.report import Report, Row
from grpo_harness.report.schema import SCHEMA, Content, Problem
from grpo_harness.text import one_line

SAMPLES = "samples"
"""The folder of a report with every completion, one file per policy and task type."""


class ReportError(HarnessError):
    """A report cannot be written. One line with the place and the cause."""


def begin(folder: Path) -> None:
    """Prepare the folder of a report for a run: samples of an earlier report are removed.

    Other files in it are left alone. A ``.gitignore`` keeps a new folder out of git. Raises
    ``ReportError``, also for a folder with a ``report.json`` that is none of ours.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        if not (folder / "report.json").exists():
            return
        if not _is_ours(folder / "report.json"):
            raise ReportError(
                f"{folder / 'report.json'} is not a report of grpo-harness: name another folder"
            )
        for path in (folder / SAMPLES).glob("*--*.jsonl"):
            path.unlink()


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.json`` and ``report.html`` and return their paths.

    Raises ``ReportError``.
    """
    text = _json(msgspec.to_builtins(report.content()))
    contents = {
        "report.md": report.markdown(),
        "report.json": f"{text}\n",
        "report.html": page(report),
    }
    with _writing(folder):
        for name, content in contents.items():
            replace(folder / name, content)
    return [folder / name for name in contents]


def problems_of(folder: Path, row: Row, baseline: Baseline | None) -> list[Problem]:
    """Return the problems of an evaluation: its samples beside what ``baseline`` recorded.

    ``row`` is the evaluation's summary. Without its file of samples there are none. Raises
    ``ReportError``.
    """
    path = samples_of(folder, row["slug"], row["task_type"])
    try:
        found = problems(path, baseline) if path.exists() else []
    except (OSError, ValueError) as error:
        raise ReportError(f"the samples {path} cannot be read ({one_line(error)})") from error
    if found and not _are_of(row, found):
        raise ReportError(
            f"the samples {path} are of another run: give runs at the same time different folders"
        )
    return found


def _are_of(row: Row, found: Sequence[Problem]) -> bool:
    """Tell whether problems may be those of an evaluation, by how much was drawn."""
    drawn = sum(problem.now.k for problem in found)
    tokens = sum(problem.now.k * problem.now.tokens for problem in found)
    mean = row["mean_length"] * drawn
    return (len(found), drawn) == (row["n"], row["n"] * row["k"]) and math.isclose(tokens, mean)


def write_samples(folder: Path, evaluation: Evaluation) -> None:
    """Write every completion of an evaluation, one JSON object per line. Raises ``ReportError``."""
    path = samples_of(folder, evaluation.questions.policy.slug, evaluation.task)
    lines = "".join(f"{_json(row)}\n" for row in evaluation.rows())
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lines)


def samples_of(folder: Path, slug: str, task_type: str) -> Path:
    """Return the file of a report with the completions of a policy on a task type."""
    return folder / SAMPLES / f"{slug}--{task_type}.jsonl"


def read(path: Path) -> Report:
    """Read a ``report.json``, or that of a folder. Raises ``ReportError``."""
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {content.get('schema')!r}, and {SCHEMA} is read")
        return Report.of(msgspec.convert(content, Content))
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)})") from error
    except (ValueError, RecursionError) as error:  # msgspec's own error is a ValueError
        raise ReportError(
            f"{path} is no report of this version ({one_line(error)}): make one with "
            "pytest --grpo-report FOLDER"
        ) from error


def append_summary(report: Report, target: str) -> None:
    """Append the Markdown to ``target``, a CI system's summary. Raises ``ReportError``."""
    with _writing(Path(target)), Path(target).open("a", encoding="utf-8") as file:
        file.write(report.markdown())


def _json(value: Any) -> str:
    """Return a value as one line of JSON, in which a CI system finds no command of its own.

    Not by msgspec: it refuses half of a surrogate pair, which a completion may hold.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("##", "#\\u0023")


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and type(content.get("schema")) is int


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(f"the report cannot be written to {place} ({one_line(error)})") from error
