"""The command line, ``grpo-harness COMMAND``.

An error that ends a command is one line on standard error. torch is loaded only when needed.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

from grpo_harness.commands import baselines, choice, history, init, logs, reports, runs, training
from grpo_harness.errors import HarnessError
from grpo_harness.text import plain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status.

    It is 1 for a verdict that is not PASS, 2 for an error and 130 when interrupted.
    """
    reader = parser()
    arguments, others = reader.parse_known_args(argv)
    if others and not arguments.passes_on:
        reader.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    try:
        status = arguments.run(arguments) or 0
    except KeyboardInterrupt as error:
        status, said = 130, ["interrupted", *_notes(error)]
    except (ValueError, OSError, HarnessError) as error:
        if isinstance(error, HarnessError) and error.shows_cause:
            sys.stderr.write(plain("".join(traceback.format_exception(error.__cause__))))
        status, said = 2, [str(error), *_notes(error)]
    else:
        return int(status)
    sys.stdout.flush()
    sys.stderr.write(plain(f"grpo-harness {arguments.command}: {'; '.join(said)}\n"))
    return status


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    whole = argparse.ArgumentParser(prog="grpo-harness")
    whole.set_defaults(passes_on=False)  # arguments that it does not know, to pytest
    commands = whole.add_subparsers(required=True, dest="command")
    for module in (init, runs, training, logs, baselines, reports, history, choice):
        module.add(commands)
    return whole


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


if __name__ == "__main__":
    raise SystemExit(main())
