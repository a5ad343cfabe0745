"""The pytest plugin: the only package that imports pytest. It does nothing unless it is used.

In reading order:

=================  =================================================================
``state.py``       shared: one run's state, the rows that tests carry, and messages
``options.py``     the options, and whether a run uses the harness
``planning.py``    which policies and task types each test runs for, and its rules
``assertions.py``  the gate's rules as a suite asserts them
``fixtures.py``    the fixtures for suites
``gpus.py``        a GPU for each worker of pytest-xdist
``contract.py``    what the contract does not look at in watched trainers
``summary.py``     the terminal output before and after a run, and the report
=================  =================================================================

A run uses the harness as soon as one of its options, its table in pyproject.toml or one of its
fixtures is seen. Only then are the settings resolved and the summary's hooks registered. torch is
not loaded before a fixture asks for a policy, so collecting stays quick.
"""

import os
import secrets
from typing import Any

import pytest

# pytest finds hooks and fixtures among the names of the plugin's module.
from grpo_harness.plugin.contract import pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401
from grpo_harness.plugin.fixtures import (  # noqa: F401
    admission,
    all_task_types,
    base_policy,
    baseline,
    baselines,
    built_in_recipes,
    engine,
    evaluate,
    evaluation,
    evaluations,
    gate,
    grpo_candidate,
    grpo_log,
    grpo_recipe,
    grpo_session,
    policy,
    recorded_runs,
    role,
    sample,
    small_policy,
    task_type,
    throughput,
    throughput_file,
    trained_policy,
)
from grpo_harness.plugin.gpus import see_one
from grpo_harness.plugin.options import (  # noqa: F401
    check_alone,
    is_asked,
    pytest_addoption,
    resolved,
    store_file,
)
from grpo_harness.plugin.planning import (  # noqa: F401
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_generate_tests,
)
from grpo_harness.plugin.state import PROPERTY, RUN, SEED, Run, usage_errors


def activated(config: pytest.Config) -> Run:
    """Return the run's state; the first call activates the harness. Raises ``UsageError``."""
    if RUN not in config.stash:
        worker = getattr(config, "workerinput", None)
        seed = config.getoption("grpo_seed") if worker is None else worker[PROPERTY]
        settings = resolved(config)
        check_alone(config, settings)
        if worker is not None:
            see_one(os.environ, worker["workerid"], settings.device)
        if seed is None:
            seed = _last_seed(config) if config.getoption("grpo_rescore") else _fresh()
        config.stash[RUN] = run = Run(settings, seed)
        from grpo_harness.plugin.summary import Summary

        config.pluginmanager.register(Summary(config, run), "grpo-harness-summary")
    return config.stash[RUN]


def _fresh() -> int:
    return secrets.randbelow(2**31)


def _last_seed(config: pytest.Config) -> int:
    seed = config.cache.get(SEED, None) if config.cache else None
    if not isinstance(seed, int):
        raise pytest.UsageError(
            "--grpo-rescore scores the samples of an earlier run, and there is none: run pytest "
            "without it first, or name a run by --grpo-seed"
        )
    return seed


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings before anything is collected, if the run uses the harness."""
    config.addinivalue_line(
        "markers", "grpo(rule, ...): the rules of the gate by which a test judges (grpo-harness)"
    )
    if not is_asked(config):
        return
    run = activated(config)
    if config.getoption("grpo_record"):
        from grpo_harness.baselines.recording import check_recordable

        with usage_errors():
            check_recordable(run.settings.baselines, run.settings.root)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the run's seed to every worker of pytest-xdist."""
    config = node.config
    seed = config.getoption("grpo_seed")
    if RUN in config.stash:
        seed = config.stash[RUN].seed
    elif seed is None:
        # Only the workers find out whether the run uses the harness; they must have one seed.
        seed = config.stash.setdefault(_SEED, _fresh())
    node.workerinput[PROPERTY] = seed


_SEED: pytest.StashKey[int] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the training suite in one worker: its tests use the same few long runs.

    By the file's name: `--dist loadgroup` forgets its groups under pytest 9.2 (pytest-xdist#1386).
    """
    ours = RUN in config.stash or any("grpo_harness.suites" in str(a) for a in config.args)
    if not ours or config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if path.endswith("test_training.py") else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> pytest.ExitCode | None:
    """Prune, or print the settings, instead of running tests, if an option says so."""
    if config.getoption("grpo_settings"):
        from grpo_harness.settings import shown
        from grpo_harness.text import escape

        own = [
            (name, str(value), "command line" if value else "default")
            for name in ("fresh", "rescore")
            for value in [config.getoption(f"grpo_{name}")]
        ]
        store = ("store", escape(str(store_file(config)), 1000), "pytest's cache_dir")
        for name, value, source in [*shown(resolved(config)), *own, store]:
            _say(f"{name:<27} {value:<40} {source}")
        return pytest.ExitCode.OK
    if config.getoption("grpo_prune"):
        _prune(config)
        return pytest.ExitCode.OK
    return None


def _prune(config: pytest.Config) -> None:
    from grpo_harness.baselines.pruning import check_restorable, prune
    from grpo_harness.session import stale_entries

    settings = resolved(config)
    found = stale_entries(settings)
    with usage_errors():
        check_restorable(found)
    prune(found)
    for entry in found:
        _say(f"pruned {entry}")
    _say(f"{len(found)} stale entries below {settings.baselines}")


def _say(line: str) -> None:
    from grpo_harness.text import plain

    print(plain(line))  # noqa: T201 - pytest has not set up its terminal yet
