"""What the parts of the plugin share: what a run stashes, and the rows that its tests carry."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from grpo_harness.settings import Settings

SETTABLE = (
    *("base", "trained", "problems", "samples", "greedy"),
    *("device", "dtype", "baselines", "sequential"),
)
"""The options that decide what is drawn and judged, by their names without ``--grpo-``."""

PROPERTY = "grpo-harness"
"""Name of the test properties that carry rows from the workers to the report, and into JUnit."""

SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
RUN_SEED: pytest.StashKey[int] = pytest.StashKey()
CHECKS: pytest.StashKey[int] = pytest.StashKey()
"""How many checks the run planned: they share one risk of a false alarm."""


def carry(node: pytest.Item, kind: str, row: dict[str, Any]) -> None:
    """Attach a row to a test: whichever process ran it, the report will have it."""
    node.user_properties.append((PROPERTY, json.dumps({"kind": kind, **row})))


def rows(report: pytest.TestReport) -> Iterator[dict[str, Any]]:
    """Yield the rows that a test carried."""
    for name, value in report.user_properties:
        if name == PROPERTY:
            yield json.loads(str(value))


RULES = frozenset({"accuracy", "length", "truncation", "unparsable", "no_loss", "improvement"})
"""The rules of the ``gate`` fixture, by which a test may judge."""


def judges_by(item: pytest.Item, rule: str) -> bool:
    """Tell whether a test judges by a rule, so far as its own code names any."""
    code = getattr(inspect.unwrap(getattr(item, "function", None) or judges_by), "__code__", None)
    named = RULES & set(getattr(code, "co_names", ()))
    return "gate" in fixtures_of(item) and (rule in named or not named)


def fixtures_of(item: pytest.Item) -> list[str]:
    """Return the names of the fixtures that a test uses, directly or not."""
    return getattr(item, "fixturenames", [])
