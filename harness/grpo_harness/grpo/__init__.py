"""The algorithm in plain torch: the readable statement, and the oracle for TRL.

===============  =====================================================================
``formulas.py``  GRPO's formulas, with TRL's departures from them as options
``tensors.py``   tensors as callers hand them over, checked
``guarded.py``   the formulas behind their guards: what the rest of the package calls
===============  =====================================================================
"""

from grpo_harness.grpo.formulas import Estimator, LossType, Scale
from grpo_harness.grpo.guarded import (
    advantages,
    clipped_surrogate,
    entropy,
    grpo_loss,
    kl,
    log_probabilities,
    ratio,
)

__all__ = [
    "Estimator",
    "LossType",
    "Scale",
    "advantages",
    "clipped_surrogate",
    "entropy",
    "grpo_loss",
    "kl",
    "log_probabilities",
    "ratio",
]
