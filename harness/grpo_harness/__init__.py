"""Does the policy still answer, is the reward still the reward, does GRPO still learn?

The map, in the order of a sample's way. A module imports only from those above it.

=================  ==============================================================
``errors.py``      the one kind of error that is a message to a person
``text.py``        completions as text: read without trust, shown without harm
``tasks/``         what is asked: problems with a known answer. One file, one source
``rewards/``       completions -> numbers, by TRL's calling convention
``policy/``        a name -> files on disk, whole and known by their content
``engines/``       how completions are drawn: requests in, samples out, in order
``store.py``       every sample, once, on disk
``evaluation.py``  problems × policy -> groups of scored completions
``gate/``          numbers in, verdict out
``baselines/``     the stored reference: file, recording, pruning, provenance
``reruns.py``      the runs that did not pass, so that a rerun adds to their evidence
``measures.py``    what a check looks at in one problem, and the problems that got worst
``rules.py``       evaluations against baselines and each other, by the rules
``report/``        rows -> tables for a terminal, Markdown and JSON
``settings.py``    options over pyproject.toml over defaults
``session.py``     what the tests of one run share
``plugin/``        pytest's options, fixtures, assertions and summary
``grpo/``          the algorithm in plain torch: the readable statement, and the oracle for TRL
``training/``      a recipe -> TRL's GRPOTrainer -> a trained policy on disk
``contract/``      what a step of GRPO must compute, to the digit: TRL watched from outside
``learning/``      short runs -> has GRPO learned, by what it gained
``nano/``          the embedded pair of policies: weights and cards
``cli.py``         the command line: train, recipes, resources
=================  ==============================================================
"""

from grpo_harness.rewards.rule import reward_func, rule_reward
from grpo_harness.tasks import Problem, TaskType, make_problems

__all__ = ["Problem", "TaskType", "make_problems", "reward_func", "rule_reward"]
