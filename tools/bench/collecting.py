"""Measure what the plugin costs a repository that does not use it.

``python -m tools.bench.collecting`` collects trivial tests with the plugin and without it, in turn,
and compares pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BAR = 0.05
"""Seconds that the plugin may cost."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the seconds of both, and their difference. Returns 1 if it is above ``BAR``."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.collecting")
    parser.add_argument("--tests", type=int, default=1000, help="how many are collected (1000)")
    parser.add_argument("--pairs", type=int, default=15, help="how often each way (15)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        lines = (f"def test_{number}(): pass\n" for number in range(arguments.tests))
        Path(folder, "test_many.py").write_text("".join(lines), encoding="utf-8")
        pairs = [
            (_seconds(folder), _seconds(folder, "-p", "no:grpo_harness.plugin"))
            for _ in range(arguments.pairs + 1)
        ][1:]  # the first pair fills the caches of the file system
    by_pair = [ours - without for ours, without in pairs]
    for name, values in (
        ("with the plugin", [ours for ours, _ in pairs]),
        ("without it", [without for _, without in pairs]),
        ("difference", by_pair),
    ):
        low, middle, high = min(values), statistics.median(values), max(values)
        sys.stdout.write(f"{name:<16} {middle:.3f} s  ({low:.3f} to {high:.3f})\n")
    return int(statistics.median(by_pair) > BAR)


def _seconds(folder: str, *options: str) -> float:
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", *options]
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
