"""What commands share."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grpo_harness.settings import Settings, resolve

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def project() -> Settings:
    """Return the settings of the project in the current directory."""
    # The configured candidates may not exist before the first training.
    return resolve(Path.cwd(), Path.cwd(), {"trained": "nano-trained"})


def say(text: str) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
