"""Does the policy still answer, is the reward still the reward, does GRPO still learn?

The map, in the order of a sample's way. A module imports only from those above it, and in a room
of several files those import only from what stands above them in the room's own map.

=================  ==============================================================
``errors.py``      the one kind of error that is a message to a person
``text.py``        foreign text: read without trust, shown without harm; digests
``tasks/``         what is asked: problems with a known answer
``rewards/``       completions -> numbers, by TRL's calling convention; outcomes
``policy/``        a name -> files on disk, whole and known by their content. No weights
``engines/``       how completions are drawn: requests in, samples out, in order
``store.py``       every sample, once, on disk
``evaluation.py``  problems × policy -> groups of scored completions
``gate/``          numbers in, verdict out
``rules.py``       the one table of what is asked: name, question, measure, judge
``baselines/``     the stored reference: file, recording, pruning, provenance
``reruns.py``      the runs that did not pass, so that a rerun adds to their evidence
``report/``        rows -> tables for a terminal, Markdown and JSON
``settings.py``    one model of all settings: options over pyproject.toml over defaults
``session.py``     what the tests of one run share
``plugin/``        pytest's options, fixtures, assertions, summary
``grpo/``          the algorithm in plain torch: the readable statement, and the oracle for TRL
``training/``      a recipe -> TRL's GRPOTrainer -> a trained policy on disk
``contract/``      what a step of GRPO must compute, to the digit: TRL watched from outside
``learning/``      short runs -> has GRPO learned, by what it gained
``nano/``          the embedded pair of policies: weights and cards
``cli.py``         the command line
=================  ==============================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_harness.rewards.rule import reward_func, rule_reward
    from grpo_harness.tasks import Problem, TaskType, make_problems

__all__ = ["Problem", "TaskType", "make_problems", "reward_func", "rule_reward"]

_HOME = {
    **dict.fromkeys(("Problem", "TaskType", "make_problems"), "tasks"),
    **dict.fromkeys(("reward_func", "rule_reward"), "rewards.rule"),
}


def __getattr__(name: str) -> Any:
    # Late: the plugin is imported by every pytest run beside which this package is installed.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
