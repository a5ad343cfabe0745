"""What was other when the baselines were recorded: versions, hardware, engine, sampling, commit."""

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_harness.report.report import Report
from grpo_harness.report.schema import Recorded


def differences(report: Report) -> list[tuple[str, str, str, str]]:
    """Return what differs as (name, then, now, of which evaluations), the commits first."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for key, recorded in report.recorded.items():
        for difference in _differences(report, key, recorded):
            found.setdefault(difference, []).append(f"{key[0]} on {key[1]}")
    every = len(report.recorded)
    return [(*row, "all" if len(of) == every else ", ".join(of)) for row, of in found.items()]


def _differences(
    report: Report, key: tuple[str, str], recorded: Recorded
) -> Iterator[tuple[str, str, str]]:
    evaluation, commit = report.evaluations[key], report.run.get("commit")
    if recorded.commit != commit:
        yield "commit", _commit(recorded.commit), _commit(commit)
    now = {**evaluation["engine"], **report.environment}
    for then, of in ((recorded.environment, now), (recorded.sampling, evaluation["sampling"])):
        for name in sorted(then.keys() & of.keys()):
            if then[name] != of[name]:
                yield name, _shown(then, name), _shown(of, name)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return "none" if values[name] is None else str(values[name])


def _commit(commit: str | None) -> str:
    return commit[:12] + commit[40:] if commit else "unknown"
