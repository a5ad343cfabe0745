"""The figures of an evaluation that a history keeps, with what is needed to compare runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_harness.evaluation import Completion, Evaluation
from grpo_harness.gate.changepoint import Point
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
            values = [[float(of(c)) for c in group.completions] for group in evaluation.groups]
            own = [[v for v in values_of if not math.isnan(v)] for values_of in values]
            if any(own):
                figures[name] = _figure([values_of for values_of in own if values_of], name)
    return {
        "policy": evaluation.policy,
        "task_type": evaluation.task,
        "fingerprint": str(evaluation.fingerprint),
        "n": evaluation.n,
        "planned": evaluation.planned,
        "k": evaluation.k,
        "problems": digest("\n".join(evaluation.questions.ids[: evaluation.n]))[:16],
        "seed": evaluation.run_seed,
        "figures": figures,
    }


def _figure(values: Sequence[Sequence[float]], name: str) -> dict[str, Any]:
    """Measure a figure by its values of each problem; a length by the mean of its logarithms."""
    means = np.array([np.mean(of) for of in values])
    variances = np.array([np.var(of, ddof=1) / len(of) if len(of) > 1 else np.nan for of in values])
    every = [value for of in values for value in of]
    reach = max(every) - min(every) or 1.0
    point = Point.of(means, variances, len(every), reach, "")
    value, unit = point.value, 1.0
    if name == "length":
        value = unit = math.exp(point.value)
    return {
        "value": value,
        "noise": unit * point.noise,
        "spread": unit * point.spread,
        "completions": point.completions,
    }
