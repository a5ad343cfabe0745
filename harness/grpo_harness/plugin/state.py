"""What the parts of the plugin share: one run's state, and the rows that its tests carry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from grpo_harness.session import Session
    from grpo_harness.settings import Settings

_T = TypeVar("_T")

PROPERTY = "grpo-harness"
"""Name of the test properties that carry rows from the workers to the report, and into JUnit."""


@dataclass
class Run:
    """What a run is about: its settings, its seed, and the rule of every check that it planned."""

    settings: Settings
    seed: int
    planned: list[str] = field(default_factory=list)
    files: int = 1

    def shares(self) -> dict[str, float]:
        """Return the part of the risk of a false alarm that each check has, by its rule."""
        from grpo_harness.rules import shares

        return shares(self.planned)


RUN: pytest.StashKey[Run] = pytest.StashKey()
"""Where a run that has anything to do with us keeps its state."""


def carry(node: pytest.Item, kind: str, row: dict[str, Any]) -> None:
    """Attach a row to a test: whichever process ran it, the report will have it."""
    node.user_properties.append((PROPERTY, json.dumps({"kind": kind, **row})))


def carry_check(node: pytest.Item, row: dict[str, Any]) -> None:
    """Attach a check: as a row, and in words for JUnit."""
    carry(node, "check", row)
    node.user_properties.append((f"{PROPERTY}.{row['rule']}", f"{row['verdict']}: {row['reason']}"))


def carry_notices(node: pytest.Item, session: Session) -> None:
    """Attach what has to be said of the caches and was not yet said."""
    for notice in session.notices():
        carry(node, "notice", {"text": notice})


def rows(report: pytest.TestReport) -> Iterator[dict[str, Any]]:
    """Yield the rows that a test carried."""
    for name, value in report.user_properties:
        if name == PROPERTY:
            yield json.loads(str(value))


def clearly(action: Callable[[], _T]) -> _T:
    """Let an error that is meant for a person reach them as that one line, once."""
    from grpo_harness.errors import HarnessError
    from grpo_harness.text import plain

    try:
        return action()
    except HarnessError as error:
        message = plain(str(error))
    # Outside, or Python would print the error a second time as the cause of the failure.
    pytest.fail(message, pytrace=False)
