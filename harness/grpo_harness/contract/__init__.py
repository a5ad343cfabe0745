"""The contract of a GRPO step: what TRL's trainer must compute.

A training run is watched from outside, and every step is recomputed from the raw completions by the
formulas in plain torch. Each invariant is a function that returns None or raises
`BrokenInvariantError` with its name, the number, the place and the usual cause.

==================  ==================================================================
``trace.py``        what a run did: batches of completions, micro-batches, steps
``policies.py``     test policies with features that the embedded pair lacks
``runs.py``         the runs that the invariants check
``conventions.py``  how TRL computes a step, and known deviations
``invariant.py``    what an invariant is, how it compares figures and fails
``oracle.py``       recomputes a step
``observer.py``     watches a run from outside
``adam.py``         recomputes an update
``rollouts.py``     invariants of what is drawn, scored and counted
``update.py``       invariants of log-probabilities, loss and gradient
``weights.py``      invariants of the weights
``end_to_end.py``   invariants of whole runs
``exclusions.py``   settings of a trainer that there is no formula for
``processes.py``    several processes that train one policy, as one run
``watched.py``      any trainer under the contract
==================  ==================================================================
"""

from grpo_harness.contract import end_to_end, rollouts, update, weights  # noqa: F401 - importing registers them
from grpo_harness.contract.invariant import INVARIANTS, BrokenInvariantError
from grpo_harness.contract.observer import observe
from grpo_harness.contract.oracle import Oracle
from grpo_harness.contract.runs import RUNS
from grpo_harness.contract.trace import Trace
from grpo_harness.contract.watched import Watched, watch

__all__ = [
    "INVARIANTS",
    "RUNS",
    "BrokenInvariantError",
    "Oracle",
    "Trace",
    "Watched",
    "observe",
    "watch",
]
