"""The pytest plugin: options, fixtures, summary. The only package that imports pytest.

Here are the options and the hooks that plan a run; ``fixtures.py`` holds what a suite builds on,
``assertions.py`` the gate, ``summary.py`` what a person sees before and after. Nothing loads
torch before a fixture asks for a policy, so collecting stays quick.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# pytest finds hooks and fixtures among the names of the plugin's module.
from grpo_harness.plugin.fixtures import (  # noqa: F401
    all_task_types,
    base_policy,
    baseline,
    evaluate,
    evaluation,
    gate,
    grpo_session,
    policy,
    role,
    sample,
    task_type,
    trained_policy,
)
from grpo_harness.plugin.state import CHECKS, PROPERTY, RUN_SEED, SETTABLE, SETTINGS, fixtures_of
from grpo_harness.plugin.summary import (  # noqa: F401
    pytest_report_collectionfinish,
    pytest_report_header,
    pytest_report_teststatus,
    pytest_terminal_summary,
)

if TYPE_CHECKING:
    from grpo_harness.settings import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options; their defaults are in ``[tool.grpo-harness]`` and the README."""
    group = parser.getgroup("grpo-harness")
    add = group.addoption
    add("--grpo-base", metavar="POLICY", help="base policy: a folder, an embedded name or an id")
    add("--grpo-trained", metavar="POLICY", help="trained policy, likewise")
    add("--grpo-problems", type=int, metavar="N", help="problems per task type")
    add("--grpo-samples", type=int, metavar="K", help="completions per problem")
    add("--grpo-greedy", action="store_true", default=None, help="take the most likely answer")
    add("--grpo-device", metavar="DEVICE", help="auto, cpu, cuda, …")
    add("--grpo-dtype", metavar="DTYPE", help="auto, bfloat16, float16 or float32")
    add("--grpo-baselines", metavar="DIR", help="folder of the baselines")
    add("--grpo-seed", type=int, metavar="SEED", help="repeat the run that printed this seed")
    add("--grpo-sequential", action="store_true", help="stop drawing at a decision on accuracy")
    add("--grpo-strict", action="store_true", help="UNPROVEN fails, as for a release")
    add("--grpo-record", action="store_true", help="record baselines instead of judging")
    add("--grpo-accept-regression", metavar="WHY", help="record a lower accuracy, and say why")
    add("--grpo-prune", action="store_true", help="delete what no run asks for, and run nothing")
    add("--grpo-report", type=Path, metavar="DIR", help="write report.md, report.json, samples")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> pytest.ExitCode | None:
    """Prune instead of running tests, where that is asked."""
    if not config.getoption("grpo_prune"):
        return None
    from grpo_harness.baselines.file import BaselineError
    from grpo_harness.baselines.pruning import check_restorable, prune
    from grpo_harness.session import stale_entries

    settings = _resolved(config)
    found = stale_entries(settings)
    try:
        check_restorable(found)
    except BaselineError as error:
        raise pytest.UsageError(str(error)) from error
    prune(found)
    for entry in found:
        print(f"pruned {entry}")  # noqa: T201 - pytest has not set up its terminal yet
    print(f"{len(found)} stale entries below {settings.baselines}")  # noqa: T201
    return pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings and the run's seed once, before anything is collected."""
    config.stash[SETTINGS] = _resolved(config)
    reason = config.getoption("grpo_accept_regression")
    if reason is not None and not (config.getoption("grpo_record") and reason.strip()):
        raise pytest.UsageError(
            "--grpo-accept-regression says why a recording may be lower than the one before: "
            "give it a reason, together with --grpo-record"
        )
    if config.getoption("grpo_record"):
        from grpo_harness.baselines.file import BaselineError
        from grpo_harness.baselines.recording import check_recordable

        try:
            check_recordable(config.stash[SETTINGS].baselines, config.stash[SETTINGS].root)
        except BaselineError as error:
            raise pytest.UsageError(str(error)) from error
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[RUN_SEED] = workerinput[PROPERTY]
    else:
        seed = config.getoption("grpo_seed")
        config.stash[RUN_SEED] = secrets.randbelow(2**31) if seed is None else seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give every worker of pytest-xdist the one seed of the run."""
    node.workerinput[PROPERTY] = node.config.stash[RUN_SEED]


def _resolved(config: pytest.Config) -> Settings:
    from grpo_harness.settings import SettingsError, resolve

    _check_root(config)
    options = {name: config.getoption(f"grpo_{name}") for name in SETTABLE}
    try:
        return resolve(config.rootpath, config.invocation_params.dir, options)
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from error


_PATHS = ("--grpo-base", "--grpo-trained", "--grpo-baselines", "--grpo-report")


def _check_root(config: pytest.Config) -> None:
    """Raise ``UsageError`` where pytest took the value of an option for a place of tests.

    It looks for the project before it knows the options of plugins, so it takes the path in
    ``--grpo-trained /elsewhere`` for an argument of its own, and its settings would be those of
    whatever lies around that path. Behind an equals sign there is no such mistake.
    """
    if config.getoption("rootdir") or config.getoption("inifilename"):
        return
    words = [str(word) for word in config.invocation_params.args]
    cwd = config.invocation_params.dir
    taken = [
        (option, value)
        for option, value in pairwise(words)
        if option in _PATHS and (cwd / value).exists()
    ]
    if not taken:
        return
    places = [cwd]
    if config.args_source is config.ArgsSource.ARGS:
        named = (cwd / argument.partition("::")[0] for argument in config.args)
        places = [place for place in named if place.exists()] or places
    projects = {_project(place) for place in places}
    if _project(config.rootpath) in projects:
        return
    option, value = taken[0]
    raise pytest.UsageError(
        f"pytest takes {value} for a place of tests and {config.rootpath} for the project: "
        f"write {option}={value}"
    )


def _project(place: Path) -> Path:
    """Return the folder around ``place`` whose settings a run of its tests has."""
    from grpo_harness.settings import project_file

    place = place.resolve()
    file = project_file(place)
    return place if file is None else file.parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each policy and each task type that it asks for, but for its own choice."""
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = {name.strip() for mark in marks for name in _names(mark.args[0])}
    if "role" in metafunc.fixturenames and "role" not in chosen:
        from grpo_harness.settings import ROLES

        metafunc.parametrize("role", ROLES, indirect=True, scope="session")
    if "task_type" in metafunc.fixturenames and "task_type" not in chosen:
        tasks = metafunc.config.stash[SETTINGS].tasks
        metafunc.parametrize("task_type", tasks, indirect=True, scope="session")


def _names(argnames: str | Sequence[str]) -> Sequence[str]:
    return argnames.split(",") if isinstance(argnames, str) else argnames


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """While recording, run nothing but what records, and one test for each baseline.

    Of those that are left by ``-k`` and ``-m``: the first test of a baseline may not be.
    """
    if not config.getoption("grpo_record"):
        return
    recording: dict[tuple[object, object], pytest.Item] = {}
    for item in items:
        if {"evaluation", "baseline"} <= set(fixtures_of(item)):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            recording.setdefault((parameters["role"], parameters["task_type"]), item)
    kept = list(recording.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the checks that the run planned: they share one risk of a false alarm."""
    planned = sum("gate" in fixtures_of(item) for item in session.items)
    session.config.stash[CHECKS] = max(planned, 1)
