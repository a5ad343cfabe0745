"""The contract of a GRPO step: what TRL's trainer must compute for a recipe, to the digit.

A run of the product is watched from outside (``witness.py``), every step of it is computed anew
from the raw completions by `harness.grpo` (``oracle.py``), and the invariants compare
(``invariants.py``). Each is a function that returns in silence or raises `BrokenInvariantError`,
with its name, the number, the place, and what such a difference usually means.
"""

from harness.contract.invariants import INVARIANTS, BrokenInvariantError
from harness.contract.oracle import Oracle
from harness.contract.runs import RUNS
from harness.contract.witness import Witness, watch

__all__ = ["INVARIANTS", "RUNS", "BrokenInvariantError", "Oracle", "Witness", "watch"]
