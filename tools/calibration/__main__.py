"""Simulate, judge, print the tables, and exit with 1 if a promise is broken.

    python -m tools.calibration [--quick] [--seed N] [--out DIR]

The exit status is also 1 if a mutant of the gate keeps every promise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from timeit import repeat

from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.stats import stratified_p
from grpo_harness.gate.verdicts import judge
from tools.calibration import bisection, drifts, histories, pair, promises, rewards, studies
from tools.calibration.gates import MUTANTS, reference
from tools.calibration.promises import FULL, QUICK, rows
from tools.calibration.report import LEGEND, plot, table
from tools.calibration.simulation import K_THEN, Draws, Scenario
from tools.calibration.studies import Study

STUDIES = (
    studies.lengths,
    studies.sequential_runs,
    studies.families,
    studies.weighted,
    rewards.rewards,
    histories.reruns,
    histories.slow_losses,
    drifts.drifts,
    bisection.bisections,
    pair.embedded_pair,
)


def default_seed() -> int:
    """Return the commit as a number: every commit has its own draws, which can be repeated.

    0 if there is no commit, as in an unpacked release.
    """
    git = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(git.stdout.strip() or "0", 16)


def speed(draw: Draws) -> str:
    """Measure how long a judgement takes on this machine: reported, not a promise of the gate."""
    large, usual = draw(Scenario(512, 8), 1), draw(Scenario(256, 4), 24)
    one = min(repeat(lambda: stratified_p(large.now[0], 8, large.then[0], K_THEN), number=1))

    def session() -> None:
        for now, then in zip(usual.now, usual.then, strict=True):
            judge(now, 4, then, K_THEN, same_policy=False, alpha=ALPHA / 24)

    many = min(repeat(session, number=1))
    return (
        f"Time: the exact test at 512 x 8 in {1000 * one:.1f} ms (wanted: 30 ms), "
        f"a session of 24 checks at 256 x 4 in {1000 * many:.0f} ms (wanted: 2000 ms)."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the calibration, print its tables, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration")
    parser.add_argument(
        "--quick", action="store_true", help="the gate and its mutants alone, in seconds"
    )
    parser.add_argument("--seed", type=int, help="default: the hash of the git commit")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write tables and plot here")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    seed = default_seed() if options.seed is None else options.seed

    draw = Draws(seed)
    core, power = promises.core_bounds(draw, plan), promises.power_bounds(draw, plan)
    bounds = [
        *core,
        *promises.alarm_bounds(draw, plan),
        *power,
        *promises.announced_bounds(draw, plan),
    ]
    gate = Study("The gate: false alarms, power, wrong PASS", rows(bounds, {"gate": reference}))
    mutants = Study(
        "The gate and its mutants, each of which must break a promise",
        rows(core, {"the gate": reference, **MUTANTS}),
        tuple(MUTANTS),
    )

    more = [study(draw, plan) for study in STUDIES] if plan.studies else []
    parts, failures = [f"seed {seed}", LEGEND], []
    for study in (gate, mutants, *more):
        text, broken = table(study.rows, by_rule=study is mutants)
        parts += [study.title, text]
        failures += [
            f"{study.title}: {rule} breaks a promise" for rule in broken - {*study.mutants}
        ]
        failures += [
            f"{study.title}: no promise is broken by {rule}"
            for rule in study.mutants
            if rule not in broken
        ]
    parts.append(speed(draw))
    parts.append(
        "\n".join(failures)
        or "The gate keeps every promise, and every mutant of it breaks at least one."
    )
    text = "\n\n".join(parts) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "calibration.txt").write_text(text, encoding="utf-8")
        plot(power, options.out / "power.png")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
