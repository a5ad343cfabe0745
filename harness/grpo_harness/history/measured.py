"""The figures of an evaluation that a history keeps, with what is needed to compare runs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_harness.evaluation import Completion, Evaluation
from grpo_harness.gate.changepoint import Point
from grpo_harness.gate.inputs import Floats
from grpo_harness.rules import ANSWERS
from grpo_harness.text import digest

FIGURES: Mapping[str, Callable[[Completion], float]] = {
    "accuracy": lambda completion: completion.outcome == "correct",
    "reward": lambda completion: completion.reward,
    "length": lambda completion: math.log(max(completion.tokens, 1)),
    "truncation": lambda completion: completion.outcome == "truncated",
    "unparsable": lambda completion: completion.outcome == "unparsable",
}
"""What is measured of a completion, by the rule that judges it; NaN where nothing is."""


def measured(evaluation: Evaluation) -> dict[str, Any]:
    """Return the row of an evaluation in its run's file, as plain numbers.

    It has no figures if completions could not be drawn.
    """
    figures = {}
    if not any(completion.outcome == "error" for completion in evaluation.completions):
        for name, of in FIGURES.items():
            if name in ANSWERS and not evaluation.questions.judges_answers:
                continue
            values = [[of(completion) for completion in group.completions]
                      for group in evaluation.groups]  # fmt: skip
            if found := _figure(_table(values), name):
                figures[name] = found
    questions = evaluation.questions
    # The end tokens are the policy's own.
    asked = {**questions.settings, "eos_token_ids": None, "version": questions.task_type.version}
    return {
        "policy": evaluation.policy,
        "task_type": evaluation.task,
        "fingerprint": str(evaluation.fingerprint),
        "n": evaluation.n,
        "planned": evaluation.planned,
        "k": evaluation.k,
        "problems": digest("\n".join(evaluation.questions.ids[: evaluation.n]))[:16],
        "conditions": digest(json.dumps(asked, sort_keys=True, default=str))[:16],
        "seed": evaluation.run_seed,
        "figures": figures,
    }


def _table(values: Sequence[Sequence[float]]) -> Floats:
    """Return the values of each problem as a row; NaN fills those of fewer completions."""
    found = np.full((len(values), max(map(len, values))), np.nan)
    for row, of in zip(found, values, strict=True):
        row[: len(of)] = of
    return found


def _figure(table: Floats, name: str) -> dict[str, Any] | None:
    """Measure a figure by its values, NaN where there is none, of the problems that have some.

    A length is measured by the mean of its logarithms.
    """
    table = table[~np.isnan(table).all(axis=1)]
    if not len(table):
        return None
    k = (~np.isnan(table)).sum(axis=1)
    means = np.nansum(table, axis=1) / k
    squares = np.nansum((table - means[:, None]) ** 2, axis=1)
    variances = np.where(k > 1, squares / np.maximum(k - 1, 1) / k, np.nan)
    reach = float(np.nanmax(table) - np.nanmin(table)) or 1.0
    point = Point.of(means, variances, int(k.sum()), reach, "")
    value, unit = point.value, 1.0
    if name == "length":
        value = unit = math.exp(point.value)
    return {
        "value": value,
        "noise": unit * point.noise,
        "spread": unit * point.spread,
        "completions": point.completions,
    }
