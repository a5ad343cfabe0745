"""The scores of an evaluation's completions, with their means and standard errors.

What an export writes is Unicode without half of a surrogate pair, and has no number that is not
finite: ``portable`` makes a report so.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

from grpo_harness.errors import HarnessError
from grpo_harness.report.schema import Completion, Content, Evaluation, Problem, Run
from grpo_harness.text import digest, escape, one_line

NO_COMPLETION = "the engine drew no completion"
"""What an export says of the outcome ``error``."""

Of: TypeAlias = Callable[[Completion], float | None]
"""Completion -> its score, or null if the score does not apply to it."""


class ExportError(HarnessError):
    """A report cannot be exported. One line with the cause and what to do."""


@dataclass(frozen=True)
class Score:
    """A score of every completion: its mean over those it applies to, and the standard error.

    ``of`` is null where it does not apply. ``stderr`` is null for fewer than two problems.
    """

    name: str
    mean: float
    stderr: float | None
    of: Of


def scores(evaluation: Evaluation) -> list[Score]:
    """Return the scores that an evaluation has a mean of: accuracy, rewards, tokens."""
    means: dict[str, tuple[float | None, Of]] = {
        "accuracy": (evaluation.accuracy, lambda each: float(each.outcome == "correct")),
        "strict_accuracy": (evaluation.strict_accuracy, lambda each: float(each.strict)),
        "reward": (evaluation.mean_reward, lambda each: each.reward),
    }
    for name in dict.fromkeys(name for c in completions(evaluation) for name in c.rewards):
        of = _reward(name)
        applied = [value for c in completions(evaluation) if (value := of(c)) is not None]
        means[f"reward/{name}"] = (_mean(applied) if applied else None, of)
    means["tokens"] = (evaluation.mean_length, lambda each: each.tokens)
    return [
        Score(name, mean, clustered_stderr(_values(evaluation.problems, of)), of)
        for name, (mean, of) in means.items()
        if mean is not None
    ]


_LARGE = 1e140
"""Numbers beyond this are divided by the largest of them, or a sum or a square may overflow."""


def clustered_stderr(groups: Iterable[Sequence[float]]) -> float | None:
    """Return the standard error of the mean of all values, which are alike within a group.

    Groups are independent, as problems are; see Miller 2024, arXiv 2411.00640. It has the
    correction for few groups, G / (G - 1). Null for fewer than two.
    """
    filled = [group for group in groups if group]
    if len(filled) < 2:
        return None
    n = sum(map(len, filled))
    unit = _unit(value for group in filled for value in group)
    filled = [[value / unit for value in group] for group in filled]
    mean = math.fsum(value for group in filled for value in group) / n
    squares = math.fsum(math.fsum(value - mean for value in group) ** 2 for group in filled)
    return unit * (math.sqrt(squares * len(filled) / (len(filled) - 1)) / n)


def _unit(values: Iterable[float]) -> float:
    """Return what numbers are divided by before they are summed: 1, unless one is too large."""
    largest = max(map(abs, values))
    return largest if largest > _LARGE else 1.0


def _mean(values: Sequence[float]) -> float:
    unit = _unit(values)
    return unit * (math.fsum(value / unit for value in values) / len(values))


def completions(evaluation: Evaluation) -> Iterable[Completion]:
    """Yield all completions of an evaluation, problem after problem."""
    return (completion for problem in evaluation.problems for completion in problem.completions)


def started(run: Run) -> datetime:
    """Return when a run began, in UTC. Raises ``ExportError``."""
    try:
        return datetime.fromisoformat(run.started).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ExportError(
            f"the report says that its run began at '{escape(run.started)}', which is no time of "
            "ISO 8601: make it anew with pytest --grpo-report FOLDER"
        ) from error


def identity(run: Run, evaluation: Evaluation) -> str:
    """Return a digest of an evaluation and its run: no other run has the same."""
    return digest(msgspec.json.encode([run, evaluation]).decode())


def file_name(text: str) -> str:
    """Return a name from outside as a part of a file's name: ASCII letters and digits, ``._-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:64] or "unnamed"


def portable(content: Content) -> Content:
    r"""Return a report as any tool reads it.

    Half of a surrogate pair becomes its escape, such as ``\ud800``, and a number that is not finite
    becomes null. Raises ``ExportError`` where null cannot be.
    """
    try:
        return msgspec.convert(_portable(msgspec.to_builtins(content)), Content)
    except msgspec.ValidationError as error:
        raise ExportError(
            f"the report has a number that is not finite ({one_line(error)}): make it anew with "
            "pytest --grpo-report FOLDER"
        ) from error


def _portable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_portable(key): _portable(of) for key, of in value.items()}
    return [_portable(of) for of in value] if isinstance(value, list) else value


def _reward(name: str) -> Of:
    return lambda each: each.rewards.get(name)


def _values(problems: Iterable[Problem], of: Of) -> Iterable[list[float]]:
    for problem in problems:
        yield [value for c in problem.completions if (value := of(c)) is not None]
