"""The gate's own test: simulated runs whose truth is known, judged by the real rules.

    python -m harness.calibration [--quick] [--seed N] [--out DIR]

Every bound that the gate promises is held against simulated runs, and then against mutants of
the gate: a bound that no mutant can break tests nothing. Exits with 1 where the reference gate
breaks a bound or a mutant breaks none.

The simulated policy has a skill per problem drawn from a Beta distribution with intra-class
correlation 0.5, most problems being easy or hopeless, and a reference of 16 samples a problem.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import binom, norm, t
from tabulate import tabulate

from harness.gate import PASS_CONFIDENCE, Verdict, judge, judge_sequential

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Names: TypeAlias = npt.NDArray[np.str_]
Pattern: TypeAlias = Literal["none", "spread", "concentrated", "broken", "reshuffled"]

HARMS: tuple[Pattern, ...] = ("spread", "concentrated")
K_THEN = 16
ALPHA, MINIMUM, MARGIN = 0.01, 0.01, 0.05
DROP = 0.05
REJUDGED = 200
BAND = 0.001
"""Chance that a table of bounds, each met exactly, shows one as broken.

It is divided over the bounds: at 99.9 % each, a table of forty would itself cry wolf."""


@dataclass(frozen=True)
class Scenario:
    """A truth to draw runs from: `n` problems of `k` samples, mean skill `mean` before.

    `drop` is the loss of mean skill. *spread*: every problem loses the same share of its skill.
    *concentrated*: problems in random order lose all of it until the suite has lost exactly
    `drop`. *broken*: each problem loses all of it by chance, so `drop` is true of the population
    of problems and only on average of the suite. *reshuffled*: another policy with another skill
    on four problems in five, equally good in the population.
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

    def draw(self, rng: np.random.Generator, runs: int) -> tuple[Ints, Ints]:
        """Correct counts now and then, each of shape (runs, n)."""
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
        elif self.pattern == "reshuffled":
            fresh = rng.beta(self.mean, 1 - self.mean, shape)
            after = np.where(rng.random(shape) < 0.8, fresh, before)
        return rng.binomial(self.k, after), rng.binomial(K_THEN, before)


@dataclass(frozen=True)
class Batch:
    """Runs of one scenario with what the gate said of each; arrays have the runs as axis 0."""

    scenario: Scenario
    now: Ints
    then: Ints

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """What the real rule says of every run, judged once."""
        s = self.scenario
        return [
            judge(now, s.k, then, K_THEN, same_policy=s.same_policy, checks=s.checks)
            for now, then in zip(self.now, self.then, strict=True)
        ]

    @property
    def names(self) -> Names:
        """The verdict names, shape (runs,)."""
        return np.array([v.name for v in self.verdicts])

    def column(self, field: str) -> Floats:
        """One number of every verdict."""
        return np.array([getattr(v, field) for v in self.verdicts], dtype=np.float64)

    @property
    def differences(self) -> Floats:
        """Rate now minus rate then, shape (runs, n)."""
        return np.asarray(self.now / self.scenario.k - self.then / K_THEN, dtype=np.float64)

    def predicted_power(self, drop: float) -> float:
        """The chance to catch `drop` that runs of this batch promise by their guarded errors."""
        width = float((self.column("upper") - self.column("lower")).mean())
        se = width / (2 * t.ppf(PASS_CONFIDENCE, self.scenario.n + 1))
        return float(norm.cdf(drop / se - norm.ppf(1 - ALPHA / self.scenario.checks)))


Gate: TypeAlias = Callable[[Batch], Names]


def decide(failed: npt.NDArray[np.bool_], passed: npt.NDArray[np.bool_]) -> Names:
    """Verdict names of mutants, which replace one part of the rule and keep its shape."""
    return np.where(failed, "FAIL", np.where(passed, "PASS", "UNPROVEN"))


def _failed(b: Batch, p: Floats, level: float = ALPHA) -> npt.NDArray[np.bool_]:
    return np.asarray((p <= level) & (b.column("delta") <= -MINIMUM))


def _passed(b: Batch) -> npt.NDArray[np.bool_]:
    return np.asarray(b.column("lower") > -MARGIN)


def reference(b: Batch) -> Names:
    """The gate as it is."""
    return b.names


def sequential(b: Batch) -> Names:
    """The gate that stops at the first decision; its likelihood ratio is for one policy."""
    k = b.scenario.k
    pairs = zip(b.now, b.then, strict=True)
    return np.array([judge_sequential(now, k, then, K_THEN).name for now, then in pairs])


def no_guard(b: Batch) -> Names:
    """PASS by a bound without the two pseudo-problems."""
    d, n = b.differences, b.scenario.n
    lower = d.mean(axis=1) - t.ppf(PASS_CONFIDENCE, n - 1) * d.std(axis=1, ddof=1) / n**0.5
    return decide(b.names == "FAIL", lower > -MARGIN)


def pass_is_not_fail(b: Batch) -> Names:
    """No third verdict: what is not proven harmful is harmless."""
    return decide(b.names == "FAIL", b.names != "FAIL")


def tolerance(limit: float) -> Gate:
    """Compare the means, and allow them to differ by `limit`."""

    def gate(b: Batch) -> Names:
        failed = b.column("delta") < -limit
        return decide(failed, ~failed)

    return gate


def unpaired(b: Batch) -> Names:
    """FAIL by a z test that takes the problems for two independent samples."""
    now, then = b.now / b.scenario.k, b.then / K_THEN
    se = np.sqrt((now.var(axis=1, ddof=1) + then.var(axis=1, ddof=1)) / b.scenario.n)
    return decide(_failed(b, norm.cdf((now.mean(axis=1) - then.mean(axis=1)) / se)), _passed(b))


def alpha_of_five_percent(b: Batch) -> Names:
    """FAIL at five times the false alarms."""
    return decide(_failed(b, b.column("p"), 0.05), _passed(b))


def no_t_test(b: Batch) -> Names:
    """Another policy judged by the exact test alone."""
    s = b.scenario
    return _rejudged(
        b, lambda now, then: judge(now, s.k, then, K_THEN, same_policy=True, checks=s.checks)
    )


def sign_flipped(b: Batch) -> Names:
    """Then and now exchanged."""
    return _rejudged(b, lambda now, then: judge(then, K_THEN, now, b.scenario.k, same_policy=True))


def failing_problems_dropped(b: Batch) -> Names:
    """Problems without one correct answer leave the denominator."""
    k = b.scenario.k
    return _rejudged(
        b, lambda now, then: judge(now[now > 0], k, then[now > 0], K_THEN, same_policy=True)
    )


def _rejudged(b: Batch, rule: Callable[[Ints, Ints], Verdict]) -> Names:
    # These mutants are far off, and a judgement costs milliseconds: a few hundred show it.
    pairs = zip(b.now[:REJUDGED], b.then[:REJUDGED], strict=True)
    return np.array([rule(now, then).name for now, then in pairs])


MUTANTS: dict[str, Gate] = {
    "no variance guard": no_guard,
    "PASS = not FAIL": pass_is_not_fail,
    "tolerance .02": tolerance(0.02),
    "tolerance .05": tolerance(0.05),
    "unpaired z": unpaired,
    "sign flipped": sign_flipped,
    "alpha = .05": alpha_of_five_percent,
    "failing problems dropped": failing_problems_dropped,
    "no t test": no_t_test,
}


@dataclass(frozen=True)
class Bound:
    """A promise: at most (or `least`) this share of a batch's sessions has such a verdict."""

    batch: Batch
    verdict: Literal["PASS", "FAIL"]
    limit: float
    least: bool = False

    def sessions(self, gate: Gate) -> npt.NDArray[np.bool_]:
        """Which sessions have the verdict: as many runs as the scenario has checks, any of them."""
        names = gate(self.batch)
        return np.asarray((names == self.verdict).reshape(-1, self.batch.scenario.checks).any(1))

    def measure(self, gate: Gate, tail: float) -> tuple[float, bool]:
        """The share under `gate`, and whether it breaks the promise beyond the chance `tail`."""
        sessions = self.sessions(gate)
        hits, n = int(sessions.sum()), len(sessions)
        p = binom.cdf(hits, n, self.limit) if self.least else binom.sf(hits - 1, n, self.limit)
        return hits / n, bool(p < tail)

    @property
    def promise(self) -> str:
        """The bound in words, in percent."""
        return f"{self.verdict} {'>=' if self.least else '<='} {100 * self.limit:.3g} %"


@dataclass(frozen=True)
class Plan:
    """How many runs each part of the calibration draws."""

    no_drop: int
    drop: int
    saturated: int
    sessions: int
    grid: int
    cells: tuple[tuple[int, int, float], ...]
    curve: int
    sizes: tuple[int, ...]
    drops: tuple[float, ...]


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
)


class Draws:
    """Batches by scenario, each from a stream of its own, so that none depends on the others."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, scenario: Scenario, runs: int) -> Batch:
        """Draw `runs` runs of `scenario`, the same ones for the same seed."""
        stream = int.from_bytes(sha256(str(scenario).encode()).digest()[:8])
        now, then = scenario.draw(np.random.default_rng([self._seed, stream]), runs)
        return Batch(scenario, now, then)


def core_bounds(draw: Draws, plan: Plan) -> list[Bound]:
    """The promises that every gate, reference and mutant, is held against."""
    same = draw(Scenario(256, 4), plan.no_drop)
    spread = draw(Scenario(256, 4, pattern="spread", drop=DROP), plan.drop)
    concentrated = draw(Scenario(256, 4, pattern="concentrated", drop=DROP), plan.drop)
    other = draw(Scenario(256, 4, pattern="reshuffled", same_policy=False), plan.drop)
    broken = draw(Scenario(256, 4, pattern="broken", drop=DROP, same_policy=False), plan.drop)
    saturated = draw(
        Scenario(64, 4, mean=0.97, pattern="broken", drop=DROP, same_policy=False),
        plan.saturated,
    )
    return [
        Bound(same, "FAIL", ALPHA),
        Bound(same, "PASS", 0.95, least=True),
        Bound(spread, "FAIL", 0.93, least=True),
        Bound(spread, "PASS", 0.05),
        Bound(concentrated, "FAIL", 0.95, least=True),
        Bound(concentrated, "PASS", 0.05),
        Bound(other, "FAIL", ALPHA),
        Bound(broken, "PASS", 0.07),
        Bound(saturated, "PASS", 0.06),
    ]


def further_bounds(draw: Draws, plan: Plan) -> list[Bound]:
    """The promises over sizes, difficulties and sessions, for the reference gate alone."""
    twelve = draw(Scenario(256, 4, checks=12), 12 * plan.sessions)
    grid = [draw(Scenario(n, k, mean), plan.grid) for n, k, mean in plan.cells]
    return [Bound(b, "FAIL", ALPHA) for b in [twelve, *grid]]


def power_bounds(draw: Draws, plan: Plan) -> list[tuple[float, Bound]]:
    """Predicted power, as an unchanged run of that size announces it, and the promise in it.

    The guard makes the prediction a floor rather than an estimate: realised power may lie far
    above it at small n, but not more than 5 points below.
    """
    bounds = []
    for n in plan.sizes:
        unchanged = draw(Scenario(n, 4), plan.curve)
        for drop in plan.drops:
            predicted = unchanged.predicted_power(drop)
            for pattern in HARMS:
                batch = draw(Scenario(n, 4, pattern=pattern, drop=drop), plan.curve)
                bounds.append((predicted, Bound(batch, "FAIL", max(0.0, predicted - 0.05), True)))
    return bounds


def table(bounds: list[Bound], gates: dict[str, Gate]) -> tuple[pd.DataFrame, set[str]]:
    """Every gate against every promise, in percent with a star where it is broken.

    One row a bound; also the names of the gates that break any.
    """
    tail = BAND / len(bounds)
    columns = {
        "scenario": [str(bound.batch.scenario) for bound in bounds],
        "promise": [bound.promise for bound in bounds],
    }
    breaking = set()
    for name, gate in gates.items():
        results = [bound.measure(gate, tail) for bound in bounds]
        columns[name] = [f"{100 * share:.1f}{'*' * broken}" for share, broken in results]
        if any(broken for _, broken in results):
            breaking.add(name)
    return pd.DataFrame(columns), breaking


def plot(power: list[tuple[float, Bound]], path: Path) -> None:
    """Draw predicted against realised power as a PNG."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted power", ylabel="realised power")
    line = np.linspace(0, 1, 2)
    axes.plot(line, line, color="black", linewidth=1)
    axes.fill_between(line, line - 0.05, line + 0.05, alpha=0.2, color="grey", label="5 points")
    points = pd.DataFrame(
        [
            (b.batch.scenario.n, b.batch.scenario.pattern, predicted, b.sessions(reference).mean())
            for predicted, b in power
        ],
        columns=["n", "pattern", "predicted", "realised"],
    )
    for (n, pattern), rows in points.groupby(["n", "pattern"]):
        marker = "o" if pattern == "spread" else "x"
        axes.plot(rows["predicted"], rows["realised"], marker, label=f"n = {n}, {pattern}")
    axes.legend()
    figure.savefig(path, dpi=120)


def default_seed() -> int:
    """The commit as a number: every change is tested by draws of its own, and can be repeated.

    0 where there is no commit, as in an unpacked release.
    """
    git = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(git.stdout.strip() or "0", 16)


def main(arguments: list[str] | None = None) -> int:
    """Run the calibration, print its tables, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.calibration")
    parser.add_argument("--quick", action="store_true", help="fewer runs: seconds, not minutes")
    parser.add_argument("--seed", type=int, help="default: the hash of the git commit")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write tables and plot here")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    seed = default_seed() if options.seed is None else options.seed

    draw = Draws(seed)
    core, power = core_bounds(draw, plan), power_bounds(draw, plan)
    promises = [*core, *further_bounds(draw, plan), *(bound for _, bound in power)]
    # Power is no promise of a sequential run: it may use up its plan undecided.
    errors = [b for b in core if b.batch.scenario.same_policy and not b.least]
    gate_table, broken = table(promises, {"reference": reference})
    sequential_table, sequential_broken = table(errors, {"sequential": sequential})
    mutant_table, killed = table(core, MUTANTS)
    survivors = [name for name in MUTANTS if name not in killed]

    broken |= sequential_broken
    tables = (gate_table, sequential_table, mutant_table)
    text = "\n\n".join(
        [f"seed {seed}; percent of sessions, * breaks the promise"]
        + [tabulate(t.to_dict("list"), headers="keys") for t in tables]
        + [
            f"Promises are broken by: {', '.join(broken)}"
            if broken
            else "The gate keeps every promise."
        ]
        + [f"No promise is broken by the mutant: {name}" for name in survivors]
    )
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "calibration.txt").write_text(text + "\n", encoding="utf-8")
        plot(power, options.out / "power.png")
    return int(bool(broken) or bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
