"""Write what a repository needs to be judged."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import say
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


_SKIPPED = 6
"""Files that are named although they could not be used."""


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "init",
        help="write the table, tests and workflow of a repository, from what is in it",
        description="Look at the repository in the current directory (checkpoints, data sets, "
        "reward functions, TRL's YAML files) and write the table [tool.grpo-harness], a test, a "
        "workflow and lines of .gitignore. Nothing that exists is changed, and no code is run.",
    )
    command.set_defaults(run=_init)


def _init(_: argparse.Namespace) -> None:
    from grpo_harness.init.choose import choose
    from grpo_harness.init.look import look
    from grpo_harness.init.write import TESTS, judges, others_changed, own_table, project, write

    home = Path.cwd()
    before = project(home)
    found = look(home)
    choice = choose(found, own_table(before))
    for what, why in choice.said:
        say(f"{what:<9} {why}")
    for path, why in found.skipped[:_SKIPPED]:
        say(f"skipped   {escape(path, 120)}: {escape(' '.join(why.split()))}")
    if len(found.skipped) > _SKIPPED:
        say(f"skipped   {len(found.skipped) - _SKIPPED} more")
    say("")
    for file, done in write(home, found, choice, before):
        say(f"{file}: {done}")
    if not judges(home):
        choice.to_do.append(f"{TESTS} asks no gate: write tests as the README does")
    if others_changed(home):
        choice.to_do.append("commit or stash what else has changed: a recording wants a clean tree")
    if choice.to_do:
        say("\nFirst:\n" + "\n".join(f"- {line}" for line in choice.to_do))
    say("\nNext:\n" + "\n".join(f"  {command}" for command in _next(home)))


def _next(home: Path) -> Iterator[str]:
    """Yield the commands from the files to the first verdict."""
    from grpo_harness.baselines.provenance import git
    from grpo_harness.init.write import TESTS, judges, to_commit

    if files := " ".join(to_commit(home)):
        start = "git init && " if git("rev-parse", "--git-dir", cwd=home) is None else ""
        yield f"{start}git add {files} && git commit -m 'Judge the policy by grpo-harness'"
    tests = f"pytest {TESTS}" if judges(home) else "pytest"
    # A quarter of what a recording asks by itself, and still as many as find 5 points nine times in
    # ten on every task of the embedded pair.
    yield f"{tests} --grpo-record --grpo-problems 256"
    yield tests
