"""Promises of the rule for rewards, which are real numbers, and mutants of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import norm

from grpo_harness.gate.bounds import ALPHA, PASS_CONFIDENCE, REWARD
from grpo_harness.gate.permutation import Rewards, permutation_p
from grpo_harness.gate.stats import Estimate
from grpo_harness.gate.verdicts import Evidence, judge_reward
from tools.calibration.promises import Outcomes, Plan, Promise, Row
from tools.calibration.simulation import K_THEN, Draws, Floats
from tools.calibration.studies import Study

K = 4

Change: TypeAlias = Literal["no change", "spread", "concentrated", "broken", "risen", "reshuffled"]
Kind: TypeAlias = Literal["weighted", "graded", "heavy", "rare", "saturated"]


@dataclass(frozen=True)
class Truth:
    """Rewards of `n` problems, and what has changed by `size` standard deviations of the record.

    *weighted*: 1.2 if correct, else 0.2 for the format or 0, by skill; *graded*: in steps of 0.1,
    and problems differ more than completions; *heavy*: some are a hundred times farther off than
    most (Student's t with 2 degrees of freedom); *rare*: 0 but for three in a thousand, which are
    0.5 or 1; *saturated*: 1 but for five in a thousand, which are 0.

    *spread*: every problem loses alike; *concentrated*: one in twenty loses all of it; *broken*:
    each problem falls to 0 by chance; *risen*: a spread gain; *reshuffled*: another policy, as good
    on other problems.
    """

    kind: Kind
    change: Change = "no change"
    size: float = 0.0
    n: int = 128

    def __str__(self) -> str:
        size = f" {self.size:g} sd" if self.size else ""
        return f"{self.kind}, {self.n} x {K}, {self.change}{size}"

    def draw(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Rewards now and then of one run, shapes (n, 4) and (n, 16)."""
        place = rng.normal(0, 2, (self.n, 1))
        skill = rng.beta(0.7, 0.3, (self.n, 1))
        then, now = (self._rewards(rng, k, place, skill) for k in (K_THEN, K))
        loss = self.size * float(then.std())
        if self.change == "reshuffled":
            place, skill = rng.normal(0, 2, (self.n, 1)), rng.beta(0.7, 0.3, (self.n, 1))
            now = self._rewards(rng, K, place, skill)
        elif self.change == "broken":
            now = np.where(rng.random((self.n, 1)) < loss / then.mean(), 0.0, now)
        elif self.change == "concentrated":
            few = rng.permutation(self.n)[: self.n // 20]
            now[few] -= loss * self.n / len(few)
        elif self.change != "no change":
            now -= loss if self.change == "spread" else -loss
        return (now.round(1), then.round(1)) if self.kind == "graded" else (now, then)

    def _rewards(self, rng: np.random.Generator, k: int, place: Floats, skill: Floats) -> Floats:
        shape = (self.n, k)
        if self.kind == "weighted":
            return np.where(rng.random(shape) < skill, 1.2, rng.choice([0.0, 0.2], shape))
        if self.kind == "rare":
            return np.where(rng.random(shape) < 0.003, rng.choice([0.5, 1.0], shape), 0.0)
        if self.kind == "saturated":
            return (rng.random(shape) < 0.995).astype(np.float64)
        noise = rng.normal(0, 1, shape) if self.kind == "graded" else rng.standard_t(2, shape)
        return np.asarray(place + noise)


@dataclass(frozen=True)
class Run:
    """One run and what the gate said of it."""

    now: Floats
    then: Floats
    same: bool
    said: Evidence

    def decide(self, p: float, lower: float) -> str:
        """The verdict of the rule by another p, or another lower bound."""
        unit = Rewards.of(self.now, self.then).scale
        if p <= ALPHA and abs(self.said.delta) >= REWARD.minimum * unit:
            return "FAIL"
        return "PASS" if lower > -REWARD.margin * unit else "UNPROVEN"


def unstratified(run: Run) -> str:
    """All completions dealt anew, whatever their problem (which is normal at this size)."""
    pooled = np.concatenate([run.now, run.then], axis=1)
    se = pooled.std() * np.sqrt((1 / K + 1 / K_THEN) / len(pooled))
    return run.decide(2 * float(norm.sf(abs(run.said.delta) / se)), run.said.lower)


def without_ties(run: Run) -> str:
    """The deals with the observed sum are left out of the p."""
    at_most = [permutation_p(sign * run.now, sign * run.then) for sign in (1, -1)]
    return run.decide(2 * (1 - max(at_most)), run.said.lower)


def no_guard(run: Run) -> str:
    """PASS by a bound without the two pseudo-problems."""
    differences = Rewards.of(run.now, run.then).differences
    return run.decide(run.said.p, Estimate.of(differences).lower(PASS_CONFIDENCE))


def drops_alone(run: Run) -> str:
    """A recorded policy whose reward rose passes."""
    return "PASS" if run.said.verdict == "FAIL" and run.said.delta > 0 else run.said.verdict


def no_t_test(run: Run) -> str:
    """Another policy judged by the exact test alone."""
    return run.decide(permutation_p(run.now, run.then), run.said.lower)


MUTANTS: dict[str, Callable[[Run], str]] = {
    "unstratified": unstratified,
    "without ties": without_ties,
    "no guard": no_guard,
    "drops alone": drops_alone,
    "no t test": no_t_test,
}


PROMISES: tuple[tuple[Truth, str, float, float, tuple[str, ...]], ...] = (
    (Truth("weighted"), "FAIL", 0.0, ALPHA, ("unstratified", "drops alone")),
    (Truth("weighted", n=512), "PASS", 0.95, 1.0, ("no guard",)),
    (Truth("weighted", "spread", 0.15), "FAIL", 0.93, 1.0, ("unstratified",)),
    (Truth("weighted", "concentrated", 0.15), "FAIL", 0.9, 1.0, ()),
    (Truth("weighted", "spread", 0.1), "PASS", 0.0, 0.05, ("no guard",)),
    (Truth("weighted", "concentrated", 0.1), "PASS", 0.0, 0.05, ("no guard",)),
    (Truth("weighted", "risen", 0.15), "FAIL", 0.93, 1.0, ("drops alone",)),
    (Truth("weighted", "reshuffled"), "FAIL", 0.0, ALPHA, ("no t test",)),
    (Truth("graded"), "FAIL", 0.0, ALPHA, ("unstratified",)),
    (Truth("graded", "spread", 0.12), "FAIL", 0.93, 1.0, ("unstratified",)),
    (Truth("heavy"), "FAIL", 0.0, ALPHA, ("unstratified",)),
    (Truth("heavy", "spread", 0.1), "PASS", 0.0, 0.05, ("no guard",)),
    (Truth("rare"), "FAIL", 0.0, ALPHA, ("without ties",)),
    (Truth("saturated", "broken", 0.1), "PASS", 0.0, 0.05, ("no guard",)),
)
"""Truth, event and limits, with the mutants that are tested on it."""


def rewards(draw: Draws, plan: Plan) -> Study:
    """The rule for rewards, and mutants of it; a judgement takes some 50 ms."""

    def row(truth: Truth, event: str, low: float, high: float, mutants: tuple[str, ...]) -> Row:
        rng = draw.stream(f"rewards {truth}")
        same = truth.change != "reshuffled"
        names: dict[str, list[bool]] = {rule: [] for rule in ("gate", *mutants)}
        for _ in range(plan.studies // 10):
            now, then = truth.draw(rng)
            run = Run(now, then, same, judge_reward(now, then, same_policy=same))
            names["gate"].append(run.said.verdict == event)
            for mutant in mutants:
                names[mutant].append(MUTANTS[mutant](run) == event)
        outcomes: dict[str, Outcomes] = {rule: np.array(found) for rule, found in names.items()}
        return Promise(str(truth), event, low, high), outcomes

    return Study(
        "Rewards: the rule and its mutants, each of which must break a promise",
        [row(*promise) for promise in PROMISES],
        tuple(MUTANTS),
    )
