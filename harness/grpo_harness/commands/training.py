"""Train by a recipe, and compare recipes and trainings with recorded ones."""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import project, say
from grpo_harness.training.builtin import BUILT_IN, path_of
from grpo_harness.training.curves import Row
from grpo_harness.training.processes import launch, launched
from grpo_harness.training.resources import compare, read_resources
from grpo_harness.training.unfinished import check_new, folder_of, leave

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands
    from grpo_harness.training.files import Recipe


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "train",
        help="train a policy with GRPO by a recipe",
        description="Train a policy by a recipe with GRPO and the rule reward, or the rewards that "
        "it names. After an interruption, the same command continues from the last checkpoint, to "
        "the same weights.",
    )
    command.add_argument(
        "recipe", help=f"one of {', '.join(BUILT_IN)}, or a .yaml file as `trl grpo --config` takes"
    )
    command.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--policy", help="start from this policy instead of the recipe's")
    command.add_argument("--steps", type=int, help="number of steps, instead of the recipe's")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe",
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--processes", type=int, default=1, help="number of processes")
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "recipes",
        help="compare the project's recipes, or the built-in ones, with their recorded configs",
    )
    command.add_argument("--record", action="store_true", help="record their current configs")
    command.set_defaults(run=_recipes)

    command = commands.add_parser("resources", help="show the time, speed and memory of a training")
    command.add_argument("trained", type=Path, help="a folder that `train` wrote")
    command.add_argument("than", type=Path, nargs="?", help="another, to compare with")
    command.set_defaults(run=_resources)


def _train(arguments: argparse.Namespace) -> None:
    if launched():
        _train_here(arguments)
        return
    check_new(arguments.out)
    # A cluster sends SIGTERM before it takes the machine away: handle it like Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.processes == 1:
            _train_here(arguments)
        else:
            _train_in_processes(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _train_in_processes(arguments: argparse.Namespace) -> None:
    _chosen(arguments)
    try:
        launch(_train_here, arguments, arguments.processes)
    except BaseException as error:
        if kept := leave(folder_of(arguments.out)):
            error.add_note(kept)
        raise


def _chosen(arguments: argparse.Namespace) -> Recipe:
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes}: there must be at least one")
    if arguments.steps is not None and arguments.steps < 1:  # TRL would train by epochs
        raise ValueError(f"--steps {arguments.steps}: there must be at least one")
    path_of(arguments.recipe)  # before torch is loaded
    from grpo_harness.training.files import load
    from grpo_harness.training.reading import assignment

    own = {"model_name_or_path": arguments.policy, "max_steps": arguments.steps}
    said = dict(assignment(text) for text in arguments.set)
    return load(arguments.recipe, said | {k: v for k, v in own.items() if v is not None})


def _train_here(arguments: argparse.Namespace) -> None:
    recipe = _chosen(arguments)
    from grpo_harness.training import train
    from grpo_harness.training.config import described
    from grpo_harness.training.files import load
    from grpo_harness.training.recorded import differences, path_of, recorded

    config = recipe.config(arguments.out, device=arguments.device)
    if config.process_index == 0:
        beside = "".join(f"\n  {key} = {value}" for key, value in recipe.said_beside().items())
        say(f"recipe {recipe.name}:{beside}\n{described(config)}")
        if path_of(recipe.name, baselines := project().baselines).exists():
            was = recorded(recipe.name, baselines)
            whole = load(arguments.recipe)
            if changed := differences(whole, was, device=arguments.device):
                lines = "".join(f"\n  {difference}" for difference in changed)
                sys.stdout.flush()
                sys.stderr.write(
                    f"CHANGED: the recipe {recipe.name} is not what was recorded of it with "
                    f"{was['versions']}:{lines}\n"
                )
    progress = _Steps(config.max_steps, config.num_train_epochs)
    run = train(recipe, arguments.out, device=arguments.device, progress=progress, notice=say)
    if config.process_index == 0:
        say(
            f"{run.path}: {len(run.log)} steps, at least {run.weights_moved:.0%} of the elements "
            f"of every tensor moved, fingerprint {run.fingerprint}\n{run.resources}"
        )


class _Steps:
    """Prints the figures of every step, and the time that is left."""

    def __init__(self, steps: int, epochs: float) -> None:
        self._steps = steps
        self._epochs = epochs
        self._seconds: list[float] = []
        self._last = time.monotonic()

    def __call__(self, row: Row) -> None:
        now = time.monotonic()
        # step_time if logged: the first interval also contains the trainer's start.
        self._seconds.append(row.get("step_time", now - self._last))
        self._last = now
        steps = self._steps
        if steps < 1:  # the recipe says a number of epochs
            steps = round(row["step"] / row["epoch"] * self._epochs)
        left = (steps - row["step"]) * statistics.median(self._seconds[-20:])
        say(
            # A step on completions of an earlier one has no reward of its own.
            f"step {row['step']:>4}/{steps}  reward {row.get('reward', math.nan):+.3f}  "
            f"length {row.get('completions/mean_length', math.nan):5.1f}  "
            f"entropy {row.get('entropy', math.nan):.3f}  gradient {row['grad_norm']:.3f}  "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )


def _recipes(arguments: argparse.Namespace) -> None:
    from grpo_harness.training.files import load
    from grpo_harness.training.recorded import differences, record, recorded

    settings = project()
    baselines = settings.baselines
    for recipe in map(load, settings.recipes or BUILT_IN):
        if arguments.record:
            say(f"recorded: {record(recipe, baselines)}")
            continue
        changed = differences(recipe, recorded(recipe.name, baselines), device="cpu")
        say(f"{recipe.name}: {'as recorded' if not changed else 'changed'}")
        for difference in changed:
            say(f"  {difference}")


def _resources(arguments: argparse.Namespace) -> None:
    now = read_resources(arguments.trained)
    say(f"{arguments.trained}: {now}")
    if arguments.than is not None:
        then = read_resources(arguments.than)
        say(f"{arguments.than}: {then}")
        for name, ratio in compare(now, then).items():
            say(f"{name}: {ratio:.2f} times as much")
