"""Which policy is best, and at which checkpoint it went wrong."""

from __future__ import annotations

import argparse
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.commands.common import add_drawing, say, session
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.commands.common import Commands

_WIDTH = 150
"""Columns of a table where there is no terminal."""


def add(commands: Commands) -> None:
    """Add the commands to a parser."""
    command = commands.add_parser(
        "compare",
        help="judge policies pairwise on the same problems",
        description="Ask some policies the same problems, and judge every two of them by how often "
        "they are correct, on each task and on all together. The risk that any two equal ones are "
        "told apart is that of a run, over all pairs and tasks together.",
    )
    command.add_argument("policies", nargs="+", metavar="POLICY", help="two or more, or a pattern")
    add_drawing(command)
    command.add_argument("--report", type=Path, metavar="DIR", help="write a report, with samples")
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "bisect",
        help="find the first checkpoint that has dropped",
        description="Find the first of some checkpoints, in the order of their steps, that is "
        "worse than a good one, by a binary search. Each that is asked gets as many problems as "
        "decide, and the answer is wrong in at most 5 % of cases. Where all problems do not "
        "decide, it is a range, and the exit status is 1.",
    )
    command.add_argument("--good", required=True, metavar="POLICY", help="a policy before the drop")
    command.add_argument("--bad", required=True, metavar="POLICY", help="one after it")
    command.add_argument(
        "candidates", nargs="+", metavar="CHECKPOINT", help="those between, or a pattern"
    )
    add_drawing(command)
    command.set_defaults(run=_bisect)


def _compare(arguments: argparse.Namespace) -> None:
    from grpo_harness.choice import named, pairs, shown
    from grpo_harness.policy import load
    from grpo_harness.report.files import begin

    started = datetime.now(UTC)
    names = named.policies(arguments.policies, Path.cwd())
    if len(names) < 2:
        raise named.ChoiceError(f"{escape(names[0].text)} alone: name two policies or more")
    with session(arguments) as opened:
        settings = opened.settings
        tasks = named.chosen(settings, arguments.task)
        asked = {task.source.name: named.problems(settings, task) for task in tasks}
        policies = [load(name) for name in names]
        named.check_apart(policies)
        if arguments.report is not None:
            begin(arguments.report)
        say(f"{len(names)} policies, seed {opened.run_seed}")
        found = named.evaluations(opened, policies, asked)
        bounds = [*(task.bounds for task in tasks), settings.bounds]
        judged = pairs.compare(found, bounds, settings.table.gate.alpha)
        width = shutil.get_terminal_size((_WIDTH, 0)).columns
        for line in shown.table(judged).terminal(width):
            say(line)
        say(shown.summary(judged))
        if arguments.report is not None:
            for path in shown.write(arguments.report, opened, found, judged, started):
                say(f"written: {path}")


def _bisect(arguments: argparse.Namespace) -> int:
    from grpo_harness.baselines.recording import PROBLEMS
    from grpo_harness.choice import named, shown
    from grpo_harness.choice.search import Probe, bisect
    from grpo_harness.policy import PolicyName

    cwd, began = Path.cwd(), time.monotonic()
    good, bad = (PolicyName(text, cwd) for text in (arguments.good, arguments.bad))
    between = named.between(good, bad, arguments.candidates, cwd)
    named.check_alike([good, bad, *between])
    names = [*between, bad, good]
    with session(arguments) as opened:
        settings = opened.settings
        tasks = named.chosen(settings, arguments.task)
        most = min(named.problems(settings, task, PROBLEMS) for task in tasks)
        each = f" of each of {len(tasks)} tasks" if len(tasks) > 1 else ""
        measured = named.Measured(opened, tasks, most, names)
        named.check_apart([measured.policy(len(between)), measured.policy(-1)])
        say(
            f"{len(between)} checkpoints between {escape(good.text)} and {escape(bad.text)}, up to "
            f"{most} problems{each}, seed {opened.run_seed}"
        )

        def told(probe: Probe) -> None:
            say(shown.probed(probe, names[probe.number], bad=probe.number == len(between)))

        answer = bisect(len(between), measured.rates, most=most, told=told)
        if answer.bad.state != "dropped":
            raise named.ChoiceError(
                f"there is nothing to bisect: {escape(bad.text)} is not proven to be worse than "
                f"{escape(good.text)} by {answer.bad.n} problems{each}; it lost "
                f"{shown.points(answer.bad.lost)}. Name a worse one, or ask more --problems or "
                "--samples"
            )
        for line in shown.concluded(answer, names):
            say(line)
        full = len(names) * most * sum(settings.draws(task.source) for task in tasks)
        say(shown.cost(answer, measured, full, len(between), time.monotonic() - began))
    return 0 if answer.found else 1
