"""What commands share."""

import argparse
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grpo_harness.errors import HarnessError
from grpo_harness.settings import Settings, resolve, table_settings

if TYPE_CHECKING:
    from grpo_harness.session import Session

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

_DRAWING = ("problems", "samples", "device", "dtype")
"""The settings that a command which draws has as options."""


def project() -> Settings:
    """Return the settings of the project in the current directory."""
    # The configured candidates may not exist before the first training.
    return resolve(Path.cwd(), Path.cwd(), {"trained": "nano-trained"})


def add_drawing(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that draws completions."""
    command.add_argument(
        "--task", action="append", metavar="NAME", help="ask this task; again for another"
    )
    for setting in table_settings():
        if setting.name in _DRAWING:
            command.add_argument(
                f"--{setting.name}",
                type=setting.kind,
                metavar=setting.metavar,
                help=setting.description,
            )
    command.add_argument("--seed", type=int, help="repeat the run that printed this seed")


@contextmanager
def session(arguments: argparse.Namespace) -> "Iterator[Session]":
    """Open a session of the project here, with the options that `add_drawing` has added.

    It has the store of runs of pytest, and its seed is a new one unless it is given.
    """
    from grpo_harness.plugin.options import store_of
    from grpo_harness.reruns import Reruns
    from grpo_harness.session import Session, progress_bar
    from grpo_harness.sizing import Sizing
    from grpo_harness.store import Store

    options = {name: getattr(arguments, name) for name in _DRAWING}
    settings = resolve(Path.cwd(), Path.cwd(), options, prefix="--")
    file = store_of(())
    if file is None:
        raise HarnessError("pytest, in whose cache samples are kept, cannot start here")
    opened = Session(
        settings=settings,
        sizing=Sizing(settings),
        run_seed=secrets.randbelow(2**31) if arguments.seed is None else arguments.seed,
        shares={},
        code="",  # it tells reruns of checks apart, and a command has none
        store=Store(file),
        reruns=Reruns(file.parent),
        progress=progress_bar,
    )
    try:
        yield opened
    finally:
        opened.close()


def say(text: str) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
