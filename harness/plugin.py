"""The pytest plugin: options, fixtures, summary. The only module that imports pytest.

In reading order: the options; the fixtures that a suite builds on; the hooks that plan the run,
carry its rows and show them. Nothing here loads torch before a fixture asks for a
policy, so collecting stays quick.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.baseline import Baseline
    from harness.checks import Check, Rules
    from harness.evaluation import Evaluation
    from harness.policy import Policy
    from harness.sampling import Progress, Sample
    from harness.session import Session
    from harness.settings import Settings
    from harness.tasks import TaskType

ROLES = ("base", "trained")

_PROPERTY = "grpo-harness"
"""Name of the test properties that carry rows from the workers to the report, and into JUnit."""

_settings: pytest.StashKey[Settings] = pytest.StashKey()
_run_seed: pytest.StashKey[int] = pytest.StashKey()
_planned: pytest.StashKey[int] = pytest.StashKey()


# --- options ---------------------------------------------------------------------------------


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
    add("--grpo-strict", action="store_true", help="UNPROVEN fails, as for a release")
    add("--grpo-record", action="store_true", help="record baselines instead of judging")
    add("--grpo-report", type=Path, metavar="DIR", help="write report.md, report.json, samples")


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings and the run's seed once, before anything is collected."""
    from harness.settings import SettingsError, resolve

    names = ("base", "trained", "problems", "samples", "greedy", "device", "dtype", "baselines")
    options = {name: config.getoption(f"grpo_{name}") for name in names}
    try:
        config.stash[_settings] = resolve(config.rootpath, config.invocation_params.dir, options)
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from error
    if config.getoption("grpo_record"):
        from harness.baseline import BaselineError, check_recordable

        try:
            check_recordable(config.stash[_settings].baselines)
        except BaselineError as error:
            raise pytest.UsageError(str(error)) from error
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[_run_seed] = workerinput[_PROPERTY]
    else:
        seed = config.getoption("grpo_seed")
        config.stash[_run_seed] = secrets.randbelow(2**31) if seed is None else seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give every worker of pytest-xdist the one seed of the run."""
    node.workerinput[_PROPERTY] = node.config.stash[_run_seed]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show what the run is about, and what it takes to repeat it."""
    lines = (f"{name} {value}" for name, value in _header(config).items())
    return [f"grpo-harness: {', '.join(lines)}"]


def _header(config: pytest.Config) -> dict[str, Any]:
    settings = config.stash[_settings]
    return {
        "base": settings.base,
        "trained": settings.trained,
        "problems": settings.problems,
        "samples": settings.samples,
        "sampling": " ".join(f"{k}={v}" for k, v in settings.sampling.asdict().items()),
        "baselines": str(settings.baselines),
        "seed": config.stash[_run_seed],
    }


# --- fixtures --------------------------------------------------------------------------------


@contextmanager
def _clearly() -> Iterator[None]:
    """Let an error that is meant for a person reach them as that one line."""
    from harness.errors import HarnessError

    try:
        yield
    except HarnessError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def grpo_session(pytestconfig: pytest.Config) -> Session:
    """Share policies, evaluations and baselines between the tests of a run."""
    from harness.session import Session
    from harness.store import Store

    report = pytestconfig.getoption("grpo_report")
    if report is None:
        assert pytestconfig.cache is not None
        samples = Path(pytestconfig.cache.mkdir("grpo-harness"))
    else:
        samples = report / "samples"
    return Session(
        settings=pytestconfig.stash[_settings],
        run_seed=pytestconfig.stash[_run_seed],
        checks=pytestconfig.stash[_planned],
        store=Store(samples),
        progress=partial(_progress, pytestconfig),
    )


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
    from harness.tasks import task_types

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
        _carry(request.node, "evaluation", evaluation.summary())
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
        with _clearly():
            path = grpo_session.record(policy, task_type)
        _carry(request.node, "recorded", {"path": str(path)})
        pytest.skip(f"recorded {path}")
    return evaluate(policy, task_type)


@pytest.fixture
def baseline(
    request: pytest.FixtureRequest, grpo_session: Session, role: str, evaluation: Evaluation
) -> Baseline:
    """Load the baseline that ``evaluation`` is judged by; a missing one is an error."""
    from harness.baseline import BaselineError
    from harness.checks import Check

    try:
        return grpo_session.baseline(role, evaluation)
    except BaselineError as error:
        check = Check("baseline", evaluation.task_type.name, evaluation.policy, "none", str(error))
        _carry(request.node, "check", check.asdict())
        pytest.fail(check.message(), pytrace=False)


class Gate:
    """The gate's rules as assertions: each judges, reports, and fails the test on harm.

    FAIL and ERROR fail the test. UNPROVEN is reported and counted beside passed and failed, and
    fails it under ``--grpo-strict``.
    """

    def __init__(self, rules: Rules, node: pytest.Item, *, strict: bool, again: str) -> None:
        self._rules = rules
        self._node = node
        self._strict = strict
        self._again = again

    def accuracy(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when the share of correct completions has dropped."""
        return self._assert(self._rules.accuracy(evaluation, baseline))

    def length(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when completions have become longer or shorter."""
        return self._assert(self._rules.length(evaluation, baseline))

    def truncation(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when more completions are cut off by the token limit."""
        return self._assert(self._rules.truncation(evaluation, baseline))

    def unparsable(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when more completions hold no readable answer."""
        return self._assert(self._rules.unparsable(evaluation, baseline))

    def improvement(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Fail when the trained policy is proven worse than its base; pass when proven better."""
        return self._assert(self._rules.improvement(trained, base))

    def no_loss(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Fail when the trained policy is worse than its base, or is its base."""
        return self._assert(self._rules.no_loss(trained, base))

    def _assert(self, check: Check) -> Check:
        _carry(self._node, "check", check.asdict())
        bad = ("FAIL", "ERROR", "UNPROVEN") if self._strict else ("FAIL", "ERROR")
        if check.name in bad:
            pytest.fail(f"{check.message()}\n  again: {self._again}", pytrace=False)
        return check


@pytest.fixture
def gate(request: pytest.FixtureRequest, grpo_session: Session) -> Gate:
    """Judge evaluations against baselines and each other, all checks of the run together."""
    node = request.node
    return Gate(
        grpo_session.rules,
        node,
        strict=bool(request.config.getoption("grpo_strict")),
        again=f"pytest '{node.nodeid}' --grpo-seed {grpo_session.run_seed}",
    )


def _carry(node: pytest.Item, kind: str, row: dict[str, Any]) -> None:
    node.user_properties.append((_PROPERTY, json.dumps({"kind": kind, **row})))


# --- hooks: plan, carry, show ----------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each policy and each task type that it asks for."""
    if "role" in metafunc.fixturenames:
        metafunc.parametrize("role", ROLES, indirect=True, scope="session")
    if "task_type" in metafunc.fixturenames:
        tasks = metafunc.config.stash[_settings].tasks
        metafunc.parametrize("task_type", tasks, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """While recording, run nothing but what records, and one test for each baseline."""
    if not config.getoption("grpo_record"):
        return
    recording: dict[tuple[object, object], pytest.Item] = {}
    for item in items:
        if {"evaluation", "baseline"} <= set(_fixtures(item)):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            recording.setdefault((parameters["role"], parameters["task_type"]), item)
    kept = list(recording.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the checks that the run planned: they share one risk of a false alarm."""
    planned = sum("gate" in _fixtures(item) for item in session.items)
    session.config.stash[_planned] = max(planned, 1)


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport,
) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Count a check that proves nothing as unproven, not as passed."""
    if isinstance(report, pytest.TestReport) and report.when == "call" and report.passed:
        for row in _rows(report):
            if row["kind"] == "check" and row["name"] == "UNPROVEN":
                return "unproven", "u", ("UNPROVEN", {"yellow": True})
    return None


def _rows(report: pytest.TestReport) -> Iterator[dict[str, Any]]:
    for name, value in report.user_properties:
        if name == _PROPERTY:
            yield json.loads(str(value))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, and write them where ``--grpo-report`` says."""
    reports = [
        report
        for category in terminalreporter.stats.values()
        for report in category
        if isinstance(report, pytest.TestReport)
    ]
    rows = [row for report in reports for row in _rows(report)]
    if not rows:
        return
    recorded = sorted({row["path"] for row in rows if row["kind"] == "recorded"})
    if recorded:
        terminalreporter.section("grpo-harness: baselines recorded")
        for path in recorded:
            terminalreporter.line(path)
        terminalreporter.line("Read the difference and commit it: it is what later runs must meet.")
    from harness.report import Report, write_summary

    settings = config.stash[_settings]
    found = Report(_header(config), settings.tasks, (settings.base, settings.trained))
    for row in rows:
        found.add(row)
    if not found:
        return
    terminalreporter.section("grpo-harness")
    for line in found.terminal():
        terminalreporter.line(line)
    if folder := config.getoption("grpo_report"):
        for path in found.write(Path(folder)):
            terminalreporter.line(f"written: {path}")
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        write_summary(found, target)
