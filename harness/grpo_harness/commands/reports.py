"""Show a report elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "comment",
        help="write a report as a comment of a pull request",
        description="Write a report as Markdown for a pull request: the verdict, what did not "
        "pass, the tables, all else folded; at most 60,000 characters. Its first line is a marker "
        "by which a workflow finds the comment of the last run.",
    )
    command.add_argument("report", type=Path, help="report.json, or the folder of --grpo-report")
    command.set_defaults(run=_comment)


def _comment(arguments: argparse.Namespace) -> None:
    from grpo_harness.report.comment import comment
    from grpo_harness.report.files import read

    sys.stdout.write(comment(read(arguments.report)))
