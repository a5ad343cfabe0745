"""A recipe becomes TRL's GRPOTrainer, and that a trained policy on disk.

=================  ===================================================================
``recipes.py``     what a GRPO run is made of, and the runs that have a name
``config.py``      a recipe -> one exact GRPOConfig
``recorded.py``    what the recipes resolved to, and what has changed since
``curves.py``      what a training logged, as files
``resources.py``   what a training took: time, tokens, memory
``unfinished.py``  a training's checkpoints until it is finished
``trainer.py``     TRL's GRPOTrainer under watch
``run.py``         the run itself
``processes.py``   several processes that train one policy
=================  ===================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_harness.training.config import resolve
    from grpo_harness.training.curves import Row
    from grpo_harness.training.run import TrainingRun, train
    from grpo_harness.training.trainer import TrainingError

__all__ = ["Row", "TrainingError", "TrainingRun", "resolve", "train"]

_HOME = {
    "Row": "curves",
    "TrainingError": "trainer",
    "TrainingRun": "run",
    "resolve": "config",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    # Late, because they load torch and TRL: the command line answers without them.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
