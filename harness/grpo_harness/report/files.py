"""The report and its samples on disk, written atomically, and only of one run."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_harness.atomic import replace
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Evaluation
from grpo_harness.report.report import Report
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
    """Write ``report.md`` and ``report.json`` and return their paths. Raises ``ReportError``."""
    text = json.dumps(_finite(report.content()), indent=1, ensure_ascii=True, allow_nan=False)
    contents = {"report.md": report.markdown(), "report.json": f"{text}\n"}
    with _writing(folder):
        for name, content in contents.items():
            replace(folder / name, content)
    return [folder / name for name in contents]


def write_samples(folder: Path, evaluation: Evaluation) -> None:
    """Write every completion of an evaluation, one JSON object per line. Raises ``ReportError``."""
    path = folder / SAMPLES / f"{evaluation.questions.policy.slug}--{evaluation.task}.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in evaluation.rows())
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lines)


def read(path: Path) -> Report:
    """Read a ``report.json``, or that of a folder. Raises ``ReportError``."""
    path = path / "report.json" if path.is_dir() else path
    try:
        report = Report.of(json.loads(path.read_text(encoding="utf-8")))
        report.markdown()  # whose rows have all that a view shows
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({one_line(error)})") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ReportError(
            f"{path} is no report of this version ({one_line(error)}): make one with "
            "pytest --grpo-report FOLDER"
        ) from error
    return report


def append_summary(report: Report, target: str) -> None:
    """Append the Markdown to ``target``, a CI system's summary. Raises ``ReportError``."""
    with _writing(Path(target)), Path(target).open("a", encoding="utf-8") as file:
        file.write(report.markdown())


def _is_ours(path: Path) -> bool:
    try:
        return "schema" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        return False


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(f"the report cannot be written to {place} ({one_line(error)})") from error


def _finite(value: Any) -> Any:
    """Return the value with null for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
