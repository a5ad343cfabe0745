"""The scan for change points: its false alarms over whole histories, and what it finds.

    python -m tools.calibration.drifts [--histories N] [--seed N]

A history is looked at after each of its runs, as a project does that shows it in every report. It
has a false alarm if any of these looks names a drift.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tabulate import tabulate

from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.changepoint import Change, Point, likeliest, share
from grpo_harness.history.series import Measurement, Series
from tools.calibration.gates import Bools
from tools.calibration.promises import Plan, Promise, Row
from tools.calibration.report import table
from tools.calibration.simulation import Draws, Ints
from tools.calibration.studies import Study

COMMITS = 30
CHANGED = 15
"""The commit from which on something has changed, if it has."""

SERIES = 60
"""Series of a usual history: two policies, six task types, five figures."""

K = 4


@dataclass(frozen=True)
class Truth:
    """How a history is made: problems of mean skill ``mean``, asked 4 times each.

    ``sizes`` are the numbers of problems before and after `CHANGED`. ``drop`` is lost at `CHANGED`
    by all problems alike, or with ``slowly`` at each commit from there on. With ``policies`` each
    commit has a policy of its own, as good as the others, whose mean differs by 2 points. With
    ``one_seed`` every run draws the same completions, until at `CHANGED` a library changes them.
    ``reruns`` is the number of runs of a commit.
    """

    name: str
    mean: float = 0.7
    sizes: tuple[int, int] = (256, 256)
    drop: float = 0.0
    slowly: bool = False
    policies: bool = False
    one_seed: bool = False
    reruns: int = 1

    def __str__(self) -> str:
        return self.name

    def history(self, rng: np.random.Generator) -> list[Measurement]:
        """Draw the measurements of a history."""
        skills = rng.beta(self.mean, 1 - self.mean, max(self.sizes))
        drawn: dict[tuple[int, int], Point] = {}
        found = []
        for commit in range(COMMITS):
            after = commit >= CHANGED
            n = self.sizes[after]
            own = skills[:n]
            times = commit - CHANGED + 1 if self.slowly else 1
            lost = self.drop * times * after + (rng.normal(0, 0.02) if self.policies else 0.0)
            own = np.clip(own * (1 - lost / self.mean), 0.0, 1.0)
            for rerun in range(self.reruns):
                seed = 0 if self.one_seed else commit * self.reruns + rerun
                key = (seed, int(after))
                if not self.one_seed or key not in drawn:
                    drawn[key] = _point(rng.binomial(K, own), str(n))
                policy = str(commit) if self.policies else ""
                found.append(
                    Measurement(f"{commit:02}-{rerun}", str(commit), policy, seed, drawn[key])
                )
        return found


def _point(correct: Ints, problems: str) -> Point:
    rates = correct / K
    return Point.of(rates, rates * (1 - rates) / (K - 1), K * len(rates), 1.0, problems)


Scan = Callable[[Sequence[Measurement]], Change | None]


def scan(measurements: Sequence[Measurement]) -> Change | None:
    """Return the likeliest change of a history, as the harness finds it."""
    series = Series("", "", "accuracy", measurements)
    points = [position.point for position in series.positions]
    return likeliest(points, one_policy=series.one_policy)


def known_noise(measurements: Sequence[Measurement]) -> Change | None:
    """Take policies for one: whatever they differ by is more than the noise of completions."""
    return scan([replace(one, fingerprint="") for one in measurements])


def same_problems(measurements: Sequence[Measurement]) -> Change | None:
    """Take all runs to have asked the same problems."""
    return scan([replace(one, point=replace(one.point, problems="")) for one in measurements])


def seeds_apart(measurements: Sequence[Measurement]) -> Change | None:
    """Count runs of one seed as if each had drawn its own completions."""
    return scan([replace(one, seed=number) for number, one in enumerate(measurements)])


UNCHANGED = (
    Truth("256 x 4"),
    Truth("256 x 4, mean 0.95", mean=0.95),
    Truth("256 x 4, mean 0.002", mean=0.002),
    Truth("256 x 4, 3 runs a commit", reruns=3),
    Truth("64, then 256 problems", sizes=(64, 256)),
    Truth("256, then 64 problems", sizes=(256, 64)),
    Truth("one seed, a new library", one_seed=True),
    Truth("a new policy each commit", policies=True),
)
MUTANTS: dict[str, dict[str, Scan]] = {
    "64, then 256 problems": {"same problems": same_problems},
    "256, then 64 problems": {"same problems": same_problems},
    "one seed, a new library": {"seeds apart": seeds_apart},
    "a new policy each commit": {"known noise": known_noise},
}


def alarms(truth: Truth, rules: dict[str, Scan], rng: np.random.Generator) -> dict[str, bool]:
    """Tell by which rules a history has a false alarm, at any look.

    *each look alone* is judged at the whole risk.
    """
    history = truth.history(rng)
    found = dict.fromkeys([*rules, "each look alone"], False)
    for runs in range(2, len(history) + 1):
        for name, rule in rules.items():
            change = rule(history[:runs])
            if change is None:
                continue
            found[name] |= change.p <= share(ALPHA, 1, runs)
            if name == "scan":
                found["each look alone"] |= change.p <= ALPHA
    return found


def drifts(draw: Draws, plan: Plan) -> Study:
    """The same of fewer histories, beside the other studies; this module's command has many."""
    return unchanged(draw, max(1, plan.studies // 10))


def unchanged(draw: Draws, histories: int) -> Study:
    """Whole histories in which nothing changes: a drift may be named in 1 % of them."""
    found: list[Row] = []
    for truth in UNCHANGED:
        rules = {"scan": scan, **MUTANTS.get(truth.name, {})}
        rng = draw.stream(f"drifts of {truth}")
        sheet = [alarms(truth, rules, rng) for _ in range(histories)]
        outcomes: dict[str, Bools] = {
            name: np.array([each[name] for each in sheet]) for name in sheet[0]
        }
        found.append((Promise(str(truth), "any drift", high=ALPHA), outcomes))
    return Study(
        f"Histories of {COMMITS} commits without a change, looked at after each run",
        found,
        ("each look alone", "same problems", "seeds apart", "known noise"),
    )


def power(draw: Draws, histories: int) -> str:
    """Return a table of what is found of a drop, in a history of `SERIES` series."""
    rows = []
    truths = [
        Truth("256 x 4, 2 pt lost", drop=0.02),
        Truth("256 x 4, 5 pt lost", drop=0.05),
        Truth("256 x 4, 1 pt lost with each commit", drop=0.01, slowly=True),
        Truth("a new policy each commit, 5 pt lost", drop=0.05, policies=True),
        Truth("a new policy each commit, 10 pt lost", drop=0.1, policies=True),
    ]
    for truth in truths:
        rng = draw.stream(f"power of {truth}")
        waited, near, inside = [], 0, 0
        for _ in range(histories):
            history = truth.history(rng)
            for runs in range(CHANGED + 1, COMMITS + 1):
                change = scan(history[:runs])
                if change is not None and change.p <= share(ALPHA, SERIES, runs):
                    waited.append(runs - CHANGED)
                    near += abs(change.at - CHANGED) <= 1
                    inside += change.earliest <= CHANGED <= change.latest
                    break
        found = len(waited)
        typical = int(np.median([*waited, *[COMMITS] * (histories - found)]))
        placed = [f"{100 * times / max(found, 1):.0f}" for times in (near, inside)]
        rows.append(
            [
                str(truth),
                f"{100 * found / histories:.0f}",
                str(typical) if typical < COMMITS else "",
                *(["", ""] if truth.slowly else placed),
            ]
        )
    heads = ["simulated", "found", "runs until found", "within 1 commit", "interval holds it"]
    align = ["left"] + ["right"] * 4
    return tabulate(rows, heads, colalign=align, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; the exit status is 1 if the scan breaks a promise, or a mutant none."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration.drifts")
    parser.add_argument("--histories", type=int, default=2000, help="how many of each kind (2000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw = Draws(options.seed)
    study = unchanged(draw, options.histories)
    text, broken = table(study.rows)
    sys.stdout.write(
        f"{options.histories} histories of each kind, seed {options.seed}; percent of them\n\n"
        f"{study.title}\n\n{text}\n\n"
        f"A drop at commit {CHANGED + 1} of {COMMITS}, among {SERIES} series\n\n"
        f"{power(draw, options.histories // 4)}\n"
    )
    return int("scan" in broken or not {*study.mutants} <= broken)


if __name__ == "__main__":
    sys.exit(main())
