"""Test the learning test: run it and each control with many seeds, and write a table.

``python -m tools.nano.learning_table --tests 20 --out FOLDER`` writes ``LEARNING.md``. Finished
trials are kept in ``trials.jsonl``: the same command continues after an interruption, and judges
again by the current limits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from grpo_harness.learning.judge import Answers, Limits, Trial, judge_learning, late
from grpo_harness.learning.laboratory import CONDITIONS, base_answers, trial

BASE = "base"
"""The name of a condition that is not a run, but the results of nano-base."""


class Ledger:
    """Trials and the base's results, in an append-only JSON Lines file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trials: dict[tuple[str, int], Trial] = {}
        self._before: dict[int, Answers] = {}
        *whole, half = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        for line in whole:
            self._read(json.loads(line))
        if half:  # it was being written when the process died
            path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def add(self, condition: str, seed: int, value: Trial | Answers) -> None:
        """Keep a trial, or the base's results for the test of the number ``seed``."""
        plain = msgspec.to_builtins(value)
        line = json.dumps({"condition": condition, "seed": seed, "value": plain})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._read(json.loads(line))

    def _read(self, entry: dict[str, Any]) -> None:
        if entry["condition"] == BASE:
            self._before[entry["seed"]] = msgspec.convert(entry["value"], Answers)
        else:
            trial = msgspec.convert(entry["value"], Trial)
            self._trials[entry["condition"], entry["seed"]] = trial

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._trials or (key[0] == BASE and key[1] in self._before)

    def trials(self, condition: str) -> list[Trial]:
        """Return a condition's finished trials."""
        return [trial for (name, _), trial in self._trials.items() if name == condition]

    def test(self, condition: str, number: int) -> tuple[list[Trial], Answers] | None:
        """Return the trials and base results of a learning test, or ``None`` if unfinished."""
        seeds = _seeds(condition, number)
        if number not in self._before or any((condition, s) not in self._trials for s in seeds):
            return None
        return [self._trials[condition, seed] for seed in seeds], self._before[number]


def _seeds(condition: str, number: int) -> range:
    """The seeds of a learning test: no two tests of a condition share one."""
    trials = CONDITIONS[condition].trials
    return range(number * trials, (number + 1) * trials)


def make_table(
    out: Path, tests: int, device: str, conditions: Sequence[str] = tuple(CONDITIONS)
) -> None:
    """Run the missing ones of ``tests`` learning tests of ``conditions``; write the table."""
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out / "trials.jsonl")
    # Test by test, so that all conditions have equally many tests whenever it is stopped.
    for number, name in itertools.product(range(tests), conditions):
        keys = [(BASE, number), *((name, seed) for seed in _seeds(name, number))]
        wanted = [key for key in keys if key not in ledger]
        for condition, seed in wanted:
            if condition == BASE:
                ledger.add(BASE, seed, base_answers(seed, device))
            else:
                ledger.add(condition, seed, trial(condition, seed, device))
        if wanted and (found := ledger.test(name, number)):
            verdict = judge_learning(*found)
            _say(f"{name}, test {number}: {verdict.verdict}: {verdict.reason}")
            write_table(ledger, tests, out / "LEARNING.md")
    write_table(ledger, tests, out / "LEARNING.md")


_HEAD = """\
# The learning test, tested

Learning tests of each condition, each of one or more runs with seeds of their own (so each on
problems of its own), judged by `grpo_harness.learning`: `learn` must pass, every control must
fail. {finished} of {planned} planned tests are finished. Made by
`python -m tools.nano.learning_table --tests {tests} --out FOLDER`, which goes on where it was
stopped.

Gain: mean reward of the last fifth of the steps less that of the first, by the rule reward,
whatever the trainer was told; its lower bound is at {confidence:.0%} and must exceed {gain}.
Accuracy: of held-out answers, before and after, in points; it must be proven better. Length: the
ratio of geometric mean lengths in tokens, after over before; at least {length}.
"""


def write_table(ledger: Ledger, tests: int, path: Path) -> None:
    """Write the results of the finished tests, by the current limits."""
    limits = Limits()
    found = {
        name: {n: judge_learning(*test) for n in range(tests) if (test := ledger.test(name, n))}
        for name in CONDITIONS
    }
    parts = [
        _HEAD.format(
            tests=tests,
            finished=sum(map(len, found.values())),
            planned=tests * len(CONDITIONS),
            confidence=limits.confidence,
            gain=limits.gain,
            length=limits.length,
        )
    ]
    parts.append("| condition | runs | tests | passed | failed | criteria broken |")
    parts.append("|---|---|---|---|---|---|")
    for name, learnings in found.items():
        broken = Counter(criterion for x in learnings.values() for criterion in x.broken)
        failed = sum(x.verdict == "FAIL" for x in learnings.values())
        criteria = ", ".join(f"{key} {times}" for key, times in broken.most_common())
        parts.append(
            f"| {name} | {CONDITIONS[name].trials} each | {len(learnings)} "
            f"| {len(learnings) - failed} | {failed} | {criteria} |"
        )
    parts.append("\n## Figures\n\nLeast and greatest of the means over the last fifth of a run.\n")
    parts.append("| figure | limits | " + " | ".join(CONDITIONS) + " |")
    parts.append("|---" * (2 + len(CONDITIONS)) + "|")
    for figure, least, most in limits.bands():
        cells = []
        for name in CONDITIONS:
            values = [late(trial, figure) for trial in ledger.trials(name)]
            cells.append(f"{min(values):.3f} to {max(values):.3f}" if values else "")
        parts.append(f"| {figure} | {least:g} to {most:g} | {' | '.join(cells)} |")
    for name, learnings in found.items():
        parts.append(
            f"\n## {name}\n\n| seeds | gain | at least | accuracy | Δ | length | verdict | broken |"
            "\n|---|---|---|---|---|---|---|---|"
        )
        for number, x in learnings.items():
            seeds = ", ".join(map(str, _seeds(name, number)))
            parts.append(
                f"| {seeds} | {x.gain.estimate.mean:+.3f} | {x.lower:+.3f} "
                f"| {x.accuracy.then:.1%} → {x.accuracy.now:.1%} | {100 * x.accuracy.delta:+.1f} "
                f"| {x.length:.2f} | {x.verdict} | {', '.join(x.broken)} |"
            )
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and make the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.nano.learning_table", description=__doc__
    )
    parser.add_argument("--tests", type=int, default=20, help="learning tests of each condition")
    parser.add_argument("--out", type=Path, required=True, help="output folder, new or to continue")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", choices=CONDITIONS, help="run one condition; the table has all")
    arguments = parser.parse_args(argv)
    conditions = [arguments.only] if arguments.only else list(CONDITIONS)
    make_table(arguments.out, arguments.tests, arguments.device, conditions)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
