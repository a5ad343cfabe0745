"""The contract of a GRPO step: what TRL's trainer must compute for a recipe, to the digit.

A run of the product is watched from outside, and every step of it is computed anew from the raw
completions by the formulas in plain torch. Each invariant is a function that returns in silence
or raises `BrokenInvariantError`, with its name, the number, the place, and what such a difference
usually means.

==================  ==================================================================
``trace.py``        what a run did: batches of completions, micro-batches, steps
``policies.py``     policies that real ones are like and the embedded pair is not
``runs.py``         the runs that the contract is read from
``observer.py``     watches a run from outside
``conventions.py``  how TRL computes a step, and what it could do otherwise
``lengths.py``      how long gradients are, and how far apart
``invariant.py``    what an invariant is, and how it fails
``oracle.py``       a step computed anew
``adam.py``         an update computed anew
``rollouts.py``     invariants of what is drawn, scored and counted
``update.py``       invariants of log-probabilities, loss and gradient
``weights.py``      invariants of the weights
``end_to_end.py``   invariants of whole runs
==================  ==================================================================
"""

from grpo_harness.contract import end_to_end, rollouts, update, weights  # noqa: F401 - their import names them
from grpo_harness.contract.invariant import INVARIANTS, BrokenInvariantError
from grpo_harness.contract.observer import make, watch
from grpo_harness.contract.oracle import Oracle
from grpo_harness.contract.runs import RUNS
from grpo_harness.contract.trace import Trace

__all__ = ["INVARIANTS", "RUNS", "BrokenInvariantError", "Oracle", "Trace", "make", "watch"]
