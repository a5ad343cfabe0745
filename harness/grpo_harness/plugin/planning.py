"""What a run plans: policies and task types of each test, its rules, and what is recorded.

A fixture is ours if pytest resolved its name to our function, whatever the name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

from grpo_harness.plugin.state import Run, usage_errors
from grpo_harness.settings import ROLES

_FIXTURES = "grpo_harness.plugin.fixtures"
_CANDIDATE = "grpo_candidate"
_RECIPE, _BUILT_IN = "grpo_recipe", "built_in_recipes"
_OF_ONES_OWN = ("small_policy", "grpo_log")
"""Fixtures of tests that the built-in recipes are not for."""

NONE = -1
"""The value of ``grpo_candidate`` that means the base policy."""

MARKER = "grpo"

if TYPE_CHECKING:
    from grpo_harness.policy import PolicyName
    from grpo_harness.served import Role


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

    open_ones = {
        name
        for name in ("role", _CANDIDATE, "task_type", _RECIPE)
        if uses(metafunc.definition, name)
        and not any(name in call.params for call in metafunc._calls)
    }
    if not open_ones:
        return
    settings = activated(metafunc.config).settings

    def run_for(names: str, values: Iterable[Any], ids: Iterable[str]) -> None:
        metafunc.parametrize(names, list(values), ids=list(ids), indirect=True, scope="session")

    labels = settings.labels()
    several = len(labels) > 1 and _CANDIDATE in open_ones
    if several and "role" in open_ones and not uses(metafunc.definition, "trained_policy"):
        # One parameter for both: pytest groups tests by each, and would split those of a candidate.
        run_for(_CANDIDATE, [NONE, *range(len(labels))], ["base", *labels])
    else:
        if "role" in open_ones:
            run_for("role", ROLES, ROLES)
        if several:
            run_for(_CANDIDATE, range(len(labels)), labels)
    if "task_type" in open_ones:
        run_for("task_type", settings.tasks, settings.tasks)
    own = settings.recipes
    if _RECIPE in open_ones and (own or not _is_of_ones_own(metafunc.definition)):
        from grpo_harness.training.builtin import BUILT_IN

        run_for(_RECIPE, own or BUILT_IN, [path.stem for path in own] or BUILT_IN)


def _is_drawn_elsewhere(config: pytest.Config, item: pytest.Item) -> bool:
    """Tell whether a server or a cluster draws the policy that a test runs for."""
    from grpo_harness.plugin import activated

    return activated(config).settings.engine == "ray" or _is_served(config, item)


def _is_served(config: pytest.Config, item: pytest.Item) -> bool:
    """Tell whether the policy that a test runs for is drawn by a server."""
    from grpo_harness.plugin import activated

    settings = activated(config).settings
    role, number, _ = judged(item)
    return settings.policy(role or "trained", number) in settings.served


def _is_of_ones_own(item: Any) -> bool:
    return any(uses(item, name) for name in _OF_ONES_OWN)


def declared(item: pytest.Item) -> list[str]:
    """Return the rules that a test declares.

    They are those of its ``grpo`` marks. Without one, a test that uses the gate judges by one rule.
    Raises ``UsageError`` for an unknown rule.
    """
    if not uses(item, "gate"):
        return []
    from grpo_harness.rules import RULES, UNDECLARED

    names = [name for mark in item.iter_markers(MARKER) for name in mark.args]
    for name in names:
        if name not in RULES:
            raise pytest.UsageError(
                f"{item.nodeid}: @pytest.mark.grpo names {name!r}, and the gate's rules are "
                f"{', '.join(RULES)}"
            )
    return names or [UNDECLARED]


def records(item: pytest.Item) -> str:
    """Return what a test can record: a baseline, the throughput, the admission, or nothing."""
    if uses(item, "evaluation") and uses(item, "baseline"):
        return "baseline"
    return next((name for name in ("throughput", "admission") if uses(item, name)), "")


def judged(item: pytest.Item) -> tuple[Any, int, Any]:
    """Return the role, the number of the policy in it and the task type that a test runs for."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    number = parameters.get(_CANDIDATE, 0)
    role = parameters.get("role", role_of(number) if _CANDIDATE in parameters else None)
    return role, 0 if role == "base" else number, parameters.get("task_type")


def role_of(candidate: int) -> Role:
    """Return the role of the policy that ``grpo_candidate`` numbers."""
    return "base" if candidate == NONE else "trained"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that judge a training, rewards, slices or tasks where there are none.

    While recording, run only tests that record, and one for each baseline. They are chosen among
    those that ``-k`` and ``-m`` leave, which may lack a baseline's first test. While only stored
    samples are scored, run only tests that need no more. A test that needs weights is left out for
    a policy that is served, or drawn by a cluster, which has none here.
    """
    if config.getoption("grpo_record"):
        recording: dict[tuple[str, Any], pytest.Item] = {}
        for item in items:
            if (what := records(item)) and not _is_out_of_place(config, item):
                recording.setdefault((what, judged(item)), item)
        kept = list(recording.values())
    elif config.getoption("grpo_rescore"):
        kept = [item for item in items if _rescores(item) and not _idle(config, item)]
    else:
        kept = [item for item in items if not _idle(config, item)]
    if left := set(items) - set(kept):
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


def _rescores(item: pytest.Item) -> bool:
    """Tell whether a test asks for evaluations, and for no weights."""
    return uses(item, "evaluate") and not (uses(item, "engine") or uses(item, "sample"))


def _is_out_of_place(config: pytest.Config, item: pytest.Item) -> bool:
    """Tell whether a test needs weights that are elsewhere, or a server that there is not."""
    if uses(item, "admission"):
        return not _is_served(config, item)
    return uses(item, "engine") and _is_drawn_elsewhere(config, item)


def _idle(config: pytest.Config, item: pytest.Item) -> bool:
    """Tell whether a test judges what there is not: a training, a recipe, parts of a task."""
    from grpo_harness.plugin import activated

    if uses(item, "grpo_log") and activated(config).settings.training is None:
        return True
    if uses(item, _RECIPE) and _is_of_ones_own(item):
        return not activated(config).settings.recipes
    if uses(item, _BUILT_IN):
        return bool(activated(config).settings.recipes)
    if _is_out_of_place(config, item):
        return True
    names = set(declared(item))
    if not names:
        return False
    from grpo_harness.rules import PARTS, TOGETHER

    settings = activated(config).settings
    task = settings.tasks.get(judged(item)[2])
    if task is None:
        return names == {TOGETHER} and len(settings.answered()) < 2
    return names <= PARTS and not any(map(task.asks, names))


@pytest.hookimpl(tryfirst=True)  # before the terminal shows what was planned
def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the planned checks of the run: they share one risk of a false alarm."""
    from grpo_harness.plugin import activated

    if not any(uses(item, "grpo_session") for item in session.items):
        return
    run = activated(session.config)
    _try_rewards(run, session)
    total = len(run.settings.answered()) > 1 and not run.settings.sequential
    run.planned = [
        name
        for item in session.items
        for name in declared(item)
        if (task := run.settings.tasks.get(judged(item)[2])) is None or task.asks(name)
        if total or name != "total"
    ]
    baselines = [item for item in session.items if uses(item, "baseline")]
    run.files = len(baselines) if session.config.getoption("grpo_record") else 1


def _try_rewards(run: Run, session: pytest.Session) -> None:
    """Score one problem of each task that a test asks, before anything is loaded or drawn.

    Raises ``pytest.UsageError``, except in a worker of pytest-xdist, where each test says it.
    """
    from grpo_harness.rewards.trials import try_on

    if hasattr(session.config, "workerinput"):
        return
    named = {judged(item)[2] for item in session.items if uses(item, "task_type")}
    for name, task in run.settings.tasks.items():
        if name in named:
            with usage_errors():
                try_on(task.rewards, task.source)


def asked(run: Run, items: list[pytest.Item]) -> list[tuple[str, str, PolicyName]]:
    """Return task type, role and policy of each row that is planned, in the order of a table.

    They are those whose accuracy is judged, or the reward where nothing can be correct.
    """
    from grpo_harness.rules import UNDECLARED

    def planned(task_type: Any) -> set[str]:
        task = run.settings.tasks.get(task_type)
        return {"accuracy" if task is None or task.asks("accuracy") else "reward", UNDECLARED}

    found = {
        judged(item)
        for item in items
        if records(item) == "baseline" and planned(judged(item)[2]) & set(declared(item))
    }
    return [
        (task_type, role, name)
        for task_type in run.settings.tasks
        for role, number, name in run.settings.policies()
        if (role, number, task_type) in found
    ]
