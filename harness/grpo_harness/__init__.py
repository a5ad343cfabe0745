"""Test a GRPO-trained policy, its rule reward and its training for regressions.

The modules, in import order: a module imports only from those above it. The same holds for the
files of a package, in the order of its own table.

=================  ==============================================================
``errors.py``      the base class of errors that are messages to the user
``text.py``        untrusted text: parse it, display it safely; digests
``atomic.py``      recorded files: read as a checked kind, replaced whole
``tasks/``         problems with a known answer
``rewards/``       completions -> numbers, by TRL's calling convention; outcomes
``policy/``        a name -> complete files on disk, identified by digest. No weights
``engines/``       draw completions: requests in, samples out, in order
``store.py``       every sample, once, in one SQLite file
``upkeep.py``      what the store holds: shown, pruned, repaired
``evaluation.py``  problems × policy -> groups of scored completions
``gate/``          numbers in, verdict out
``rules.py``       the table of rules: name, question, measure, judge
``checks.py``      judge evaluations by a rule, and say what was found
``baselines/``     the stored references: file, recording, pruning, provenance
``reruns.py``      runs that did not pass: a rerun pools its samples with theirs
``history/``       one small file a run: since when a figure has changed
``report/``        rows -> one file of everything, a page, tables, a comment
``export/``        a report -> the logs of inspect_ai, Every Eval Ever's records
``tables.py``      a table of settings as a checked model, with messages
``asked.py``       what a run asks: each task with its rewards and sampling
``stopping.py``    when a sequential run may stop
``served.py``      which policies are served, and where
``settings.py``    one model of all settings: options over pyproject.toml over defaults
``sizing.py``      how many problems and samples each row asks, planned from its baseline
``begun.py``       the report of a run before it found anything
``session.py``     what the tests of one run share
``choice/``        which of several policies is best, which checkpoint went wrong
``canaries.py``    what a checkpoint's weights say of some texts, recorded
``admission.py``   does a server serve the policy that it is said to serve
``grpo/``          GRPO in plain torch: to read, and as the oracle for TRL
``training/``      a recipe -> TRL's GRPOTrainer -> a trained policy on disk
``logs/``          the log of a training run, judged against recorded runs
``throughput.py``  how much of what the machine can do the sampler reaches
``plugin/``        pytest's options, fixtures, assertions, summary
``contract/``      what a GRPO step must compute, checked on TRL from outside
``learning/``      short runs -> has GRPO learned, by reward and held-out accuracy
``nano/``          the embedded pair of policies: weights and cards
``init/``          the first day: what is in a repository, and the files that it needs
``commands/``      the commands of the command line
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
    # Imported late: pytest imports the plugin in every run if this package is installed.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
