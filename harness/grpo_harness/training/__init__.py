"""Train a policy by a recipe, with TRL's GRPOTrainer.

=================  ===================================================================
``builtin.py``     the built-in recipes: files in ``recipes/``
``keys.py``        the keys of a recipe, and what each may be
``reading.py``     YAML, read safely and without losing a key
``config.py``      a GRPOConfig: shown, and tried before weights are loaded
``files.py``       a recipe: TRL's YAML and a block of our own -> one exact GRPOConfig
``recorded.py``    the recorded configs of recipes, and what has changed since
``curves.py``      what a training logged, as files
``resources.py``   what a training took: time, tokens, memory
``unfinished.py``  a training's checkpoints until it is finished
``trainer.py``     TRL's GRPOTrainer with checks
``shrunk.py``      a policy's own architecture and tokenizer, but small
``data.py``        the rows that a recipe trains and evaluates on
``order.py``       which training prompts each step asks
``job.py``         what one run trains: a recipe with everything that it names
``run.py``         one training run
``processes.py``   several processes that train one policy
=================  ===================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_harness.training.curves import Row
    from grpo_harness.training.files import Recipe, load
    from grpo_harness.training.run import TrainingRun, train
    from grpo_harness.training.trainer import TrainingError

__all__ = ["Recipe", "Row", "TrainingError", "TrainingRun", "load", "train"]

_HOME = {
    "Recipe": "files",
    "Row": "curves",
    "TrainingError": "trainer",
    "TrainingRun": "run",
    "load": "files",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    # Imported late: they load torch and TRL, which the command line often does not need.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
