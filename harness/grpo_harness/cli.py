"""The command line, ``grpo-harness COMMAND``.

An error that ends a command is one line on standard error. torch is loaded only when needed.
"""

import argparse
import math
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.errors import HarnessError
from grpo_harness.logs.recorded import TRAINING
from grpo_harness.settings import resolve
from grpo_harness.text import escape, plain
from grpo_harness.training.builtin import BUILT_IN, path_of
from grpo_harness.training.curves import Row
from grpo_harness.training.processes import launch, launched
from grpo_harness.training.resources import compare, read_resources
from grpo_harness.training.unfinished import check_new, folder_of, leave

if TYPE_CHECKING:
    from grpo_harness.settings import Settings
    from grpo_harness.training.files import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status.

    It is 1 for a verdict that is not PASS, 2 for an error and 130 when interrupted.
    """
    reader = parser()
    arguments, others = reader.parse_known_args(argv)
    if others and arguments.run not in (_settings, _admit, _store):
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
    commands = whole.add_subparsers(required=True, dest="command")

    command = commands.add_parser(
        "settings",
        help="print every setting of a run, with where it comes from",
        description="Print every setting that a run of pytest would have here, with where it "
        "comes from: the command line, the project's table, or the default. All arguments are "
        "pytest's.",
    )
    command.set_defaults(run=_settings)

    command = commands.add_parser(
        "admit",
        help="prove that each server serves the policy that it is said to serve",
        description="Compare every served policy with its checkpoint: the log-probabilities of "
        "texts and the tokens that are drawn, or else completions. The exit status is 1 if a "
        "server serves something else. All arguments are pytest's.",
    )
    command.set_defaults(run=_admit)

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

    command = commands.add_parser(
        "log",
        help="judge the log of a training run against recorded runs",
        description="Judge what a run of TRL's trainer logged (trainer_state.json or log.json) "
        "against the recorded runs of the same training, baselines/training/<name>.json. The exit "
        "status is 1 if a figure is outside the band of one more run.",
    )
    command.add_argument("runs", type=Path, nargs="+", help="the folder that a training run wrote")
    command.add_argument("--name", help="the training's name, if not that of the run's recipe")
    command.add_argument("--record", action="store_true", help="record three runs or more")
    command.add_argument(
        "--decisive", metavar="REWARD", help="the reward that decides what is correct, of several"
    )
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves over the bands")
    command.add_argument(
        "--recipe", help="also ask the checkpoint there whether it earns what its log says"
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.set_defaults(run=_log)

    command = commands.add_parser("resources", help="show the time, speed and memory of a training")
    command.add_argument("trained", type=Path, help="a folder that `train` wrote")
    command.add_argument("than", type=Path, nargs="?", help="another, to compare with")
    command.set_defaults(run=_resources)

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
    command.set_defaults(run=_store)
    return whole


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


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


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


def _chosen(arguments: argparse.Namespace) -> "Recipe":
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
        _say(f"recipe {recipe.name}:\n{described(config)}")
        if path_of(recipe.name, baselines := _project().baselines).exists():
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
    run = train(recipe, arguments.out, device=arguments.device, progress=progress, notice=_say)
    if config.process_index == 0:
        _say(
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
        _say(
            # A step on completions of an earlier one has no reward of its own.
            f"step {row['step']:>4}/{steps}  reward {row.get('reward', math.nan):+.3f}  "
            f"length {row.get('completions/mean_length', math.nan):5.1f}  "
            f"entropy {row.get('entropy', math.nan):.3f}  gradient {row['grad_norm']:.3f}  "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )


def _project() -> "Settings":
    """Return the settings of the project in the current directory."""
    # The configured candidates may not exist before the first training.
    return resolve(Path.cwd(), Path.cwd(), {"trained": "nano-trained"})


def _recipes(arguments: argparse.Namespace) -> None:
    from grpo_harness.training.files import load
    from grpo_harness.training.recorded import differences, record, recorded

    settings = _project()
    baselines = settings.baselines
    for recipe in map(load, settings.recipes or BUILT_IN):
        if arguments.record:
            _say(f"recorded: {record(recipe, baselines)}")
            continue
        changed = differences(recipe, recorded(recipe.name, baselines), device="cpu")
        _say(f"{recipe.name}: {'as recorded' if not changed else 'changed'}")
        for difference in changed:
            _say(f"  {difference}")


def _log(arguments: argparse.Namespace) -> int:
    from grpo_harness.logs.hacking import hacking
    from grpo_harness.logs.judge import judge
    from grpo_harness.logs.plot import plot
    from grpo_harness.logs.read import read
    from grpo_harness.logs.recorded import load, path_of, record

    if arguments.record and arguments.recipe:
        raise ValueError("--recipe asks a run that is judged: leave it out with --record")
    if arguments.plot and arguments.plot.suffix != ".png":
        raise ValueError(f"--plot {arguments.plot}: name a file that ends in .png")
    from grpo_harness.training.files import load as load_recipe

    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    logs = [read(path) for path in arguments.runs]
    names = {arguments.name or log.training or TRAINING for log in logs}
    if len(names) > 1:
        which = ", ".join(escape(name, 60) for name in sorted(names))
        raise ValueError(f"the runs are of {which}: say which with --name")
    (name,) = names
    verdicts: set[str] = set()
    project = _project()
    baselines = project.baselines
    if arguments.record:
        _say(f"recorded: {record(name, logs, baselines)}")
    elif len(logs) > 1:
        raise ValueError("several runs: --record records them, and one run is judged")
    else:
        if arguments.decisive and arguments.decisive not in logs[0].rewards:
            known = ", ".join(escape(name, 60) for name in logs[0].rewards) or "none"
            raise ValueError(
                f"--decisive {escape(arguments.decisive, 60)}: the run's rewards are {known}"
            )
        # What needs no recorded runs comes first.
        hacked = hacking(logs[0], {arguments.decisive} - {None} or project.decisive())
        if len(logs[0].rewards) > 1:
            _say(hacked.message())
            verdicts |= {hacked.verdict} & {"FAIL"}
    recorded = load(path_of(name, baselines))
    if arguments.plot:
        plot(logs[0], recorded, arguments.plot)
        _say(f"drawn: {arguments.plot}")
    if arguments.record:
        return 0
    judgement = judge(logs[0], recorded)
    _say(judgement.message())
    verdicts.add(judgement.verdict)
    if recipe is not None:
        from grpo_harness.logs.reconcile import reconcile

        found = reconcile(logs[0], recipe, device=arguments.device)
        _say(found.message())
        verdicts.add(found.verdict)
    return 0 if verdicts <= {"PASS"} else 1


def _resources(arguments: argparse.Namespace) -> None:
    now = read_resources(arguments.trained)
    _say(f"{arguments.trained}: {now}")
    if arguments.than is not None:
        then = read_resources(arguments.than)
        _say(f"{arguments.than}: {then}")
        for name, ratio in compare(now, then).items():
            _say(f"{name}: {ratio:.2f} times as much")


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
        _say(f"{file.with_suffix('')}: files of an earlier version, not read; --prune deletes them")
    if not file.exists():
        _say(f"{file}: nothing is stored yet")
    elif arguments.repair:
        kept, aside = upkeep.repair(file)
        _say(f"{file}: {kept:,} samples kept; the damaged file is {aside}")
    elif arguments.prune:
        gone, left = upkeep.prune(file, before=before, most=most, dry_run=arguments.dry_run)
        would = "would be " if arguments.dry_run else ""
        _say(f"{file}: {gone:,} samples {would}deleted, {upkeep.megabytes(left)} left")
    else:
        _say(upkeep.shown(file))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
