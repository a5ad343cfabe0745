"""What a person sees of a run: what it is about, what it can find, and what it found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_harness.plugin.state import RUN_SEED, SETTINGS, fixtures_of, judges_by, rows

if TYPE_CHECKING:
    from grpo_harness.gate.verdicts import Plan


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show what the run is about, and what it takes to repeat it."""
    lines = (f"{name} {value}" for name, value in _header(config).items())
    shown = [f"grpo-harness: {', '.join(lines)}"]
    if not config.pluginmanager.hasplugin("cacheprovider"):
        shown.append("grpo-harness: pytest's cache is off, so reruns know nothing of each other")
    return shown


def _header(config: pytest.Config) -> dict[str, Any]:
    settings = config.stash[SETTINGS]
    return {
        "base": settings.base,
        "trained": settings.trained,
        "problems": settings.problems,
        "samples": settings.samples,
        "sampling": " ".join(f"{k}={v}" for k, v in settings.sampling.asdict().items()),
        "baselines": str(settings.baselines),
        "seed": config.stash[RUN_SEED],
    }


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Show what the run will be able to find: in a line, with ``--co`` check by check."""
    planned = sum("gate" in fixtures_of(item) for item in items)
    if not planned or config.getoption("grpo_record"):
        return []
    asked = {
        (item.callspec.params["role"], item.callspec.params["task_type"])  # type: ignore[attr-defined]
        for item in items
        if {"evaluation", "baseline"} <= set(fixtures_of(item)) and judges_by(item, "accuracy")
    }
    from grpo_harness.gate.verdicts import Plan
    from grpo_harness.session import plan
    from grpo_harness.settings import ROLES

    settings = config.stash[SETTINGS]
    plans = [
        (task_type, settings.policy(role), plan(settings, planned, role, task_type))
        for task_type in settings.tasks
        for role in ROLES
        if (role, task_type) in asked
    ]
    line = f"plan: {planned} check{'s share' if planned > 1 else ' has'} a false-alarm risk of 1 %"
    drops = sorted(found.mde90 for *_, found in plans if isinstance(found, Plan))
    if drops:
        drop = " to ".join(dict.fromkeys(f"{100 * d:.1f}" for d in (drops[0], drops[-1])))
        line += f"; nine times in ten, a recorded policy is caught {drop} points lower"
    if unknown := [found for *_, found in plans if isinstance(found, str)]:
        whys = ", ".join(dict.fromkeys(unknown))
        line += f"; {len(unknown)} of {len(plans)} accuracy checks will be an ERROR: {whys}"
    if not plans or not config.getoption("collectonly"):
        return [f"{line} (check by check: --co)" if plans else line]
    from tabulate import tabulate

    titles = (
        *("task type", "policy", "n × k", "baseline"),
        *("drop caught 9 times in 10 (points)", "problems that catch 5 points"),
    )
    return [
        line,
        *tabulate([_plan_row(*row) for row in plans], titles, disable_numparse=True).splitlines(),
    ]


def _plan_row(task_type: str, policy: str, found: Plan | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return task_type, policy, "", "", f"ERROR: {found}", ""
    drop = f"{100 * found.mde90:.1f}" if found.mde90 < found.then else "more than there is"
    size = f"{found.n} × {found.k}"
    return task_type, policy, size, f"{found.then:.1%}", drop, str(found.needed)


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport,
) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Count a check that proves nothing as unproven, not as passed."""
    if isinstance(report, pytest.TestReport) and report.when == "call" and report.passed:
        for row in rows(report):
            if row["kind"] == "check" and row["name"] == "UNPROVEN":
                return "unproven", "u", ("UNPROVEN", {"yellow": True})
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, and write them where ``--grpo-report`` says."""
    reports = [
        report
        for category in terminalreporter.stats.values()
        for report in category
        if isinstance(report, pytest.TestReport)
    ]
    found = [row for report in reports for row in rows(report)]
    if not found:
        return
    settings = config.stash[SETTINGS]
    recorded = {row["path"]: row["notes"] for row in found if row["kind"] == "recorded"}
    if recorded:
        terminalreporter.section("grpo-harness: baselines recorded")
        for path, notes in sorted(recorded.items()):
            terminalreporter.line("\n    ".join([path, *notes]))
        terminalreporter.line("Read the difference and commit it: it is what later runs must meet.")
    from grpo_harness.report.report import Report, write_summary

    report = Report(_header(config), settings.tasks, (settings.base, settings.trained))
    for row in found:
        report.add(row)
    if report:
        terminalreporter.section("grpo-harness")
        for line in report.terminal():
            terminalreporter.line(line)
        if folder := config.getoption("grpo_report"):
            for written in report.write(Path(folder)):
                terminalreporter.line(f"written: {written}")
        if target := os.environ.get("GITHUB_STEP_SUMMARY"):
            write_summary(report, target)
    from grpo_harness.session import stale_entries

    for entry in stale_entries(settings):
        terminalreporter.line(f"stale: {entry}; pytest --grpo-prune deletes it")
