"""The fixtures for suites."""

from __future__ import annotations

import os
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from grpo_harness.plugin.assertions import Gate
from grpo_harness.plugin.options import draws
from grpo_harness.plugin.planning import declared, role_of, uses
from grpo_harness.plugin.state import RUN, carry, carry_check, carry_notices, clearly

if TYPE_CHECKING:
    from grpo_harness.admission import Admission
    from grpo_harness.baselines.file import Baseline
    from grpo_harness.engines.engine import Engine, Progress, Sample
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.logs.read import Log
    from grpo_harness.logs.recorded import Recorded
    from grpo_harness.policy import Policy
    from grpo_harness.session import Session
    from grpo_harness.tasks import Source
    from grpo_harness.throughput import Race
    from grpo_harness.training.files import Recipe


@pytest.fixture(scope="session")
def grpo_session(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    """Share policies, evaluations and baselines between the tests of a run."""
    from grpo_harness.baselines.provenance import code_digest
    from grpo_harness.reruns import Reruns
    from grpo_harness.session import Session
    from grpo_harness.store import FILE, Store

    cache = _cache(pytestconfig, tmp_path_factory)
    run = pytestconfig.stash[RUN]
    session = Session(
        settings=run.settings,
        sizing=run.sizing,
        run_seed=run.seed,
        shares=run.shares(),
        code=code_digest(_own_plugins(pytestconfig)),
        store=Store(cache / FILE, draws=draws(pytestconfig), run=_run_id(pytestconfig)),
        reruns=Reruns(cache),
        progress=partial(_progress, pytestconfig),
        evaluated=_kept_in(pytestconfig),
    )
    yield session
    session.close()


def _cache(config: pytest.Config, temporary: pytest.TempPathFactory) -> Path:
    if config.pluginmanager.hasplugin("cacheprovider"):
        assert config.cache is not None
        return Path(config.cache.mkdir("grpo-harness"))
    # Switched off: earlier runs are not remembered.
    return temporary.mktemp("grpo-harness")


def _run_id(config: pytest.Config) -> str:
    """Return what names this run: the same in all workers of pytest-xdist."""
    worker = getattr(config, "workerinput", {})
    return str(worker.get("testrunuid") or uuid.uuid4().hex)


def _kept_in(config: pytest.Config) -> Callable[[Evaluation], None]:
    """Return a function that writes an evaluation's samples into the report, if there is one."""
    folder = config.getoption("grpo_report")
    if folder is None:
        return lambda _: None
    from grpo_harness.report.files import write_samples

    return partial(write_samples, config.invocation_params.dir / folder)


def _own_plugins(config: pytest.Config) -> Iterator[Path]:
    """Yield the project's conftest.py files and the plugins that were not installed.

    All conftest.py files count, not only the loaded ones: a test is a rerun of itself whichever
    other tests are selected.
    """
    skipped = config.getini("norecursedirs")
    for folder, below, files in os.walk(config.rootpath):
        below[:] = [name for name in below if not any(fnmatch(name, skip) for skip in skipped)]
        if "conftest.py" in files:
            yield Path(folder, "conftest.py")
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    package = Path(__file__).parents[1]
    for plugin in config.pluginmanager.get_plugins():
        file = Path(getattr(plugin, "__file__", None) or "")
        elsewhere = not any(file.is_relative_to(folder) for folder in (*installed, package))
        if file.is_file() and elsewhere and file.name != "conftest.py":
            yield file


@contextmanager
def _progress(config: pytest.Config, title: str, samples: int) -> Iterator[Progress]:
    """Show a progress bar; pytest's capture is suspended for it."""
    from grpo_harness.session import progress_bar

    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), progress_bar(title, samples) as progress:
        yield progress


@pytest.fixture(scope="session")
def base_policy(grpo_session: Session) -> Policy:
    """Return the base policy."""
    return clearly(lambda: grpo_session.policy("base"))


@pytest.fixture(scope="session")
def grpo_candidate(request: pytest.FixtureRequest) -> int:
    """Number the trained policy of a test, from 0; -1 is the base. Parametrized if several."""
    return int(getattr(request, "param", 0))


@pytest.fixture(scope="session")
def trained_policy(grpo_candidate: int, grpo_session: Session) -> Policy:
    """Return the GRPO-trained policy, or each of several candidates in turn."""
    return clearly(lambda: grpo_session.policy("trained", grpo_candidate))


@pytest.fixture(scope="session")
def role(request: pytest.FixtureRequest, grpo_candidate: int) -> str:
    """Name the role that ``policy`` plays: ``base`` or ``trained``. Parametrized."""
    return str(getattr(request, "param", role_of(grpo_candidate)))


@pytest.fixture(scope="session")
def policy(role: str, grpo_candidate: int, grpo_session: Session) -> Policy:
    """Return the base policy and each trained one in turn. Parametrized, by its role."""
    return clearly(lambda: grpo_session.policy(role, grpo_candidate))


@pytest.fixture(scope="session")
def admission(request: pytest.FixtureRequest, policy: Policy, grpo_session: Session) -> Admission:
    """Tell whether the server of ``policy`` serves it: proven once, by the checkpoint's weights.

    While recording, record what the weights say instead.
    """
    from grpo_harness.admission import admit, record

    if request.config.getoption("grpo_record"):
        pytest.skip(f"recorded {clearly(lambda: record(grpo_session, policy))}")
    return clearly(lambda: admit(grpo_session, policy))


@pytest.fixture
def engine(policy: Policy, grpo_session: Session) -> Engine:
    """Return the engine of ``policy``, with its weights in memory."""

    def loaded() -> Engine:
        engine = grpo_session.engine(policy)
        return engine.__enter__()

    # It stays open: the session releases the weights if another policy needs the memory.
    return clearly(loaded)


@pytest.fixture
def throughput(policy: Policy, engine: Engine, grpo_session: Session) -> Race:
    """Return the race of the policy's sampler against the floor, on the longest prompts."""
    from grpo_harness.throughput import Race

    def race() -> Race:
        def length(source: Source) -> int:
            return len(grpo_session.questions(policy, source).prompts[0])

        longest = max(grpo_session.task_types, key=length)
        return Race(grpo_session.local(policy), grpo_session.questions(policy, longest))

    return clearly(race)


@pytest.fixture
def throughput_file(role: str, policy: Policy, grpo_session: Session) -> Path:
    """Return the file of how fast ``policy`` draws, or of the configured policy of its role."""
    from grpo_harness.throughput import path_of

    settings = grpo_session.settings
    names = settings.recorded_as(role, policy.checkpoint.name)
    return path_of(settings.baselines, [name.slug for name in names])


@pytest.fixture(scope="session")
def task_type(request: pytest.FixtureRequest) -> Source:
    """Return each configured task type in turn. Parametrized."""
    return request.config.stash[RUN].settings.tasks[request.param].source


@pytest.fixture(scope="session")
def all_task_types(grpo_session: Session) -> list[Source]:
    """Return the configured task types."""
    return grpo_session.task_types


@pytest.fixture(scope="session")
def sample(grpo_session: Session) -> Callable[..., list[Sample]]:
    """Return a function that draws a completion per prompt: ``sample(policy, prompts, seed=0)``."""

    def sample(policy: Policy, prompts: list[str], *, seed: int = 0) -> list[Sample]:
        return clearly(lambda: grpo_session.sample(policy, prompts, seed=seed))

    return sample


@pytest.fixture
def evaluate(
    request: pytest.FixtureRequest, grpo_session: Session
) -> Callable[[Policy, Source], Evaluation]:
    """Return a function that evaluates a policy on a task type, once per session."""

    def evaluate(policy: Policy, task_type: Source) -> Evaluation:
        evaluation = clearly(lambda: grpo_session.evaluation(policy, task_type))
        carry(request.node, "evaluation", evaluation.summary())
        if request.config.stash[RUN].settings.history is not None:
            from grpo_harness.history.measured import measured

            carry(request.node, "measured", measured(evaluation))
        carry_notices(request.node, grpo_session)
        return evaluation

    return evaluate


@pytest.fixture
def evaluation(
    request: pytest.FixtureRequest,
    grpo_session: Session,
    policy: Policy,
    task_type: Source,
    evaluate: Callable[[Policy, Source], Evaluation],
) -> Evaluation:
    """Evaluate ``policy`` on ``task_type``; while recording, record its baseline instead.

    If the test also uses the baseline, and the two cannot be compared, nothing is drawn.
    """
    if not uses(request.node, "baseline"):
        return evaluate(policy, task_type)
    if request.config.getoption("grpo_record"):
        reason = request.config.getoption("grpo_accept_regression")
        role, files = request.getfixturevalue("role"), request.config.stash[RUN].files
        recording = clearly(lambda: grpo_session.record(role, policy, task_type, files, reason))
        row = {"path": str(recording.path), "notes": recording.notes}
        carry(request.node, "recorded", row)
        pytest.skip(f"recorded {recording.path}")
    baseline = request.getfixturevalue("baseline")
    _comparable(request.node, grpo_session, policy, task_type, baseline)
    return evaluate(policy, task_type)


def _comparable(
    node: pytest.Item, session: Session, policy: Policy, task_type: Source, baseline: Baseline
) -> None:
    """Fail the test, before anything is drawn, if its checks would be an ERROR."""
    from grpo_harness.baselines.file import BaselineError
    from grpo_harness.gate.bounds import MINIMUM_PROBLEMS

    questions = clearly(lambda: session.questions(policy, task_type))
    n, reason = len(questions.problems), ""
    if n < MINIMUM_PROBLEMS:
        reason = f"{n} problems are too few to judge, the floor is {MINIMUM_PROBLEMS}"
    else:
        try:
            baseline.select(questions)
        except BaselineError as error:
            reason = str(error)
        else:
            reason = session.nothing_to_lose(questions, baseline, declared(node))
    if reason:
        _cannot_judge(node, policy, task_type, f"baseline of {baseline.policy}", reason)


def _cannot_judge(
    node: pytest.Item, policy: Policy, task_type: Source, reference: str, reason: str
) -> NoReturn:
    """Fail a test with an ERROR for each rule that it declares."""
    from grpo_harness.checks import opened
    from grpo_harness.rules import RULES, UNDECLARED
    from grpo_harness.text import plain

    names = [name for name in declared(node) if name != UNDECLARED] or ["accuracy"]
    checks = [opened(RULES[name], task_type.name, policy.name, reference, reason) for name in names]
    for check in checks:
        carry_check(node, check.asdict())
    pytest.fail(plain(checks[0].message()), pytrace=False)


@pytest.fixture
def baseline(
    request: pytest.FixtureRequest,
    grpo_session: Session,
    role: str,
    policy: Policy,
    task_type: Source,
) -> Baseline:
    """Load the baseline to judge ``policy`` by on ``task_type``; a missing one is an error."""
    from grpo_harness.baselines.file import BaselineError

    try:
        return grpo_session.baseline(role, policy, task_type.name)
    except BaselineError as error:
        reason = str(error)
    _cannot_judge(request.node, policy, task_type, "none", reason)


@pytest.fixture
def baselines(grpo_session: Session, role: str, policy: Policy) -> list[Baseline]:
    """Load the baselines to judge ``policy`` by on every task whose answers are judged."""
    names = [task.source.name for task in grpo_session.settings.answered()]
    return clearly(lambda: [grpo_session.baseline(role, policy, name) for name in names])


@pytest.fixture
def evaluations(
    request: pytest.FixtureRequest,
    grpo_session: Session,
    policy: Policy,
    evaluate: Callable[[Policy, Source], Evaluation],
) -> list[Evaluation]:
    """Evaluate ``policy`` on every task whose answers are judged.

    If the test also uses ``baselines``, they are loaded before anything is drawn.
    """
    if uses(request.node, "baselines"):
        request.getfixturevalue("baselines")
    return [evaluate(policy, task.source) for task in grpo_session.settings.answered()]


@pytest.fixture
def gate(request: pytest.FixtureRequest, grpo_session: Session) -> Gate:
    """Return the gate, which judges evaluations against baselines and each other."""
    return Gate(grpo_session, request.node, declared(request.node))


@pytest.fixture(scope="session")
def grpo_recipe(request: pytest.FixtureRequest) -> Recipe:
    """Return each recipe that the setting ``recipe`` names, or else each built-in one.

    With ``small_policy`` or ``grpo_log`` a test is about recipes that are named, and is left out
    where there are none.
    """
    from grpo_harness.training.files import load

    recipe = getattr(request, "param", None)
    if recipe is None:
        pytest.skip("no recipe: set recipe in [tool.grpo-harness]")
    return clearly(lambda: load(recipe))


@pytest.fixture(scope="session")
def built_in_recipes() -> None:
    """Mark a test of the built-in recipes: it is left out where the project names its own."""


@pytest.fixture(scope="session")
def small_policy(
    grpo_recipe: Recipe,
    grpo_session: Session,
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Return the policy of a recipe's smoke run: ``recipe_policy``, or the recipe's own, small."""
    named = grpo_session.settings.table.recipe_policy
    if named is not None:
        return named

    def small() -> str:
        from grpo_harness.policy import load
        from grpo_harness.training.shrunk import shrink

        policy = load(grpo_recipe.policy)
        folder = _cache(pytestconfig, tmp_path_factory) / "small"
        return str(shrink(policy, folder / str(policy.fingerprint)))

    return clearly(small)


@pytest.fixture(scope="session")
def grpo_log(grpo_session: Session) -> Log:
    """Return the log of the training run that ``training`` names."""
    from grpo_harness.logs.read import read

    place = grpo_session.settings.training
    if place is None:
        pytest.skip("no training: set training in [tool.grpo-harness], or --grpo-training DIR")
    return clearly(lambda: read(place))


@pytest.fixture(scope="session")
def recorded_runs(grpo_log: Log, grpo_session: Session) -> Recorded:
    """Return the recorded runs of the same training."""
    from grpo_harness.logs.recorded import TRAINING, load, path_of

    name = grpo_log.training or TRAINING
    return clearly(lambda: load(path_of(name, grpo_session.settings.baselines)))
