"""Whole runs of the embedded pair, simulated from its baselines in the sizes of the default run.

The recorded rates of each problem are taken for the truth. A new baseline and a run are drawn from
them, and judged by every rule that compares counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.stats import odds_ratio_of_drop
from grpo_harness.rules import asked, shares
from grpo_harness.settings import resolve
from grpo_harness.sizing import Sizing
from tools.calibration.promises import DROP, NEAR, Plan, Promise
from tools.calibration.promises import Row as StudyRow
from tools.calibration.simulation import Draws, Floats, Ints
from tools.calibration.studies import Study

ROOT = Path(__file__).parents[2]
PASSES = 0.97
"""The least share of runs of unchanged policies in which every check is a PASS."""


_COLUMNS = {"accuracy": 0, "truncation": 1, "unparsable": 2}
"""The rules that judge a row's shares of completions, and the outcome that each one counts."""


@dataclass(frozen=True)
class Row:
    """A policy on a task: rates of (correct, truncated, unparsable, other) and the planned size."""

    rates: Floats
    k: int
    k_then: int

    def drawn(self, rng: np.random.Generator, drop: float = 0.0) -> tuple[Ints, Ints]:
        """Draw counts of outcomes now, after a drop of accuracy, and then: (n, 4) each."""
        now = self.rates
        if drop:
            correct = now[:, 0]
            counts = np.rint(correct * (self.k_then + 1) - 0.5).clip(0, self.k_then).astype(int)
            lower = expit(logit(correct) + np.log(odds_ratio_of_drop(counts, self.k_then, drop)))
            now = np.c_[lower, now[:, 1:] * ((1 - lower) / (1 - correct))[:, None]]
        return rng.multinomial(self.k, now), rng.multinomial(self.k_then, self.rates)


def planned(sequential: bool) -> tuple[dict[tuple[str, str], Row], dict[str, float]]:
    """Return the rows of the default run by role and task, and each rule's part of the risk."""
    settings = resolve(ROOT, ROOT, {"sequential": sequential or None})
    sizing = Sizing(settings)
    rows: dict[tuple[str, str], Row] = {}
    for role, _, name in settings.policies():
        for task in settings.tasks.values():
            size = sizing.size(role, name, task.source)
            tallies = sizing.row(role, name, task.source.name).records[: size.n]
            counts = np.array([(t.correct, t.truncated, t.unparsable) for t in tallies], float)
            k_then = tallies[0].k
            rest = k_then - counts.sum(axis=1, keepdims=True)
            rates = np.c_[counts, rest] + [0.5, 0.01, 0.01, 0.48]
            rates /= rates.sum(axis=1, keepdims=True)
            rows[role, task.source.name] = Row(rates, size.k, k_then)
    tasks = [task.asks for task in settings.tasks.values()]
    return rows, shares(asked(tasks, 1, total=not sequential))


def verdicts(
    rows: dict[tuple[str, str], Row],
    alpha: dict[str, float],
    rng: np.random.Generator,
    *,
    sequential: bool,
) -> Iterator[tuple[str, str]]:
    """Draw one run of unchanged policies; yield the rule and the verdict of each check."""
    drawn = {key: row.drawn(rng) for key, row in rows.items()}
    used = dict.fromkeys(rows, 10**9)
    for key, (now, then) in drawn.items():
        judged = {}
        for rule, column in _COLUMNS.items():
            sides = now[:, column], rows[key].k, then[:, column], rows[key].k_then
            fault, level = rule != "accuracy", alpha[rule]
            if sequential:
                judged[rule] = gate.judge_sequential(*sides, alpha=level, fault=fault)
            else:
                judge = gate.judge_rate if fault else gate.judge
                judged[rule] = judge(*sides, same_policy=True, alpha=level)
        # A sequential run waits for its last decision.
        used[key] = max(evidence.n for evidence in judged.values())
        yield from ((rule, evidence.verdict) for rule, evidence in judged.items())
    if not sequential:
        for role in ("base", "trained"):
            own = [key for key in rows if key[0] == role]
            now, then = (np.concatenate([drawn[key][i][:, 0] for key in own]) for i in (0, 1))
            each = np.concatenate([np.full(len(drawn[key][0]), rows[key].k) for key in own])
            total = gate.judge(
                now, each, then, rows[own[0]].k_then, same_policy=True, alpha=alpha["total"]
            )
            yield "total", total.verdict
    ours: list[Ints] = []
    for task in [task for role, task in rows if role == "base"]:
        trained, base = (
            drawn[role, task][0][: used[role, task], 0] for role in ("trained", "base")
        )
        n = min(len(trained), len(base))
        trained, base = trained[:n], base[:n]
        k, k_base = rows["trained", task].k, rows["base", task].k
        loss = gate.judge(trained, k, base, k_base, same_policy=False, alpha=alpha["no_loss"])
        yield "no_loss", loss.verdict
        ours.append(np.c_[trained, np.full(n, k), base, np.full(n, k_base)])
    together = np.concatenate(ours).T
    yield "improvement", gate.judge_improvement(*together, alpha=alpha["improvement"]).verdict


def embedded_pair(draw: Draws, plan: Plan) -> Study:
    """An unchanged pair is all PASS, and a loss of five points of any row is found."""
    runs = max(5, plan.studies // 20)
    found: list[StudyRow] = []
    for sequential in (False, True):
        how = "sequential" if sequential else "the default run"
        rows, alpha = planned(sequential)
        rng = draw.stream(f"pair, {how}")
        whole = np.array(
            [
                all(
                    verdict == "PASS"
                    for _, verdict in verdicts(rows, alpha, rng, sequential=sequential)
                )
                for _ in range(runs)
            ]
        )
        found.append((Promise(f"{how}, no change", "all PASS", low=PASSES), {"gate": whole}))
        fails = []
        for row in rows.values():
            for _ in range(runs):
                now, then = row.drawn(rng, DROP)
                sides = now[:, 0], row.k, then[:, 0], row.k_then
                if sequential:
                    fails.append(gate.judge_sequential(*sides, alpha=alpha["accuracy"]).verdict)
                else:
                    judged = gate.judge(*sides, same_policy=True, alpha=alpha["accuracy"])
                    fails.append(judged.verdict)
        of_row = Promise(f"{how}, 5 pt lost in one row", "that one FAIL", low=0.9 - NEAR)
        found.append((of_row, {"gate": np.array(fails) == "FAIL"}))
    return Study("Whole runs of the embedded pair, in their planned sizes", found)
