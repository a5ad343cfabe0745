"""What must hold for simulated runs, with the limits.

A share is compared with its limit by an exact binomial test, so that chance alone does not break a
promise: see `CHANCE`. A limit may be as strict as the rule's own level: a false alarm in 1 %,
although 1.5 % of sessions would still be acceptable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import binom, ttest_1samp

from grpo_harness.gate.bounds import ALPHA
from tools.calibration.gates import Bools, Gate
from tools.calibration.simulation import HARMS, Batch, Draws, Floats, Scenario

DROP = 0.05
"""The drop that is simulated: the gate's default margin."""

NEAR = 0.05
"""How far realised power may lie from the prediction."""

CHANCE = 0.001
"""Chance that a table of promises, each of which just holds, shows one as broken.

It is divided over the promises: at 99.9 % each, a table of forty would itself give false alarms.
"""

Outcomes: TypeAlias = Bools | Floats


@dataclass(frozen=True)
class Promise:
    """In `truth`, `event` has a share of all sessions (or a mean) from `low` to `high`."""

    truth: str
    event: str
    low: float = 0.0
    high: float = 1.0

    def broken(self, outcomes: Outcomes, chance: float) -> bool:
        """Whether these outcomes, one per session, leave the limits by more than `chance`.

        Booleans say where the event happened; numbers are averaged.
        """
        if outcomes.dtype == np.bool_:
            hits, n = int(outcomes.sum()), len(outcomes)
            below, above = binom.cdf(hits, n, self.low), binom.sf(hits - 1, n, self.high)
        else:
            below = ttest_1samp(outcomes, self.low, alternative="less").pvalue
            above = ttest_1samp(outcomes, self.high, alternative="greater").pvalue
        return bool(min(below, above) < chance)

    def __str__(self) -> str:
        low, high = (f"{100 * limit:.3g}" for limit in (self.low, self.high))
        if self.low > 0 and self.high < 1:
            return f"{self.event} {low} to {high} %"
        return f"{self.event} >= {low} %" if self.low > 0 else f"{self.event} <= {high} %"


Row: TypeAlias = tuple[Promise, Mapping[str, Outcomes]]
"""A promise, and its outcomes under every rule that is tested on it."""


@dataclass(frozen=True)
class Bound:
    """A promise about the verdicts of a batch."""

    batch: Batch
    verdict: Literal["PASS", "FAIL"]
    low: float = 0.0
    high: float = 1.0

    @property
    def promise(self) -> Promise:
        """The bound as a promise."""
        return Promise(str(self.batch.scenario), self.verdict, self.low, self.high)

    def sessions(self, gate: Gate) -> Bools:
        """Which sessions have the verdict in any run; a session has one run per check."""
        names = gate(self.batch)
        return np.asarray((names == self.verdict).reshape(-1, self.batch.scenario.checks).any(1))


def rows(bounds: Sequence[Bound], gates: Mapping[str, Gate]) -> list[Row]:
    """Test every gate on every bound."""
    return [(b.promise, {name: b.sessions(gate) for name, gate in gates.items()}) for b in bounds]


@dataclass(frozen=True)
class Plan:
    """How many runs each part of the calibration draws; `studies` is 0 to leave those out."""

    no_drop: int
    drop: int
    saturated: int
    sessions: int
    grid: int
    cells: tuple[tuple[int, int, float], ...]
    curve: int
    sizes: tuple[int, ...]
    drops: tuple[float, ...]
    studies: int


FULL = Plan(
    no_drop=2000,
    drop=2000,
    saturated=2000,
    sessions=1000,
    grid=1000,
    cells=tuple((n, k, m) for n in (64, 192, 512) for k in (1, 4, 8) for m in (0.5, 0.7, 0.95)),
    curve=300,
    sizes=(64, 128, 256, 512),
    drops=(0.02, 0.03, 0.05, 0.07, 0.1),
    studies=2000,
)
QUICK = Plan(
    no_drop=1500,
    drop=300,
    saturated=1500,
    sessions=50,
    grid=200,
    cells=((64, 1, 0.95), (192, 8, 0.5)),
    curve=100,
    sizes=(64, 128),
    drops=(0.03, 0.05, 0.1),
    studies=0,
)


def core_bounds(draw: Draws, plan: Plan) -> list[Bound]:
    """The promises that every gate, reference and mutant, is tested on.

    Another policy than the recorded one must show its drop on new problems as well, so a drop in a
    few problems is more often left UNPROVEN.
    """
    same = draw(Scenario(256, 4), plan.no_drop)
    spread = draw(Scenario(256, 4, pattern="spread", drop=DROP), plan.drop)
    concentrated = draw(Scenario(256, 4, pattern="concentrated", drop=DROP), plan.drop)
    risen = draw(Scenario(256, 4, pattern="risen", drop=DROP), plan.drop)
    other = draw(Scenario(256, 4, pattern="reshuffled", same_policy=False), plan.drop)
    other_spread, other_concentrated = (
        draw(Scenario(256, 4, pattern=pattern, drop=DROP, same_policy=False), plan.drop)
        for pattern in HARMS
    )
    broken = draw(Scenario(256, 4, pattern="broken", drop=DROP, same_policy=False), plan.drop)
    saturated = draw(
        Scenario(64, 4, mean=0.97, pattern="broken", drop=DROP, same_policy=False), plan.saturated
    )
    return [
        Bound(same, "FAIL", high=ALPHA),
        Bound(same, "PASS", low=0.95),
        Bound(spread, "FAIL", low=0.93),
        Bound(spread, "PASS", high=0.05),
        Bound(concentrated, "FAIL", low=0.95),
        Bound(concentrated, "PASS", high=0.05),
        Bound(risen, "FAIL", low=0.9),
        Bound(other, "FAIL", high=ALPHA),
        Bound(other_spread, "FAIL", low=0.93),
        Bound(other_spread, "PASS", high=0.05),
        Bound(other_concentrated, "FAIL", low=0.8),
        Bound(other_concentrated, "PASS", high=0.05),
        Bound(broken, "PASS", high=0.07),
        Bound(saturated, "PASS", high=0.06),
    ]


def alarm_bounds(draw: Draws, plan: Plan) -> list[Bound]:
    """No false alarms over sizes and difficulties, nor in a session of twelve checks."""
    batches = [draw(Scenario(n, k, mean), plan.grid) for n, k, mean in plan.cells]
    twelve = draw(Scenario(256, 4, checks=12), 12 * plan.sessions)
    return [Bound(batch, "FAIL", high=ALPHA) for batch in [twelve, *batches]]


@dataclass(frozen=True)
class PowerBound(Bound):
    """A promise of power, with the prediction behind it."""

    predicted: float = 0.0


def power_bounds(draw: Draws, plan: Plan) -> list[PowerBound]:
    """Realised power is near what an unchanged run of that size predicts for the drop.

    It may be at most 5 points below the guarded prediction, which is what a run announces, and at
    most 5 points above the one without a guard. They are the same at large n.
    """
    bounds = []
    for n in plan.sizes:
        unchanged = draw(Scenario(n, 4), plan.curve)
        for drop in plan.drops:
            floor = unchanged.predicted_power(drop)
            ceiling = unchanged.predicted_power(drop, guarded=False)
            for pattern in HARMS:
                batch = draw(Scenario(n, 4, pattern=pattern, drop=drop), plan.curve)
                low, high = max(0.0, floor - NEAR), min(1.0, ceiling + NEAR)
                bounds.append(PowerBound(batch, "FAIL", low, high, predicted=floor))
    return bounds


def announced_bounds(draw: Draws, plan: Plan) -> list[Bound]:
    """A drop of the MDE90 that an unchanged run prints is a FAIL nine times in ten, not a PASS."""
    bounds = []
    for n in plan.sizes:
        announced = round(float(draw(Scenario(n, 4), plan.curve).column("mde90").mean()), 3)
        for pattern in HARMS:
            batch = draw(Scenario(n, 4, pattern=pattern, drop=announced), plan.curve)
            bounds.append(Bound(batch, "FAIL", low=0.9 - NEAR))
            if announced >= DROP:
                bounds.append(Bound(batch, "PASS", high=0.07))
    return bounds
