"""Run a suite many times on unchanged policies, and count how often it turns red.

This shows on the real pair what the simulation promises. Run it with
``python -m tools.calibration.false_alarms``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the accuracy suite ``--runs`` times with fresh seeds and count the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration.false_alarms")
    parser.add_argument("--runs", type=int, default=50, help="how many runs (50)")
    parser.add_argument("--suite", default="suites/test_accuracy.py", help="what each runs")
    arguments = parser.parse_args(argv)
    verdicts: Counter[str] = Counter()
    red = 0
    for run in range(1, arguments.runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "pytest", arguments.suite, "-q", "--grpo-report", folder]
            # Without the cache each run is a first attempt, not pooled with earlier ones.
            finished = subprocess.run(
                [sys.executable, *command, "-p", "no:cacheprovider"], capture_output=True, text=True
            )
            report = Path(folder) / "report.json"
            if not report.exists():
                sys.stderr.write(finished.stdout + finished.stderr)
                return 2
            found = json.loads(report.read_text(encoding="utf-8"))
        in_run = Counter(check["verdict"] for check in found["checks"])
        verdicts += in_run
        red += finished.returncode != 0
        bad = [
            f"{check['verdict']} {check['title']}, {check['policy']} on {check['task_type']}"
            for check in found["checks"]
            if check["verdict"] != "PASS"
        ]
        sys.stdout.write(
            f"run {run}, seed {found['run']['seed']}: {dict(in_run)} {'; '.join(bad)}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{arguments.runs} runs, {red} of them red; checks: {json.dumps(verdicts)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
