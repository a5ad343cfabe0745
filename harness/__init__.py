"""Does the policy still answer, is the reward still the reward, does GRPO still learn?

The map, in the order of a sample's way. A module imports only from those above it.

=================  ==============================================================
``errors.py``      the one kind of error that is a message to a person
``text.py``        completions as text: read without trust, shown without harm
``tasks/``         what is asked: one file, one task type
``reward.py``      prompt and completion -> number
``checkpoint.py``  a name -> files on disk, whole and known by their content
``policy.py``      a checkpoint -> model and tokenizer on a device, with its fingerprint
``sampling/``      how answers are drawn: one file, one engine
``store.py``       every sample, once, on disk
``evaluation.py``  problems × policy -> groups of scored completions
``inputs.py``      numbers as callers hand them over, checked
``stats.py``       exact tests and intervals: numbers in, numbers out
``gate.py``        the rules: measurement against reference -> verdict
``provenance.py``  what made a measurement besides the policy: commit, environment, code
``baseline.py``    the stored reference: load, compare, write
``recording.py``   a new baseline, tested against the one before it and the anchor
``pruning.py``     what no run asks for any more, and its removal
``attempts.py``    the runs that did not pass, so that a rerun adds to their evidence
``measures.py``    what a check looks at in one problem, and the problems that got worst
``checks.py``      evaluations against baselines and each other, by the rules
``report.py``      rows -> tables for a terminal, Markdown and JSON
``settings.py``    options over pyproject.toml over defaults
``session.py``     what the tests of one run share
``plugin/``        pytest's options, fixtures, assertions and summary
``recipes.py``     what a GRPO run is made of, and the runs that have a name
``tensors.py``     tensors as callers hand them over, checked
``grpo.py``        the algorithm in plain torch: the readable statement, and the oracle for TRL
``training/``      a recipe -> TRL's GRPOTrainer -> a trained policy on disk
``command.py``     the command line: train, recipes, resources
``learning.py``    short runs -> has GRPO learned, by what it gained
``contract/``      what a step of GRPO must compute, to the digit: TRL watched from outside
``calibration/``   the gate's own test: false alarms, power, mutants
``nano/``          the embedded pair of policies, and the script that makes them
=================  ==============================================================
"""

from harness.reward import reward_func, rule_reward
from harness.tasks import Problem, TaskType, make_problems

__all__ = ["Problem", "TaskType", "make_problems", "reward_func", "rule_reward"]
