"""The contract of a GRPO step: what TRL's trainer must compute for a recipe, to the digit.

A run of the product is watched from outside (``witness.py``), and every step of it is computed
anew from the raw completions by `grpo_harness.grpo.formulas` (``oracle.py``), by TRL's conventions
(``conventions.py``). The invariants compare: those of what is drawn (``drawing.py``), of the loss
and gradient that are made of it (``update.py``), of the weights that this moves (``weights.py``,
by the formulas in ``adam.py``), and of whole runs (``whole.py``). Each is a function that returns
in silence or raises `BrokenInvariantError`, with its name, the number, the place, and what such a
difference usually means (``invariant.py``).
"""

from grpo_harness.contract import drawing, update, weights, whole  # noqa: F401 - their import names them
from grpo_harness.contract.invariant import INVARIANTS, BrokenInvariantError
from grpo_harness.contract.oracle import Oracle
from grpo_harness.contract.runs import RUNS
from grpo_harness.contract.seen import Witness
from grpo_harness.contract.witness import watch

__all__ = ["INVARIANTS", "RUNS", "BrokenInvariantError", "Oracle", "Witness", "watch"]
