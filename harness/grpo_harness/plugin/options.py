"""The options of the command line, and whether a run uses the harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_harness.plugin.state import usage_errors
from grpo_harness.settings import ROLES, Settings, has_table, project_file, resolve, table_settings
from grpo_harness.text import plain

if TYPE_CHECKING:
    from grpo_harness.store import Draws

_MODES = ("strict", "skip_unproven", "record", "prune", "settings", "fresh", "rescore")
_OTHERS = ("seed", "accept_regression", "report", "greedy")
_PATHS = (
    *("--grpo-base", "--grpo-trained", "--grpo-baselines", "--grpo-training", "--grpo-history"),
    "--grpo-report",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options: those of the settings model, and those for what a run does."""
    add = parser.getgroup("grpo-harness").addoption
    for setting in table_settings():
        if not setting.is_option:
            continue
        told: dict[str, Any] = {"default": None, "help": setting.description}
        if setting.kind is bool:
            told["action"] = "store_true"
        else:
            told |= {"metavar": setting.metavar, "type": setting.kind}
        if setting.repeats:
            told["action"] = "append"
        add(f"--grpo-{setting.name}", **told)
    for role in ROLES:
        said = f"the {role} policy is served there, like http://HOST:PORT/v1; again for another"
        add(f"--grpo-serve-{role}", action="append", metavar="URL", help=said)
    add("--grpo-greedy", action="store_true", default=None, help="greedy decoding, one completion")
    add("--grpo-seed", type=int, metavar="SEED", help="repeat the run that printed this seed")
    add("--grpo-fresh", action="store_true", help="draw all samples anew, and replace stored ones")
    add("--grpo-rescore", action="store_true", help="score stored samples, and load no weights")
    add("--grpo-strict", action="store_true", help="UNPROVEN fails, as for a release")
    add("--grpo-skip-unproven", action="store_true", help="UNPROVEN is a skip, with its reason")
    add("--grpo-record", action="store_true", help="record baselines instead of judging")
    add("--grpo-accept-regression", metavar="WHY", help="record a lower accuracy, and say why")
    add("--grpo-prune", action="store_true", help="delete stale baselines, and run nothing")
    add("--grpo-settings", action="store_true", help="print every setting, and run nothing")
    add("--grpo-report", type=Path, metavar="DIR", help="write report.md, report.json, samples")


def settable() -> list[str]:
    """Return the options that decide what is drawn and judged, without ``--grpo-``."""
    served = (f"serve_{role}" for role in ROLES)
    return [*(of.name for of in table_settings() if of.is_option), "greedy", *served]


def is_asked(config: pytest.Config) -> bool:
    """Tell whether the command line or the project's file uses the harness."""
    if any(config.getoption(f"grpo_{name}") for name in _MODES):
        return True
    if any(config.getoption(f"grpo_{name}") is not None for name in (*settable(), *_OTHERS)):
        return True
    with usage_errors():
        return has_table(config.rootpath)


def resolved(config: pytest.Config) -> Settings:
    """Resolve the settings of a run. Raises ``pytest.UsageError``."""
    _check_root(config)
    _check_modes(config)
    options = {name: config.getoption(f"grpo_{name}") for name in settable()}
    with usage_errors():
        return resolve(config.rootpath, config.invocation_params.dir, options)


def check_alone(config: pytest.Config, settings: Settings) -> None:
    """Raise ``UsageError`` if several workers of pytest-xdist would each want the whole cluster."""
    if settings.engine == "ray" and config.getoption("dist", "no") != "no":
        raise pytest.UsageError(
            "the engine ray already draws on all workers of its cluster, which the processes of "
            "pytest-xdist would fight for: leave out -n"
        )


def _check_modes(config: pytest.Config) -> None:
    reason = config.getoption("grpo_accept_regression")
    if reason is not None and not (config.getoption("grpo_record") and reason.strip()):
        raise pytest.UsageError(
            "--grpo-accept-regression says why a recording may be lower than the one before: "
            "give it a reason, together with --grpo-record"
        )
    if config.getoption("grpo_strict") and config.getoption("grpo_skip_unproven"):
        raise pytest.UsageError(
            "--grpo-strict fails what is UNPROVEN, and --grpo-skip-unproven skips it: leave one out"
        )
    if config.getoption("grpo_record") and config.getoption("grpo_prune"):
        raise pytest.UsageError(
            "--grpo-record writes baselines, and --grpo-prune runs no test: leave one out"
        )
    _check_draws(config)
    folder = config.getoption("grpo_report")
    if folder is None:
        return
    place = (config.invocation_params.dir / folder).resolve()
    if place.is_file():
        raise pytest.UsageError(f"--grpo-report {plain(str(folder))} is a file: name a folder")
    if config.rootpath.is_relative_to(place) or config.invocation_params.dir.is_relative_to(place):
        raise pytest.UsageError(
            f"--grpo-report {plain(str(folder))} is the project's own folder, or one around it: "
            "name a folder for the report alone"
        )


def _check_draws(config: pytest.Config) -> None:
    rescore = config.getoption("grpo_rescore")
    if rescore and config.getoption("grpo_fresh"):
        raise pytest.UsageError(
            "--grpo-fresh draws all samples anew, and --grpo-rescore draws none: leave one out"
        )
    if rescore and not config.pluginmanager.hasplugin("cacheprovider"):
        raise pytest.UsageError(
            "--grpo-rescore scores what is stored in pytest's cache, which is switched off: leave "
            "out -p no:cacheprovider"
        )


def draws(config: pytest.Config) -> Draws:
    """Return which samples a run draws."""
    if config.getoption("grpo_rescore"):
        return "none"
    return "all" if config.getoption("grpo_fresh") else "missing"


def store_file(config: pytest.Config) -> Path:
    """Return the file of the store, in pytest's cache."""
    from grpo_harness.store import FILE

    # pytest makes its cache's object only when tests are to run.
    folder = Path(os.path.expandvars(config.getini("cache_dir"))).expanduser()
    return config.rootpath / folder / "d" / "grpo-harness" / FILE


def store_of(arguments: Sequence[str]) -> Path | None:
    """Return the file of the store that a run of pytest with some arguments would use.

    If pytest cannot start with them, it prints why, and there is none.
    """

    class Asked:
        file: Path | None = None

        @pytest.hookimpl(tryfirst=True)
        def pytest_cmdline_main(self, config: pytest.Config) -> pytest.ExitCode:
            self.file = store_file(config)
            return pytest.ExitCode.OK

    asked = Asked()
    # Where warnings are errors, pytest would not start beside a plugin that is imported already.
    late = "ignore::pytest.PytestAssertRewriteWarning"
    pytest.main([*arguments, "-W", late], plugins=[asked])
    return asked.file


def _check_root(config: pytest.Config) -> None:
    """Raise ``UsageError`` if pytest took the value of an option for a test path.

    pytest looks for the project before it knows the options of plugins. It takes the path in
    ``--grpo-trained /elsewhere`` for a test path, and would use the settings of the project around
    that path. With an equals sign there is no such mistake.
    """
    if config.getoption("rootdir") or config.getoption("inifilename"):
        return
    words = [str(word) for word in config.invocation_params.args]
    cwd = config.invocation_params.dir
    taken = [
        (option, value)
        for option, value in pairwise(words)
        if option in _PATHS and _exists(cwd / value)
    ]
    if not taken:
        return
    places = [cwd]
    if config.args_source is config.ArgsSource.ARGS:
        named = (cwd / argument.partition("::")[0] for argument in config.args)
        places = [place for place in named if _exists(place)] or places
    projects = {_project(place) for place in places}
    if _project(config.rootpath) in projects:
        return
    option, value = taken[0]
    raise pytest.UsageError(
        f"pytest takes {plain(value)} for a test path and {config.rootpath} for the project: "
        f"write {option}={plain(value)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null character
        return False


def _project(place: Path) -> Path:
    """Return the folder whose settings apply to a run of the tests in ``place``."""
    place = place.resolve()
    file = project_file(place)
    return place if file is None else file.parent
