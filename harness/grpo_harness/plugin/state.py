"""What the parts of the plugin share: one run's state, the rows that its tests carry, messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from grpo_harness.session import Session
    from grpo_harness.settings import Settings
    from grpo_harness.sizing import Sizing

_T = TypeVar("_T")

PROPERTY = "grpo-harness"
"""Name of the test properties that carry rows from the workers to the report, and into JUnit."""


@dataclass
class Run:
    """The state of a run: its settings, its seed, its sizes, the rule of every planned check."""

    settings: Settings
    seed: int
    planned: list[str] = field(default_factory=list)
    files: int = 1

    @cached_property
    def sizing(self) -> Sizing:
        """How many problems and samples each row asks."""
        from grpo_harness.sizing import Sizing

        return Sizing(self.settings)

    def shares(self) -> dict[str, float]:
        """Return each check's part of the risk of a false alarm, by its rule."""
        from grpo_harness.rules import shares

        return shares(self.planned, self.settings.table.gate.alpha)


RUN: pytest.StashKey[Run] = pytest.StashKey()
"""The key of the run's state in pytest's stash."""


SEED = "grpo-harness/seed"
"""The key of the last run's seed in pytest's cache."""


def carry(node: pytest.Item, kind: str, row: dict[str, Any]) -> None:
    """Attach a row to a test; it reaches the report from any process."""
    node.user_properties.append((PROPERTY, json.dumps({"kind": kind, **row})))


def carry_check(node: pytest.Item, row: dict[str, Any]) -> None:
    """Attach a check: as a row, and for JUnit its verdict as a text and each number behind it."""
    carry(node, "check", row)
    name = f"{PROPERTY}.{row['rule']}"
    node.user_properties.append((name, f"{row['verdict']}: {row['reason']}"))
    for figure, value in (row.get("evidence") or {}).items():
        if figure not in ("verdict", "reason"):
            node.user_properties.append((f"{name}.{figure}", str(value)))


def carry_notices(node: pytest.Item, session: Session) -> None:
    """Attach the new notices about the caches."""
    for notice in session.notices():
        carry(node, "notice", {"text": notice})


def rows(report: pytest.TestReport) -> Iterator[dict[str, Any]]:
    """Yield the rows that a test carried."""
    for name, value in report.user_properties:
        if name == PROPERTY:
            yield json.loads(str(value))


@contextmanager
def usage_errors() -> Iterator[None]:
    """Make pytest's usage error of an error inside that is a message to the user."""
    from grpo_harness.errors import HarnessError
    from grpo_harness.text import plain

    try:
        yield
    except HarnessError as error:
        raise pytest.UsageError(plain(str(error))) from error


def clearly(action: Callable[[], _T]) -> _T:
    """Run ``action``; an error that is a message to the user fails the test with that one line."""
    from grpo_harness.errors import HarnessError
    from grpo_harness.text import plain

    try:
        return action()
    except HarnessError as error:
        message = plain(str(error))
    # Outside the except block: inside, Python would print the error again as the cause.
    pytest.fail(message, pytrace=False)
