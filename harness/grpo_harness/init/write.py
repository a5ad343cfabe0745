"""The files that a repository needs to be judged. What exists is left alone, byte for byte.

Two files are added to at their ends: pyproject.toml, if it has no table of ours, and .gitignore.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_harness.baselines.provenance import git
from grpo_harness.errors import HarnessError
from grpo_harness.init.checkpoints import STEP, Checkpoint
from grpo_harness.init.choose import Choice
from grpo_harness.init.look import Found
from grpo_harness.init.table import table
from grpo_harness.settings import nearest_table
from grpo_harness.text import escape, one_line

PROJECT, IGNORED = "pyproject.toml", ".gitignore"
TESTS = "tests/test_policy.py"
WORKFLOW = ".github/workflows/grpo-harness.yml"
FILES = (PROJECT, TESTS, WORKFLOW, IGNORED)


class InitError(HarnessError):
    """A file cannot be written. One line: which, why, and what to do."""


def project(home: Path) -> dict[str, Any] | None:
    """Return the content of a project's file, if it has one.

    Raises ``HarnessError`` if that cannot be read, or if something is in the way of other files.
    """
    for name in FILES:
        blocks = [place for place in (home / name).parents if place.exists() and not place.is_dir()]
        if blocks or (home / name).is_dir():
            raise InitError(f"{blocks[0] if blocks else home / name} is in the way: rename it")
    file, _ = nearest_table(home)
    if file is None or (file.parent != home and not _in_one_repository(home, file.parent)):
        return None
    if file.parent != home:
        raise InitError(
            f"the project's file is {file}: run it there, or make a {PROJECT} here first"
        )
    return tomllib.loads(file.read_text(encoding="utf-8"))


def own_table(project: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the table of ours in a project's file, if it has one."""
    tools = (project or {}).get("tool", {})
    return tools.get("grpo-harness") if isinstance(tools, dict) else None


def write(
    home: Path, found: Found, choice: Choice, project: dict[str, Any] | None
) -> Iterator[tuple[str, str]]:
    """Write the files of a project, and yield each with what was done. Raises ``InitError``."""
    missing = [*_not_ignored(home, found)]
    yield PROJECT, _write_table(home, choice, project)
    yield TESTS, _write_new(home / TESTS, suite(choice))
    top = git("rev-parse", "--show-toplevel", cwd=home)
    if top is None or Path(top).samefile(home):
        yield WORKFLOW, _write_new(home / WORKFLOW, workflow(home, choice, project))
    else:
        yield WORKFLOW, f"left out: GitHub reads workflows in {escape(top)} only"
    if missing:
        _append(home / IGNORED, "\n".join(missing) + "\n")
        yield IGNORED, f"added {', '.join(map(escape, missing))}"


def to_commit(home: Path) -> list[str]:
    """Return which of the files git does not have as they are."""
    return [
        name
        for name in FILES
        if (home / name).exists()
        and git("status", "--porcelain", "--", f":(literal){name}", cwd=home) != ""
    ]


def judges(home: Path) -> bool:
    """Tell whether the file of tests asks the gate; it may be another one, of the same name."""
    return b"gate" in (home / TESTS).read_bytes()


def others_changed(home: Path) -> bool:
    """Tell whether other files have changes that are not committed."""
    own = [f":(exclude,literal){name}" for name in FILES]
    return bool(git("status", "--porcelain", "--untracked-files=all", "--", ":/", *own, cwd=home))


def suite(choice: Choice) -> str:
    """Return the tests of a project: what is asked of its policies."""
    data = choice.ready
    answers = data is None or data.correct is not None
    asked = [_FORM, _REWARD]
    if answers:
        asked.insert(0, _ACCURACY)
    if data and len(data.rewards) > 1:
        asked.append(_REWARDS)
    if answers and choice.base is not None:
        asked.append(_NO_LOSS)
    return _HEAD + (_TRAINED if choice.base is None else "") + "".join(asked)


def workflow(home: Path, choice: Choice, project: dict[str, Any] | None) -> str:
    """Return the workflow that judges a pull request."""
    extras = f"[{','.join(choice.extras)}]" if choice.extras else ""
    install = ["pip install", f"'grpo-harness{extras}'" if extras else "grpo-harness"]
    if (home / "requirements.txt").is_file():
        install.append("-r requirements.txt")
    if project and "project" in project:
        install.append(".")
    lines = Path(__file__).with_name("workflow.yml").read_text(encoding="utf-8")
    away = [
        escape(name)
        for name in (choice.base, choice.trained)
        if name and (home / name).is_dir() and not _is_tracked(home, name)
    ]
    fetch = f"      # {', '.join(away)} is not in git: fetch it here.\n" if away else ""
    version = ".".join(map(str, sys.version_info[:2]))
    return (
        lines.replace("      # FETCH\n", fetch)
        .replace("INSTALL", " ".join(install))
        .replace("PYTHON", version)
    )


def _in_one_repository(home: Path, above: Path) -> bool:
    top = git("rev-parse", "--show-toplevel", cwd=home)
    return top is not None and above.is_relative_to(top)


def _write_table(home: Path, choice: Choice, before: dict[str, Any] | None) -> str:
    baselines = "policy-baselines" if (home / "baselines").exists() else None
    added = table(choice, baselines)
    if before is None:
        return _write_new(home / PROJECT, added)
    if own_table(before) is not None:
        return "left alone: it has the table [tool.grpo-harness]"
    file = home / PROJECT
    try:
        whole = tomllib.loads(_joined(file.read_bytes(), "\n" + added).decode())
    except ValueError as error:
        raise InitError(
            f"{file}: [tool.grpo-harness] cannot be added at its end ({one_line(error)}): write "
            "tool as tables, [tool.NAME]"
        ) from error
    assert whole == {**before, "tool": {**before.get("tool", {}), **tomllib.loads(added)["tool"]}}
    _append(file, "\n" + added)
    return "added the table [tool.grpo-harness]"


def _write_new(file: Path, content: str) -> str:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8", newline="") as new:
            new.write(content)
    except FileExistsError:
        return "left alone: it exists"
    except OSError as error:
        raise InitError(f"{file} cannot be written ({one_line(error)})") from error
    return "written"


def _append(file: Path, content: str) -> None:
    """Add lines to the end of a file, with its line ends; what is there stays as it is."""
    before = file.read_bytes() if file.exists() else b""
    try:
        with file.open("ab") as end:
            end.write(_joined(before, content)[len(before) :])
    except OSError as error:
        raise InitError(f"{file} cannot be written ({one_line(error)})") from error


def _joined(before: bytes, content: str) -> bytes:
    line_end = b"\r\n" if b"\r\n" in before else b"\n"
    if before and not before.endswith(b"\n"):
        before += line_end
    return before + content.encode().replace(b"\n", line_end)


def _not_ignored(home: Path, found: Found) -> Iterator[str]:
    """Yield what git should ignore and does not: what runs leave, and weights that it has not."""
    file = home / IGNORED
    there = file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []
    for line, example in (("/report/", "report/x"), ("__pycache__/", "tests/__pycache__/x.pyc")):
        ignored = git("check-ignore", "--", example, cwd=home) is not None
        if not ignored and line not in map(str.strip, there):
            yield line
    patterns: list[str] = []
    for checkpoint in found.checkpoints:
        pattern = _pattern(checkpoint, home)
        known = pattern in there or any(pattern.startswith(other) for other in patterns)
        if not known and checkpoint.folder != home and not _is_in_git(home, checkpoint.path):
            patterns.append(pattern)
    yield from patterns


def _pattern(checkpoint: Checkpoint, home: Path) -> str:
    """Return the line of .gitignore for a checkpoint, or for all that its run keeps."""
    folder = checkpoint.folder.relative_to(home)
    literal = re.sub(r"([\\*?[])", r"\\\1", f"/{folder.as_posix()}").replace("\n", "?")
    if checkpoint.folder.is_symlink():
        return literal  # to git, a link is no folder
    return re.sub(STEP.pattern + "$", "checkpoint-*", literal) + "/"


def _is_in_git(home: Path, name: str) -> bool:
    """Tell whether git knows a path: it has it, or ignores it already."""
    status = git("status", "--porcelain", "--", f":(literal){name}", cwd=home)
    return status is not None and not status.startswith("??")


def _is_tracked(home: Path, name: str) -> bool:
    return bool(git("ls-files", "--", f":(literal){name}", cwd=home))


_HEAD = '''"""Is the policy as good as its baseline? Written by `grpo-harness init`: change it."""

import pytest
'''

_TRAINED = """
# Nothing says what the training began with. Remove this line when pyproject.toml names the base.
pytestmark = pytest.mark.parametrize("role", ["trained"], indirect=True)
"""

_ACCURACY = """

@pytest.mark.grpo("accuracy")
def test_accuracy(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)
"""

_FORM = """

@pytest.mark.grpo("length", "truncation")
def test_form(evaluation, baseline, gate):
    gate.length(evaluation, baseline)
    gate.truncation(evaluation, baseline)
"""

_REWARD = """

@pytest.mark.grpo("reward")
def test_reward(evaluation, baseline, gate):
    gate.reward(evaluation, baseline)
"""

_REWARDS = """

@pytest.mark.grpo("rewards")
def test_each_reward(evaluation, baseline, gate):
    gate.rewards(evaluation, baseline)
"""

_NO_LOSS = """

@pytest.mark.grpo("no_loss")
def test_training_does_no_harm(base_policy, trained_policy, task_type, evaluate, gate):
    gate.no_loss([evaluate(trained_policy, task_type)], [evaluate(base_policy, task_type)])
"""
