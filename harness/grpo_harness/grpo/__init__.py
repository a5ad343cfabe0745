"""GRPO in plain torch: to read, and as the oracle for TRL.

===============  =====================================================================
``formulas.py``  GRPO's formulas, with TRL's deviations as options
``tensors.py``   checks of the tensors that callers pass
``guarded.py``   the formulas with checked arguments: what the other packages call
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
