"""What a run plans: policies and task types of each test, its rules, and what is recorded.

A fixture is ours if pytest resolved its name to our function, whatever the name.
"""

from collections import Counter
from typing import Any

import pytest

from grpo_harness.plugin.state import Run, usage_errors

_FIXTURES = "grpo_harness.plugin.fixtures"
MARKER = "grpo"


def uses(item: Any, name: str) -> bool:
    """Tell whether a test, or a function that becomes one, uses our fixture of that name."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None or name not in info.names_closure:
        return False
    # A fixture that overrides ours and uses its own name has ours beneath it.
    for definition in reversed(info.name2fixturedefs.get(name, ())):
        if getattr(definition.func, "__module__", None) == _FIXTURES:
            return True
        if name not in definition.argnames:
            return False
    return False


@pytest.hookimpl(trylast=True)  # after parametrizations of the user
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each policy and task type that it uses, unless it chooses its own."""
    from grpo_harness.plugin import activated

    for name in ("role", "task_type"):
        if not uses(metafunc.definition, name):
            continue
        if any(name in call.params for call in metafunc._calls):
            continue
        run = activated(metafunc.config)
        from grpo_harness.settings import ROLES

        values = ROLES if name == "role" else run.settings.tasks
        metafunc.parametrize(name, values, indirect=True, scope="session")


def declared(item: pytest.Item) -> list[str]:
    """Return the rules that a test declares.

    They are those of its ``grpo`` marks. Without one, a test that uses the gate judges by one rule.
    Raises ``UsageError`` for an unknown rule.
    """
    from grpo_harness.rules import RULES, UNDECLARED

    if not uses(item, "gate"):
        return []
    names = [name for mark in item.iter_markers(MARKER) for name in mark.args]
    for name in names:
        if name not in RULES:
            raise pytest.UsageError(
                f"{item.nodeid}: @pytest.mark.grpo names {name!r}, and the gate's rules are "
                f"{', '.join(RULES)}"
            )
    return names or [UNDECLARED]


def records(item: pytest.Item) -> bool:
    """Tell whether a test can record a baseline."""
    return uses(item, "evaluation") and uses(item, "baseline")


def role_and_type(item: pytest.Item) -> tuple[Any, Any]:
    """Return the role and the task type that a test is parametrized by."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    return parameters.get("role"), parameters.get("task_type")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """While recording, run only tests that record, and one for each baseline.

    They are chosen among those that ``-k`` and ``-m`` leave, which may lack a baseline's first
    test.
    """
    if not config.getoption("grpo_record"):
        return
    recording: dict[tuple[Any, Any], pytest.Item] = {}
    for item in items:
        if records(item):
            recording.setdefault(role_and_type(item), item)
    kept = list(recording.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(tryfirst=True)  # before the terminal shows what was planned
def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the planned checks of the run: they share one risk of a false alarm."""
    from grpo_harness.plugin import activated

    if not any(uses(item, "grpo_session") for item in session.items):
        return
    run = activated(session.config)
    _try_rewards(run, session)
    run.planned = [name for item in session.items for name in declared(item)]
    run.files = len(session.items) if session.config.getoption("grpo_record") else 1


def _try_rewards(run: Run, session: pytest.Session) -> None:
    """Score one problem of each task that a test asks, before anything is loaded or drawn.

    Raises ``pytest.UsageError``, except in a worker of pytest-xdist, where each test says it.
    """
    from grpo_harness.rewards.functions import try_on

    if hasattr(session.config, "workerinput"):
        return
    named = {role_and_type(item)[1] for item in session.items if uses(item, "task_type")}
    for name, task in run.settings.tasks.items():
        if name in named:
            with usage_errors():
                try_on(task.rewards, task.source)


def asked(run: Run, items: list[pytest.Item]) -> list[tuple[str, str]]:
    """Return task type and role of each accuracy check, in the order of a table."""
    from grpo_harness.rules import UNDECLARED
    from grpo_harness.settings import ROLES

    found = Counter(
        role_and_type(item)
        for item in items
        if records(item) and {"accuracy", UNDECLARED} & set(declared(item))
    )
    return [(t, r) for t in run.settings.tasks for r in ROLES if (r, t) in found]
