"""Show a report elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import say

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

    command = commands.add_parser(
        "export",
        help="write a report for inspect_ai, or for Every Eval Ever",
        description="Write every evaluation of a report in a format of another tool, and print "
        "the files. A file is replaced only by the same report's.",
    )
    command.add_argument("format", choices=("inspect", "every-eval-ever"))
    command.add_argument("report", type=Path, help="report.json, or the folder of --grpo-report")
    command.add_argument("--out", type=Path, required=True, help="the folder to write to")
    command.set_defaults(run=_export)


def _comment(arguments: argparse.Namespace) -> None:
    from grpo_harness.report.comment import comment
    from grpo_harness.report.files import read

    sys.stdout.write(comment(read(arguments.report)))


def _export(arguments: argparse.Namespace) -> None:
    from grpo_harness.export import every_eval_ever, inspect_log
    from grpo_harness.report.files import read

    export = inspect_log if arguments.format == "inspect" else every_eval_ever
    for path in export.write(read(arguments.report).content(), arguments.out):
        say(path)
