"""A repository: the policies, data sets, rewards and recipes that are there."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from grpo_harness.errors import HarnessError
from grpo_harness.init.checkpoints import Checkpoint, checkpoint_in, name_of
from grpo_harness.init.data import KINDS, DataFile, data_in
from grpo_harness.init.recipes import RecipeFile, recipe_in
from grpo_harness.init.rewards import RewardFunction, rewards_in

MOST, MOST_FILES = 10_000, 200
"""Folders that are looked at, and files of each."""

_FILES = (*KINDS, ".yaml", ".yml", ".py")

_SKIPPED = {
    *("node_modules", "site-packages", "venv", "env", "build", "dist", "wandb", "mlruns"),
    *("__pycache__", "baselines", "report"),
}
_T = TypeVar("_T")


@dataclass
class Found:
    """What is in a repository. ``skipped`` says of what could not be used, why."""

    home: Path
    checkpoints: list[Checkpoint] = field(default_factory=list)
    data: list[DataFile] = field(default_factory=list)
    rewards: list[RewardFunction] = field(default_factory=list)
    recipes: list[RecipeFile] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def tried(self, path: Path, read: Callable[[], _T]) -> _T | None:
        """Return what is read of a path, or note why that is not possible."""
        try:
            return read()
        except (OSError, ValueError, HarnessError) as error:
            self.skipped.append((os.path.relpath(path, self.home), str(error)))
            return None


def look(home: Path) -> Found:
    """Look at a repository. Folders of environments, packages and version control are left out.

    A link to a folder may be a policy, and is not followed further.
    """
    found = Found(home)

    def unreadable(error: OSError) -> None:
        found.skipped.append((os.path.relpath(error.filename, home), str(error)))

    for number, (place, folders, files) in enumerate(os.walk(home, onerror=unreadable)):
        folder = Path(place)
        if number == MOST:
            found.skipped.append((os.path.relpath(folder, home), f"more than {MOST:,} folders"))
            break
        folders[:] = sorted(
            name
            for name in folders
            if not _is_skipped(folder / name)
            and found.tried(folder / name, partial(name_of, folder / name, home)) is not None
        )
        links = [folder / name for name in folders if (folder / name).is_symlink()]
        policies = [found.tried(at, partial(checkpoint_in, at, home)) for at in (folder, *links)]
        found.checkpoints += [policy for policy in policies if policy]
        if policies[0] is None:  # what is in a checkpoint belongs to it
            names = sorted(name for name in files if name.lower().endswith(_FILES))
            if len(names) > MOST_FILES:
                more = f"{len(names)} files, of which the first {MOST_FILES} are looked at"
                found.skipped.append((os.path.relpath(folder, home), more))
            for name in names[:MOST_FILES]:
                _look_at(folder / name, found)
    return found


def _look_at(file: Path, found: Found) -> None:
    kind = file.suffix.lower()
    # Unlike pathlib, it is quiet on a link to what cannot be reached.
    if not os.path.isfile(file) or file.name.startswith("."):  # noqa: PTH113
        return
    if kind in KINDS:
        data = found.tried(file, lambda: data_in(file, name_of(file, found.home)))
        found.data += [data] if data else []
    elif kind in (".yaml", ".yml"):
        recipe = found.tried(file, lambda: recipe_in(file, name_of(file, found.home)))
        found.recipes += [recipe] if recipe else []
    elif kind == ".py" and not _is_test(file, found.home):
        found.rewards += found.tried(file, lambda: rewards_in(file, found.home)) or []


def _is_skipped(folder: Path) -> bool:
    environment = os.path.exists(folder / "pyvenv.cfg")  # noqa: PTH110 - as above
    return folder.name.startswith(".") or folder.name in _SKIPPED or environment


def _is_test(file: Path, home: Path) -> bool:
    names = file.relative_to(home).parts
    return "tests" in names or names[-1].startswith(("test_", "conftest."))
