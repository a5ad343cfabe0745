"""Ask the contract beside releases of TRL, each in an environment of its own.

``python -m tools.releases --out RELEASES.md`` writes a table: what each release computes otherwise
than GRPO's formulas, by TRL's own issue. A difference that has no name there ends it with status 1.
Results are kept in ``.releases``: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = ROOT / "tests" / "older.txt"
KEPT = ROOT / ".releases"


@dataclass(frozen=True)
class Difference:
    """What some releases compute otherwise: the runs and invariants that show it, and why.

    ``tests`` is matched with ``invariant-run``, and ``until`` is the release that mended it.
    """

    tests: str
    why: str
    until: str

    def explains(self, test: str) -> bool:
        """Tell whether a failed test shows this difference."""
        return re.search(self.tests, test) is not None


DIFFERENCES: Sequence[Difference] = (
    Difference(
        r"-unscored$", "a completion that every reward scores None counts as 0 (trl#5902)", "1.6"
    ),
    Difference(
        r"(loss|gradient)_equals_the_oracles-halves$",
        "with a generation batch of two steps the dapo loss is half of what is right (trl#6024)",
        "1.9.2",
    ),
    Difference(
        r"-masked$",
        "tokens of masked completions count in the denominator of the loss (trl#6369)",
        "1.9",
    ),
    Difference(
        r"figures_of_the_policy_are_the_oracles-(halves|clipped)$",
        "clip_ratio/low_min and high_max are of micro-batches, and of single completions since",
        "1.9",
    ),
    Difference(
        r"-two-ended$",
        "only the tokenizer's end token ends a completion, not the others of the generation config",
        "1.15",
    ),
)
"""The known differences, by the release that mended each; seen in its source."""


def releases() -> list[str]:
    """Return the listed releases, oldest first."""
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def asked(release: str) -> Mapping[str, str]:
    """Return the tests of the contract beside a release, with the first line of each failure."""
    kept = KEPT / f"{release}.json"
    if kept.is_file():
        found: Mapping[str, str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    folder = KEPT / release
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*install, "--target", str(folder), f"trl=={release}"], check=True)
    report = KEPT / f"{release}.xml"
    report.unlink(missing_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "suites/test_training.py", "-k", "test_contract"),
            *("-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        check=False,
        stdout=subprocess.DEVNULL,
    )
    told = {}
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314
        name = re.sub(r"^test_contract\[(.*)\]$", r"\1", case.get("name", ""))
        bad = [problem for kind in ("failure", "error") for problem in case.findall(kind)]
        lines = (bad[0].get("message") or bad[0].text or "failed").strip() if bad else ""
        told[name] = lines.split("\n")[0][:300]
    if not told:
        raise SystemExit(f"no test of the contract ran beside TRL {release}: see {report}")
    kept.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def row(release: str, told: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return a release's row of the table, and the failures that no known difference explains."""
    failed = {test: why for test, why in told.items() if why}
    causes = [each for each in DIFFERENCES if any(map(each.explains, failed))]
    named = [
        f"{each.why}, until {each.until} ({sum(map(each.explains, failed))} checks)"
        for each in causes
    ]
    unnamed = [
        f"{test}: {why}"
        for test, why in failed.items()
        if not any(each.explains(test) for each in DIFFERENCES)
    ]
    text = "; ".join([*named, *(["not explained"] if unnamed else [])]) or "none"
    return f"| {release} | {len(told) - len(failed)} of {len(told)} | {text} |", unnamed


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the contract beside every listed release, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.releases", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "RELEASES.md", help="the table's file")
    arguments = parser.parse_args(argv)
    KEPT.mkdir(exist_ok=True)
    rows, unexplained = [], []
    for release in releases():
        line, unnamed = row(release, asked(release))
        rows.append(line)
        unexplained += [f"TRL {release}: {each}" for each in unnamed]
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    head = [
        "# The contract beside releases of TRL",
        "",
        "Each release is asked every check of the contract (`suites/test_training.py`), beside the "
        "transformers and torch of `requirements.lock`. A difference is what a release computes "
        "otherwise than the formulas, with TRL's own issue. Made by `make trl`; the releases are "
        "those of `tests/older.txt`.",
        "",
        "| TRL | checks that hold | differences |",
        "|---|---|---|",
    ]
    arguments.out.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    sys.stdout.writelines(f"not explained: {each}\n" for each in unexplained)
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
