"""How runs are drawn: problems with skills, and samples of them before and after a change.

The simulated policy has a skill per problem, from a Beta distribution with intra-class correlation
0.5 (most problems are easy or hopeless), and a reference of 16 samples per problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from grpo_harness.gate.bounds import ALPHA, PASS_CONFIDENCE, RATE
from grpo_harness.gate.verdicts import Evidence, judge, judge_sequential

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Names: TypeAlias = npt.NDArray[np.str_]
Pattern: TypeAlias = Literal["none", "spread", "concentrated", "broken", "reshuffled", "risen"]

HARMS: tuple[Pattern, ...] = ("spread", "concentrated")
K_THEN = 16
MINIMUM, MARGIN = RATE.minimum, RATE.margin


@dataclass(frozen=True)
class Scenario:
    """The truth that runs are drawn from: `n` problems of `k` samples, mean skill `mean` before.

    `drop` is the loss of mean skill. *spread*: every problem loses the same share of its skill.
    *concentrated*: problems in random order lose all of it until the suite has lost exactly `drop`.
    *broken*: each problem loses all of it by chance, so `drop` holds for the population of problems
    and only on average for the suite. *reshuffled*: another policy with another skill on four
    problems in five, equally good in the population. *risen*: every problem gains the same share of
    what it lacks.
    """

    n: int
    k: int
    mean: float = 0.7
    pattern: Pattern = "none"
    drop: float = 0.0
    same_policy: bool = True
    checks: int = 1

    def __str__(self) -> str:
        what = "no drop" if self.pattern == "none" else self.pattern
        drop = f" {100 * self.drop:g} pt" if self.drop else ""
        policy = "" if self.same_policy else ", other policy"
        checks = f", {self.checks} checks" if self.checks > 1 else ""
        return f"{self.n} x {self.k}, mean {self.mean:g}, {what}{drop}{policy}{checks}"

    def skills(self, rng: np.random.Generator, runs: int) -> tuple[Floats, Floats]:
        """The chance of a correct sample before and after, each of shape (runs, n)."""
        shape = (runs, self.n)
        before = rng.beta(self.mean, 1 - self.mean, shape)
        after = before
        if self.pattern == "spread":
            after = before * (1 - self.drop / before.mean(axis=1, keepdims=True))
        elif self.pattern == "concentrated":
            order = rng.random(shape).argsort(axis=1)
            skill = np.take_along_axis(before, order, axis=1)
            left = self.drop * self.n - (np.cumsum(skill, axis=1) - skill)
            after = np.empty(shape)
            np.put_along_axis(after, order, skill - np.clip(left, 0, skill), axis=1)
        elif self.pattern == "broken":
            after = np.where(rng.random(shape) < self.drop / self.mean, 0, before)
        elif self.pattern == "risen":
            lacking = 1 - before
            after = before + lacking * self.drop / lacking.mean(axis=1, keepdims=True)
        elif self.pattern == "reshuffled":
            fresh = rng.beta(self.mean, 1 - self.mean, shape)
            after = np.where(rng.random(shape) < 0.8, fresh, before)
        return before, after

    def draw(self, rng: np.random.Generator, runs: int) -> tuple[Ints, Ints]:
        """Correct counts now and then, each of shape (runs, n)."""
        before, after = self.skills(rng, runs)
        return rng.binomial(self.k, after), rng.binomial(K_THEN, before)


@dataclass(frozen=True)
class Batch:
    """Runs of one scenario, and what the gate said of each; axis 0 of arrays is the run."""

    scenario: Scenario
    now: Ints
    then: Ints

    @cached_property
    def verdicts(self) -> list[Evidence]:
        """The evidence of the real rule for every run, judged once."""
        s = self.scenario
        return [
            judge(now, s.k, then, K_THEN, same_policy=s.same_policy, alpha=ALPHA / s.checks)
            for now, then in zip(self.now, self.then, strict=True)
        ]

    @cached_property
    def sequential(self) -> list[Evidence]:
        """The evidence of the rule that stops at the first decision; for the same policy only."""
        k = self.scenario.k
        pairs = zip(self.now, self.then, strict=True)
        return [judge_sequential(now, k, then, K_THEN) for now, then in pairs]

    @property
    def names(self) -> Names:
        """The verdict names, shape (runs,)."""
        return np.array([v.verdict for v in self.verdicts])

    def column(self, field: str) -> Floats:
        """One number of every verdict."""
        return np.array([getattr(v, field) for v in self.verdicts], dtype=np.float64)

    @property
    def differences(self) -> Floats:
        """Rate now minus rate then, shape (runs, n)."""
        return np.asarray(self.now / self.scenario.k - self.then / K_THEN, dtype=np.float64)

    def predicted_power(self, drop: float, *, guarded: bool = True) -> float:
        """The chance to catch `drop` that runs of this batch predict by their standard errors.

        A run prints the prediction by the guarded error, which is a lower bound at small n. Without
        the guard it is an upper bound: a drop makes easy problems less certain, so the error grows.
        """
        n = self.scenario.n
        if guarded:
            width = float((self.column("upper") - self.column("lower")).mean())
            se = width / (2 * t.ppf(PASS_CONFIDENCE, n + 1))
        else:
            se = float(self.differences.std(axis=1, ddof=1).mean()) / n**0.5
        sides = 2 if self.scenario.same_policy else 1
        return float(norm.cdf(drop / se - norm.ppf(1 - ALPHA / sides / self.scenario.checks)))


class Draws:
    """Batches by scenario, each from a stream of its own, so that no batch depends on another."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def stream(self, name: str) -> np.random.Generator:
        """The random numbers that belong to `name`, the same ones for the same seed."""
        words = int.from_bytes(sha256(name.encode()).digest()[:8])
        return np.random.default_rng([self._seed, words])

    def __call__(self, scenario: Scenario, runs: int) -> Batch:
        """Draw `runs` runs of `scenario`, the same ones for the same seed."""
        now, then = scenario.draw(self.stream(str(scenario)), runs)
        return Batch(scenario, now, then)
