"""What a person sees of a run: what it is about, what it can find, and what it found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.plugin.state import RUN_SEED, SETTINGS, fixtures_of, rows


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
    asked = {
        (item.callspec.params["role"], item.callspec.params["task_type"])  # type: ignore[attr-defined]
        for item in items
        if {"evaluation", "baseline", "gate"} <= set(fixtures_of(item))
    }
    if not asked or config.getoption("grpo_record"):
        return []
    from harness.session import plan
    from harness.settings import ROLES

    settings = config.stash[SETTINGS]
    plans = [
        (task_type, settings.policy(role), found)
        for task_type in settings.tasks
        for role in ROLES
        if (role, task_type) in asked
        and (found := plan(settings, planned, role, task_type)) is not None
    ]
    if not plans:
        return []
    drops = [f"{100 * d:.1f}" for d in sorted(found.mde90 for _, _, found in plans)]
    drop = drops[0] if drops[0] == drops[-1] else f"{drops[0]} to {drops[-1]}"
    lines = [
        f"plan: {planned} check{'s share' if planned > 1 else ' has'} a false-alarm risk of 1 %; "
        f"nine times in ten, a recorded policy is caught {drop} points lower"
    ]
    if not config.getoption("collectonly"):
        return [f"{lines[0]} (check by check: --co)"]
    from tabulate import tabulate

    table = [
        (
            *(task_type, policy, f"{p.n} × {p.k}", f"{p.then:.1%}"),
            f"{100 * p.mde90:.1f}" if p.mde90 < p.then else "more than there is",
            p.needed,
        )
        for task_type, policy, p in plans
    ]
    titles = (
        *("task type", "policy", "n × k", "baseline"),
        *("drop caught 9 times in 10 (points)", "problems that catch 5 points"),
    )
    return [*lines, *tabulate(table, titles, disable_numparse=True).splitlines()]


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
    from harness.report import Report, write_summary

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
    from harness.session import stale_entries

    for entry in stale_entries(settings):
        terminalreporter.line(f"stale: {entry}; pytest --grpo-prune deletes it")
