"""Show the runs of a project over time."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import say

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "history",
        help="show runs over time, and since which commit a drift is proven",
        description="Show the runs that pytest --grpo-history kept in a folder: each figure over "
        "commits, what was recorded between them, and since which commit a drift is proven.",
    )
    command.add_argument("folder", type=Path, help="the folder of --grpo-history")
    command.add_argument("--page", type=Path, metavar="HTML", help="also draw it into one file")
    command.set_defaults(run=_history)


def _history(arguments: argparse.Namespace) -> None:
    from grpo_harness.atomic import replace
    from grpo_harness.history.file import HistoryError, read
    from grpo_harness.report import history as views
    from grpo_harness.text import escape

    history = read(arguments.folder)
    width = shutil.get_terminal_size().columns
    for line in history.damaged:
        say(line)
    if not history.runs:
        folder = escape(str(arguments.folder), 1000)
        raise HistoryError(f"{folder} has no run: pytest --grpo-history={folder} adds one")
    for table in (views.runs(history), views.measured(history)):
        say("\n".join([*table.terminal(width), ""]))
    for sentence in views.drifts(history) or ["no drift is proven"]:
        say(sentence)
    if arguments.page:
        replace(arguments.page, views.page(history))
        say(f"drawn: {escape(str(arguments.page), 1000)}")
