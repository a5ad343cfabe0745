"""When may a sequential run of the recorded policy stop?

At a look at which a check is a FAIL, or every check that the row has against its baseline a PASS.
Proofs about shares of completions hold for any number of looks. Those about lengths and rewards do
not, so they stop no run by a FAIL, and their early PASS is asked for at a higher confidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_harness import rules
from grpo_harness.gate.bounds import ALPHA, MINIMUM_PROBLEMS
from grpo_harness.rules import RULES, Rule, Tallies, Terms, bounded

if TYPE_CHECKING:
    from grpo_harness.asked import Task
    from grpo_harness.evaluation import Group, Questions

_ANYTIME = frozenset({"accuracy", "slices", "truncation", "unparsable"})
"""The rules whose proofs hold however often one looks."""

_SINGLE = ("accuracy", "truncation", "unparsable", "length", "reward")
"""The rules that judge a row once, the fastest first."""


@dataclass(frozen=True)
class Awaited:
    """A check that a run waits for, with its part of the risk.

    ``places`` are those of its problems in the plan.
    """

    rule: Rule
    alpha: float
    places: Sequence[int]

    def verdict(self, groups: Sequence[Group], records: Tallies) -> str:
        """Judge the groups so far against the records of all planned problems."""
        rule = self.rule
        now = [rule.part(groups[i].tally) for i in self.places if i < len(groups)]
        then = [rule.part(records[i]) for i in self.places]
        try:
            return rule.judge(now, then, rule.bounds, Terms(self.alpha, True, True)).verdict
        except ValueError:  # the run's check will say what cannot be judged
            return "ERROR"


def awaited(task: Task, questions: Questions, shares: Mapping[str, float]) -> list[Awaited]:
    """Return what a row is judged by: accuracy, and what else the run asks of it.

    ``shares`` are the parts of the risk by rule.
    """
    everything = range(len(questions.problems))
    other = shares.get(rules.UNDECLARED)

    def alpha(name: str) -> float | None:
        share = shares.get(name, other)
        return ALPHA if share is None and name == "accuracy" else share

    found = [
        Awaited(bounded(RULES[name], task.bounds), share, everything)
        for name in _SINGLE
        if (share := alpha(name)) is not None and task.asks(name)
    ]
    if (share := alpha("slices")) is not None and task.asks("slices"):
        places: dict[str, list[int]] = {}
        for place, problem in enumerate(questions.problems):
            for column in questions.task_type.slices:
                places.setdefault(f"{column}={problem.task[column]}", []).append(place)
        found += [
            Awaited(bounded(rules.of_slice(name), task.bounds), share / len(places), of)
            for name, of in places.items()
            if len(of) >= MINIMUM_PROBLEMS
        ]
    if (share := alpha("rewards")) is not None and task.asks("rewards"):
        names = [reward.name for reward in questions.rewards.functions]
        found += [
            Awaited(bounded(rules.of_function(name), task.bounds), share / len(names), everything)
            for name in names
        ]
    return found


def decided(groups: Sequence[Group], records: Tallies, waiting: Sequence[Awaited]) -> bool:
    """Tell whether a run may stop after ``groups`` of the planned ``records``."""
    for check in waiting:
        verdict = check.verdict(groups, records)
        if verdict == "FAIL" and check.rule.name.partition(".")[0] in _ANYTIME:
            return True
        if verdict != "PASS":
            return False
    return bool(waiting)
