"""Promises beyond one check of counts: lengths, runs that stop early, sessions of many checks.

Each study compares the gate's way to keep its promises with the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.verdicts import judge_length
from grpo_harness.rules import shares
from tools.calibration.gates import Bools, likelihood_alone, sequential
from tools.calibration.promises import DROP, NEAR, Bound, Outcomes, Plan, Promise, Row, rows
from tools.calibration.simulation import HARMS, K_THEN, MINIMUM, Batch, Draws, Floats, Scenario


@dataclass(frozen=True)
class Study:
    """Promises with their outcomes under several rules; each of `mutants` must break one."""

    title: str
    rows: list[Row]
    mutants: tuple[str, ...] = ()


def lengths(draw: Draws, plan: Plan) -> Study:
    """Completions of some 20 tokens, log-normal with a spread of 0.35 within a problem."""
    n, k = 128, 4

    def outcomes(ratio: float, event: str) -> dict[str, Outcomes]:
        rng = draw.stream(f"lengths at {ratio}")
        medians = rng.lognormal(np.log(20), 0.5, (plan.studies, n))

        def measure(centres: Floats, samples: int) -> Floats:
            tokens = rng.lognormal(np.log(centres), 0.35, (samples, *centres.shape))
            return np.asarray(np.log(np.maximum(1, tokens.round())).mean(axis=0))

        now, then = measure(medians * ratio, k), measure(medians, K_THEN)
        names = np.array([judge_length(a, k, b).verdict for a, b in zip(now, then, strict=True)])
        outside = np.abs((now - then).mean(axis=1)) > np.log(1.05)
        return {"gate": names == event, "tolerance .05": outside if event == "FAIL" else ~outside}

    promises = [
        (1.0, "FAIL", 0.0, 0.001),
        (1.0, "PASS", 0.95, 1.0),
        (1.05, "FAIL", 0.0, ALPHA),
        (1.15, "FAIL", 0.99, 1.0),
        (1 / 1.15, "FAIL", 0.99, 1.0),
        (1.25, "PASS", 0.0, 0.05),
        (1 / 1.25, "PASS", 0.0, 0.05),
    ]
    return Study(
        "Length: the gate, and FAIL wherever the mean differs by 5 percent",
        [
            (
                Promise(f"{n} x {k}, {ratio:.2f} times as long", event, low, high),
                outcomes(ratio, event),
            )
            for ratio, event, low, high in promises
        ],
        ("tolerance .05",),
    )


def sequential_runs(draw: Draws, plan: Plan) -> Study:
    """Sequential runs have a fixed run's errors, with 40 % fewer problems if nothing dropped.

    The fixed run has 256 problems. With a plan of 256, more runs end undecided than in a fixed run.
    A plan half as long again has the fixed run's power, too, and its saving is still counted in
    problems of the fixed run.
    """
    fixed = 256
    gates = {"gate": sequential, "likelihood alone": likelihood_alone}
    found: list[Row] = []
    for n in (fixed, fixed * 3 // 2):
        same = draw(Scenario(n, 4), plan.studies)
        spread, concentrated, broken = (
            draw(Scenario(n, 4, pattern=pattern, drop=DROP), plan.studies)
            for pattern in (*HARMS, "broken")
        )
        bounds = [
            Bound(same, "FAIL", high=ALPHA),
            Bound(spread, "PASS", high=0.05),
            Bound(concentrated, "PASS", high=0.05),
            Bound(broken, "PASS", high=0.05),
        ]
        if n > fixed:
            bounds += [Bound(spread, "FAIL", low=0.93), Bound(concentrated, "FAIL", low=0.95)]
        found += rows(bounds, gates)
        for batch, most in ((same, 0.6), (spread, 1.0)):
            used = np.array([verdict.n for verdict in batch.sequential]) / fixed
            promise = Promise(str(batch.scenario), f"used of {fixed} problems", high=most)
            found.append((promise, {"gate": used}))
    return Study(
        "Sequential, a look every 16 problems: the gate, and a likelihood ratio alone",
        found,
        ("likelihood alone",),
    )


def step_down(p: Floats) -> Floats:
    """Holm's adjusted p of every session at once; p and result have the shape (sessions, m)."""
    order = p.argsort(axis=1)
    steps = np.take_along_axis(p, order, axis=1) * np.arange(p.shape[1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, axis=1), axis=1)
    return np.minimum(1.0, adjusted)


def families(draw: Draws, plan: Plan) -> Study:
    """Each of m checks alone at alpha / m, or all together by Holm's step-down.

    Holm can catch more only where several checks fail at once, in a session that is red anyway.
    """
    unharmed = draw(Scenario(256, 4, checks=12), 12 * plan.sessions)
    harmed = draw(Scenario(256, 4, pattern="spread", drop=DROP), plan.drop)

    def failed(*parts: tuple[Batch, int]) -> dict[str, Bools]:
        """Which checks FAIL, shape (sessions, m); `parts` has the checks per batch and session."""
        sessions = min(len(batch.now) // checks for batch, checks in parts)

        def sheet(field: str) -> Floats:
            columns = [batch.column(field)[: sessions * m].reshape(-1, m) for batch, m in parts]
            return np.concatenate(columns, axis=1)

        p, drops = sheet("p"), sheet("delta") <= -MINIMUM
        return {
            "Bonferroni": (p <= ALPHA / p.shape[1]) & drops,
            "Holm": (step_down(p) <= ALPHA) & drops,
        }

    one, all_twelve = failed((harmed, 1), (unharmed, 11)), failed((harmed, 12))
    power = unharmed.predicted_power(DROP) - NEAR
    found: list[Row] = [
        (
            Promise(f"{m} checks, no drop anywhere", "any FAIL", high=ALPHA),
            {rule: np.any(f, axis=1) for rule, f in failed((unharmed, m)).items()},
        )
        for m in (12, 24)
    ]
    found += [
        (
            Promise("12 checks, 5 pt lost in one", "that one FAIL", low=power),
            {rule: f[:, 0] for rule, f in one.items()},
        ),
        (
            Promise("12 checks, 5 pt lost in one", "another FAIL", high=ALPHA),
            {rule: np.any(f[:, 1:], axis=1) for rule, f in one.items()},
        ),
        (
            Promise("12 checks, 5 pt lost in each", "each FAIL", low=power),
            {rule: f.ravel() for rule, f in all_twelve.items()},
        ),
    ]
    return Study(
        "Many checks of 256 x 4 in one session: each alone at alpha / m, and all by Holm", found
    )


SUITE = {
    "accuracy": 12,
    "length": 12,
    "truncation": 12,
    "unparsable": 12,
    "no_loss": 6,
    "improvement": 1,
}
"""The checks of `pytest suites/` on two policies and six task types, by rule."""


def weighted(draw: Draws, plan: Plan) -> Study:
    """Compare the shares of the risk that a run of all suites has with equal ones.

    Every check is stood for by an accuracy check of unchanged policies. The one that a run is for,
    a drop of accuracy, must be found nearly as often as if the checks of form were not there.
    """
    kinds = np.repeat(list(SUITE), list(SUITE.values()))
    m, by_rule = len(kinds), shares(kinds)
    own = np.array([by_rule[kind] for kind in kinds])
    sessions = plan.sessions // 2
    unharmed = draw(Scenario(256, 4, checks=m), m * sessions)
    harmed = draw(Scenario(256, 4, pattern="spread", drop=DROP, checks=m), plan.drop)
    p = unharmed.column("p").reshape(sessions, m)
    changed = np.abs(unharmed.column("delta")).reshape(sessions, m) >= MINIMUM
    dropped = harmed.column("delta") <= -MINIMUM
    power = unharmed.predicted_power(DROP) - NEAR
    return Study(
        f"A session of all {m} checks of the suites: shares by rule, and equal ones",
        [
            (
                Promise(f"{m} checks, no change anywhere", "any FAIL", high=ALPHA),
                {
                    "shares": np.any((p <= own) & changed, axis=1),
                    "equal": np.any((p <= ALPHA / m) & changed, axis=1),
                },
            ),
            (
                Promise("5 pt of accuracy lost in one", "that one FAIL", low=power),
                {
                    "shares": (harmed.column("p") <= by_rule["accuracy"]) & dropped,
                    "equal": (harmed.column("p") <= ALPHA / m) & dropped,
                },
            ),
        ],
    )
