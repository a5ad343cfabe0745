"""What the contract does not look at in watched trainers, in pytest's summary and JUnit's file.

A test that is green must not hide that something has no formula. Without a watched trainer nothing
is printed, and nothing is imported. A crash in one of several processes ends its tests, because the
other processes wait for it.
"""

import sys
from typing import Any

import pytest

LEFT_OUT = "grpo-harness-contract"
"""The property of a test with what was not looked at in it."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Give the test's report what its trainers were not asked; end a run that others wait for."""
    watched = sys.modules.get("grpo_harness.contract.watched")
    if watched is not None:
        item.user_properties += [(LEFT_OUT, line) for line in watched.left_out()]
        if watched.processes.CRASHES:
            item.session.shouldfail = "the training of several processes crashed"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was not looked at, with the tests."""
    lines = {
        f"{report.nodeid}: {value}": None
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == LEFT_OUT
    }
    if lines:
        terminalreporter.section("the contract does not look at")
        for line in lines:
            terminalreporter.line(line)
