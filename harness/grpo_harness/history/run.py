"""A run as its file holds it, from the rows that its tests carried."""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from grpo_harness.baselines.file import Baseline
from grpo_harness.baselines.provenance import git
from grpo_harness.history.file import Judged, Reference, Row, Run


def run_of(
    started: str,
    seed: int,
    measured: Iterable[Mapping[str, Any]],
    checks: Iterable[Mapping[str, Any]],
    baseline_of: Callable[[str, str], Baseline | None],
    root: Path,
) -> Run:
    """Return a run.

    ``measured`` has the rows of `measured`, some of them several times, and ``checks`` those of
    checks. ``baseline_of`` finds the baseline of a policy on a task type. ``root`` is the project.
    """
    once = {(row["policy"], row["task_type"]): row for row in measured}
    rows = []
    for key, row in once.items():
        own = {name: of for name, of in row.items() if name != "kind"}
        baseline = baseline_of(*key)
        reference = None if baseline is None else _reference(baseline)
        rows.append(msgspec.convert({**own, "baseline": reference}, Row))
    # --match keeps out tags: the name is that of the commit alone.
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", cwd=root)
    time = git("show", "--no-patch", "--format=%ct", "HEAD", cwd=root)
    return Run(
        started=started,
        commit=commit or None,
        committed=datetime.fromtimestamp(int(time), UTC).isoformat() if time else None,
        seed=seed,
        rows=rows,
        checks=[_judged(check) for check in checks],
    )


def _reference(baseline: Baseline) -> Reference:
    header = baseline.header
    anchor = header.anchor
    return Reference(
        digest=baseline.digest,
        commit=header.commit,
        recorded=header.recorded,
        accuracy=header.accuracy,
        anchor=anchor.digest or f"{anchor.fingerprint} {anchor.recorded}",
        anchor_commit=anchor.commit,
        anchor_accuracy=anchor.accuracy,
    )


def _judged(check: Mapping[str, Any]) -> Judged:
    evidence = check["evidence"] or {}
    return Judged(
        rule=check["rule"],
        policy=check["policy"],
        task_type=check["task_type"],
        verdict=check["verdict"],
        then=evidence.get("then"),
        now=evidence.get("now"),
    )
