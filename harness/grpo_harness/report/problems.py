"""The problems of an evaluation: the samples of this run beside what was recorded."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from grpo_harness.baselines.examples import read
from grpo_harness.baselines.file import SPEED, Baseline, Record, prompt_digest
from grpo_harness.report.schema import Completion, Kept, Problem, Recorded, Side
from grpo_harness.rewards.outcome import Outcome


class _Row(msgspec.Struct):
    """A line of a samples file, as ``Evaluation.rows`` makes it."""

    problem: str
    prompt: str
    wanted: str | None
    completion: str
    tokens: int
    outcome: Outcome
    strict: bool
    reward: float | None
    rewards: dict[str, float | None]
    logged: dict[str, Any]


def problems(samples: Path, baseline: Baseline | None) -> list[Problem]:
    """Return the problems of a file of samples, in its order, beside the records of ``baseline``.

    Raises ``OSError``, and ``ValueError`` for a file that is not one of samples.
    """
    lines = samples.read_text(encoding="utf-8").splitlines()
    # Not msgspec's own decoder: it refuses half of a surrogate pair, which a completion may hold.
    rows = msgspec.convert([json.loads(line) for line in lines], list[_Row])
    kept = _kept(baseline)
    found = []
    for name, group in groupby(rows, key=lambda row: row.problem):
        own = list(group)
        record = baseline.records.get(name) if baseline else None
        if record is not None and record.prompt != prompt_digest(own[0].prompt):
            record = None
        found.append(
            Problem(
                id=name,
                prompt=own[0].prompt,
                wanted=own[0].wanted,
                then=None if record is None else _recorded(record),
                now=_measured(own),
                kept=kept.get(name, []) if record is not None else [],
                completions=[_completion(row) for row in own],
            )
        )
    return found


def recorded(baseline: Baseline) -> Recorded:
    """Return how a baseline was recorded."""
    header, start = baseline.header, "sampling."
    return Recorded(
        commit=header.commit,
        recorded=header.recorded,
        environment={name: of for name, of in header.environment.items() if name != SPEED},
        sampling={
            name.removeprefix(start): of
            for name, of in header.conditions.items()
            if name.startswith(start)
        },
    )


def _completion(row: _Row) -> Completion:
    return Completion(
        text=row.completion,
        tokens=row.tokens,
        outcome=row.outcome,
        strict=row.strict,
        reward=row.reward,
        rewards=row.rewards if len(row.rewards) > 1 else {},
        logged=row.logged,
    )


def _measured(rows: Sequence[_Row]) -> Side:
    outcomes = [row.outcome for row in rows]
    names = list(rows[0].rewards)
    return Side(
        k=len(rows),
        correct=outcomes.count("correct"),
        truncated=outcomes.count("truncated"),
        unparsable=outcomes.count("unparsable"),
        tokens=fmean(row.tokens for row in rows),
        reward=_mean(row.reward for row in rows),
        rewards={name: _mean(row.rewards.get(name) for row in rows) for name in names}
        if len(names) > 1
        else {},
    )


def _recorded(record: Record) -> Side:
    return Side(
        k=record.k,
        correct=record.correct,
        truncated=record.truncated,
        unparsable=record.unparsable,
        tokens=record.length / record.k,
        reward=_weighed(record.total),
        rewards={name: _weighed(values) for name, values in record.rewards.items()},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    applied = [value for value in values if value is not None]
    return fmean(applied) if applied else None


def _weighed(values: Sequence[tuple[float, int]]) -> float | None:
    times = sum(number for _, number in values)
    return sum(value * number for value, number in values) / times if times else None


def _kept(baseline: Baseline | None) -> Mapping[str, list[Kept]]:
    """Return the commonest right and wrong completion of each problem: the first that is kept."""
    if baseline is None or not baseline.header.examples:
        return {}
    examples = read(baseline.path, baseline.header.examples)
    found: dict[str, dict[bool, Kept]] = {}
    for example in examples.examples if examples else ():
        if not example.trial:
            right = example.outcome == "correct"
            kept = Kept(text=example.text, outcome=example.outcome)
            found.setdefault(example.problem, {}).setdefault(right, kept)
    return {name: [*sides.values()] for name, sides in found.items()}
