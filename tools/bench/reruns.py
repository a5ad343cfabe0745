"""Time the evaluation of the embedded pair, a rerun of it that draws nothing, and `--co`.

``python -m tools.bench.reruns`` runs pytest in processes of their own, as a user would, with a new
store in a scratch folder. Prints the seconds of each whole process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SUITES = ("accuracy", "length", "reward", "improvement")
"""The suites that judge what the policies answer."""


def main() -> int:
    """Print one line for each command."""
    suites = [f"suites/test_{name}.py" for name in SUITES]
    with tempfile.TemporaryDirectory() as folder:
        out = ["--grpo-seed", "5", "-o", f"cache_dir={folder}/cache"]
        for what, options in {
            "that draws": out,
            "that finds every completion in the store": out,
            "the same with a report": [*out, "--grpo-report", str(Path(folder) / "report")],
            "--co": [*out, "--co"],
        }.items():
            seconds = _seconds([*suites, "-q", *options])
            sys.stdout.write(f"pytest on {len(suites)} suites, {what}: {seconds:.1f} s\n")
            sys.stdout.flush()
    return 0


def _seconds(arguments: Sequence[str]) -> float:
    # Without its compiled files Python would compile everything in each run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
