"""Judge the log of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import project, say
from grpo_harness.logs.recorded import TRAINING
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
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
    settings = project()
    baselines = settings.baselines
    if arguments.record:
        say(f"recorded: {record(name, logs, baselines)}")
    elif len(logs) > 1:
        raise ValueError("several runs: --record records them, and one run is judged")
    else:
        if arguments.decisive and arguments.decisive not in logs[0].rewards:
            known = ", ".join(escape(name, 60) for name in logs[0].rewards) or "none"
            raise ValueError(
                f"--decisive {escape(arguments.decisive, 60)}: the run's rewards are {known}"
            )
        # What needs no recorded runs comes first.
        hacked = hacking(logs[0], {arguments.decisive} - {None} or settings.decisive())
        if len(logs[0].rewards) > 1:
            say(hacked.message())
            verdicts |= {hacked.verdict} & {"FAIL"}
    recorded = load(path_of(name, baselines))
    if arguments.plot:
        plot(logs[0], recorded, arguments.plot)
        say(f"drawn: {arguments.plot}")
    if arguments.record:
        return 0
    judgement = judge(logs[0], recorded)
    say(judgement.message())
    verdicts.add(judgement.verdict)
    if recipe is not None:
        from grpo_harness.logs.reconcile import reconcile

        found = reconcile(logs[0], recipe, device=arguments.device)
        say(found.message())
        verdicts.add(found.verdict)
    return 0 if verdicts <= {"PASS"} else 1
