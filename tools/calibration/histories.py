"""Promises over several sessions: a red run that is rerun, a baseline that is recorded again."""

from __future__ import annotations

import numpy as np

from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.verdicts import judge
from tools.calibration.gates import Bools
from tools.calibration.promises import DROP, NEAR, Plan, Promise, Row
from tools.calibration.simulation import HARMS, K_THEN, MARGIN, Draws, Ints, Scenario
from tools.calibration.studies import Study

ATTEMPTS = 3
COMMITS, LOSS = 20, 0.005


def reruns(draw: Draws, plan: Plan) -> Study:
    """A red run is repeated, in three attempts at most, against one reference.

    *pooled*: attempt a is judged by the samples of all attempts so far, at alpha / 2^(a - 1), so
    all three together may raise a false alarm in at most 1.75 % of cases. *alone*: each is judged
    as if it were the first.
    """

    def red(scenario: Scenario) -> dict[str, Bools]:
        """Which attempts FAIL, shape (runs, attempts)."""
        rng = draw.stream(f"reruns of {scenario}")
        before, after = scenario.skills(rng, plan.studies // 2)
        reference = rng.binomial(K_THEN, before)
        now = rng.binomial(scenario.k, after, (ATTEMPTS, *after.shape))
        pooled = now.cumsum(axis=0)
        return {
            "pooled": np.array(
                [
                    [
                        _fails(pooled[a, run], scenario.k * (a + 1), then, ALPHA / 2**a)
                        for a in range(ATTEMPTS)
                    ]
                    for run, then in enumerate(reference)
                ]
            ),
            "alone": np.array(
                [
                    [_fails(now[a, run], scenario.k, then) for a in range(ATTEMPTS)]
                    for run, then in enumerate(reference)
                ]
            ),
        }

    found: list[Row] = []
    for n in (128, 256):
        same = Scenario(n, 4)
        alarms = {rule: np.any(attempts, axis=1) for rule, attempts in red(same).items()}
        found.append((Promise(str(same), "any attempt red", high=0.015), alarms))
        missed = 1 - draw(same, plan.curve).predicted_power(DROP) + NEAR
        for pattern in HARMS:
            harmed = Scenario(n, 4, pattern=pattern, drop=DROP)
            green = {rule: ~np.all(attempts, axis=1) for rule, attempts in red(harmed).items()}
            found.append((Promise(str(harmed), "ends green", high=missed), green))
    return Study(
        "Run again while red, 3 attempts: samples pooled at falling alpha, and each judged alone",
        found,
        ("alone",),
    )


def slow_losses(draw: Draws, plan: Plan) -> Study:
    """A policy loses half a point with each of twenty commits, and each commit records a baseline.

    A history is unseen if nothing has turned red when ten points are lost. *frozen anchor*: the
    recording of 16 samples is judged against the first one. *parent*: a run of 4 samples is judged
    against the recording before it. *tolerance*: the same, by a difference of 5 points.
    """
    found: list[Row] = []
    for n in (192, 256):
        rng = draw.stream(f"histories of {n}")
        histories = []
        for _ in range(plan.studies // 5):
            before = rng.beta(0.7, 0.3, n)
            anchor = parent = rng.binomial(K_THEN, before)
            red = np.zeros(3, dtype=bool)
            for commit in range(1, COMMITS + 1):
                skill = before * (1 - LOSS * commit / before.mean())
                now, recorded = rng.binomial(4, skill), rng.binomial(K_THEN, skill)
                red |= [
                    _fails(recorded, K_THEN, anchor),
                    _fails(now, 4, parent),
                    bool((now / 4 - parent / K_THEN).mean() < -MARGIN),
                ]
                parent = recorded
            histories.append(~red)
        rules = ("frozen anchor", "parent", "tolerance")
        unseen = dict(zip(rules, np.transpose(histories), strict=True))
        truth = f"{n} x 4, {COMMITS} times {100 * LOSS:g} pt lost"
        found.append((Promise(truth, "unseen", high=ALPHA), unseen))
    return Study(
        "A slow loss, the baseline recorded anew each time: judged against the first recording, "
        "against the one before, and by a tolerance of 5 points",
        found,
        ("parent", "tolerance"),
    )


def _fails(now: Ints, k: int, then: Ints, alpha: float = ALPHA) -> bool:
    return judge(now, k, then, K_THEN, same_policy=True, alpha=alpha).verdict == "FAIL"
