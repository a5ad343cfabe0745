"""The fixtures that a suite builds on."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from grpo_harness.plugin.assertions import Gate
from grpo_harness.plugin.state import CHECKS, RUN_SEED, SETTINGS, carry

if TYPE_CHECKING:
    from grpo_harness.baselines.file import Baseline
    from grpo_harness.engines.engine import Progress, Sample
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.policy.policy import Policy
    from grpo_harness.session import Session
    from grpo_harness.tasks import TaskType


@contextmanager
def _clearly() -> Iterator[None]:
    """Let an error that is meant for a person reach them as that one line."""
    from grpo_harness.errors import HarnessError

    try:
        yield
    except HarnessError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def grpo_session(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Share policies, evaluations and baselines between the tests of a run."""
    from grpo_harness.baselines.provenance import code_digest
    from grpo_harness.reruns import Attempts
    from grpo_harness.session import Session
    from grpo_harness.store import Store

    if pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        assert pytestconfig.cache is not None
        cache = Path(pytestconfig.cache.mkdir("grpo-harness"))
    else:  # switched off, and with it all memory of earlier runs
        cache = tmp_path_factory.mktemp("grpo-harness")
    report = pytestconfig.getoption("grpo_report")
    return Session(
        settings=pytestconfig.stash[SETTINGS],
        run_seed=pytestconfig.stash[RUN_SEED],
        checks=pytestconfig.stash[CHECKS],
        code=code_digest(_own_plugins(pytestconfig)),
        store=Store(report / "samples" if report else cache),
        attempts=Attempts(cache),
        progress=partial(_progress, pytestconfig),
    )


def _own_plugins(config: pytest.Config) -> Iterator[Path]:
    """Yield the project's conftest.py files and the plugins that were not installed.

    All of the project's, not those that were loaded: the same test is a rerun of itself whichever
    others were named beside it.
    """
    skipped = config.getini("norecursedirs")
    for folder, below, files in os.walk(config.rootpath):
        below[:] = [name for name in below if not any(fnmatch(name, skip) for skip in skipped)]
        if "conftest.py" in files:
            yield Path(folder, "conftest.py")
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    for plugin in config.pluginmanager.get_plugins():
        file = Path(getattr(plugin, "__file__", None) or "")
        ours = file.is_file() and not any(file.is_relative_to(folder) for folder in installed)
        if ours and file.name != "conftest.py":
            yield file


@contextmanager
def _progress(config: pytest.Config, title: str, samples: int) -> Iterator[Progress]:
    """Show a bar on a terminal, and nothing in a log: pytest's capture is lifted for it."""
    from tqdm import tqdm

    capture = config.pluginmanager.getplugin("capturemanager")
    with (
        capture.global_and_fixture_disabled(),
        tqdm(total=samples, desc=title, unit=" samples", leave=False, disable=None) as bar,
    ):
        yield bar.update


@pytest.fixture(scope="session")
def base_policy(grpo_session: Session) -> Policy:
    """Load the base policy."""
    with _clearly():
        return grpo_session.policy("base")


@pytest.fixture(scope="session")
def trained_policy(grpo_session: Session) -> Policy:
    """Load the GRPO-trained policy."""
    with _clearly():
        return grpo_session.policy("trained")


@pytest.fixture(scope="session")
def role(request: pytest.FixtureRequest) -> str:
    """Name the role that ``policy`` plays: ``base`` or ``trained``. Parametrized."""
    return str(request.param)


@pytest.fixture(scope="session")
def policy(role: str, grpo_session: Session) -> Policy:
    """Load each of the two policies in turn. Parametrized, by its role."""
    with _clearly():
        return grpo_session.policy(role)


@pytest.fixture(scope="session")
def task_type(request: pytest.FixtureRequest) -> TaskType:
    """Take each configured task type in turn. Parametrized."""
    from grpo_harness.tasks import task_types

    return task_types()[request.param]


@pytest.fixture(scope="session")
def all_task_types(grpo_session: Session) -> list[TaskType]:
    """List the configured task types."""
    return grpo_session.task_types


@pytest.fixture(scope="session")
def sample(grpo_session: Session) -> Callable[..., list[Sample]]:
    """Return a function that answers prompts: ``sample(policy, prompts, seed=0)``."""
    return grpo_session.sample


@pytest.fixture
def evaluate(
    request: pytest.FixtureRequest, grpo_session: Session
) -> Callable[[Policy, TaskType], Evaluation]:
    """Return a function that evaluates a policy on a task type, once a session."""

    def evaluate(policy: Policy, task_type: TaskType) -> Evaluation:
        with _clearly():
            evaluation = grpo_session.evaluation(policy, task_type)
        carry(request.node, "evaluation", evaluation.summary())
        return evaluation

    return evaluate


@pytest.fixture
def evaluation(
    request: pytest.FixtureRequest,
    grpo_session: Session,
    policy: Policy,
    task_type: TaskType,
    evaluate: Callable[[Policy, TaskType], Evaluation],
) -> Evaluation:
    """Evaluate ``policy`` on ``task_type``; while recording, record its baseline instead."""
    if request.config.getoption("grpo_record") and "baseline" in request.fixturenames:
        reason = request.config.getoption("grpo_accept_regression")
        with _clearly():
            recording = grpo_session.record(
                request.getfixturevalue("role"), policy, task_type, reason
            )
        row = {"path": str(recording.path), "notes": recording.notes}
        carry(request.node, "recorded", row)
        pytest.skip(f"recorded {recording.path}")
    return evaluate(policy, task_type)


@pytest.fixture
def baseline(
    request: pytest.FixtureRequest, grpo_session: Session, role: str, evaluation: Evaluation
) -> Baseline:
    """Load the baseline that ``evaluation`` is judged by; a missing one is an error."""
    from grpo_harness.baselines.file import BaselineError
    from grpo_harness.rules import Check

    try:
        return grpo_session.baseline(role, evaluation)
    except BaselineError as error:
        check = Check("baseline", evaluation.task_type.name, evaluation.policy, "none", str(error))
        carry(request.node, "check", check.asdict())
        pytest.fail(check.message(), pytrace=False)


@pytest.fixture
def gate(request: pytest.FixtureRequest, grpo_session: Session) -> Gate:
    """Judge evaluations against baselines and each other, all checks of the run together."""
    return Gate(grpo_session, request.node)
