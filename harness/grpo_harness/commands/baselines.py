"""Compare recorded baselines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import say

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "diff",
        help="say what changed between two recordings, a sentence a task",
        description="Say what changed between two baselines, or between two folders of them. Of "
        "one file alone, say what it holds, a figure a line: so git can show it, as textconv.",
    )
    command.add_argument("old", type=Path, help="a baseline, or a folder with some")
    command.add_argument("new", type=Path, nargs="?", help="the one to compare it with")
    command.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> None:
    from grpo_harness.baselines.diff import differences, summary
    from grpo_harness.baselines.file import load

    if arguments.new is None:
        say(summary(load(arguments.old)))
        return
    for said in differences(arguments.old, arguments.new):
        say(said)
