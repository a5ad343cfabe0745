"""What runs of pytest have here: their settings, servers and samples."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from grpo_harness.commands.common import say
from grpo_harness.errors import HarnessError

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "settings",
        help="print every setting of a run, with where it comes from",
        description="Print every setting that a run of pytest would have here, with where it "
        "comes from: the command line, the project's table, or the default. All arguments are "
        "pytest's.",
    )
    command.set_defaults(run=_settings, passes_on=True)

    command = commands.add_parser(
        "admit",
        help="prove that each server serves the policy that it is said to serve",
        description="Compare every served policy with its checkpoint: the log-probabilities of "
        "texts and the tokens that are drawn, or else completions. The exit status is 1 if a "
        "server serves something else. All arguments are pytest's.",
    )
    command.set_defaults(run=_admit, passes_on=True)

    command = commands.add_parser(
        "store",
        help="show what samples are stored, prune them, repair the file",
        description="Show the samples that runs of pytest have stored here, by policy and engine. "
        "All other arguments are pytest's, such as -o cache_dir=DIR.",
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--prune", action="store_true", help="delete samples")
    what.add_argument(
        "--repair", action="store_true", help="keep what can be read of a damaged file"
    )
    command.add_argument("--older-than", metavar="AGE", help="those drawn 12h, 30d or 2w ago")
    command.add_argument("--to", metavar="SIZE", help="the oldest, until the file has 500MB or 2GB")
    command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    command.set_defaults(run=_store, passes_on=True)


def _settings(arguments: argparse.Namespace) -> None:
    # Resolved by pytest, which also reads its own configuration.
    command = [sys.executable, "-m", "pytest", "--grpo-settings", *arguments.others]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise HarnessError("pytest could not resolve the settings")


def _admit(arguments: argparse.Namespace) -> int:
    """Run the suite of served policies, as pytest would."""
    suite = ["--pyargs", "grpo_harness.suites.test_served", "-q", "-s", "-rN"]
    status = subprocess.run(
        [sys.executable, "-m", "pytest", *suite, *arguments.others], check=False
    ).returncode
    if status == 5:
        raise HarnessError(
            "no policy is served: name a server by --grpo-serve-trained URL, or in "
            "[tool.grpo-harness.serve]"
        )
    return min(status, 2)


def _store(arguments: argparse.Namespace) -> None:
    from grpo_harness import upkeep
    from grpo_harness.plugin.options import store_of

    limits = (arguments.older_than, arguments.to)
    if arguments.prune and limits == (None, None):
        raise ValueError("--prune needs a limit: --older-than 30d, --to 500MB, or both")
    if not arguments.prune and (*limits, arguments.dry_run) != (None, None, False):
        raise ValueError("--older-than, --to and --dry-run say what --prune deletes: add --prune")
    before = arguments.older_than and time.time() - upkeep.seconds(arguments.older_than)
    most = arguments.to and upkeep.size_of(arguments.to)
    file = store_of(arguments.others)
    if file is None:
        raise HarnessError("pytest could not resolve the settings")
    former = upkeep.former(file)
    if arguments.prune and not arguments.dry_run:
        for path in former:
            path.unlink()
    elif former:
        say(f"{file.with_suffix('')}: files of an earlier version, not read; --prune deletes them")
    if not file.exists():
        say(f"{file}: nothing is stored yet")
    elif arguments.repair:
        kept, aside = upkeep.repair(file)
        say(f"{file}: {kept:,} samples kept; the damaged file is {aside}")
    elif arguments.prune:
        gone, left = upkeep.prune(file, before=before, most=most, dry_run=arguments.dry_run)
        would = "would be " if arguments.dry_run else ""
        say(f"{file}: {gone:,} samples {would}deleted, {upkeep.megabytes(left)} left")
    else:
        say(upkeep.shown(file))
