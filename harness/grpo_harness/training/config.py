"""A ``GRPOConfig``: shown, as plain values, and tried before any weights are loaded."""

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.utils.import_utils import is_liger_kernel_available
from trl.import_utils import is_vllm_available
from trl.trainer.grpo_config import GRPOConfig

from grpo_harness.text import one_line
from grpo_harness.training.keys import RecipeError

_FIELDS = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}

# The newer name if the installed transformers has it, because the older one warns there.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS
)
"""The field that turns gradient checkpointing on."""

_STEPS = 100
"""Steps of a schedule that is tried, where the number of epochs is given."""


def check_usable(where: str, config: GRPOConfig) -> None:
    """Raise ``RecipeError`` for what the trainer would find wrong with the weights in memory.

    Optimizer and schedule are made, of one parameter; packages that are needed must be there.
    """
    with _key(where, "report_to"):
        get_reporting_integration_callbacks(config.report_to)
    for key, there in (
        ("use_vllm", is_vllm_available),
        ("use_liger_kernel", is_liger_kernel_available),
    ):
        if getattr(config, key) and not there():
            raise RecipeError(f"{where}: {key} needs a package that is not installed")
    with _key(where, "optim"):
        try:
            made, options = Trainer.get_optimizer_cls_and_kwargs(config)
        except ValueError as error:
            if "model" not in str(error):  # some optimizers need to see it
                raise
            made, options = torch.optim.AdamW, {}
        weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        if made.__module__.startswith("torch.optim"):
            made(weights, **options)
    with _key(where, "lr_scheduler_type and lr_scheduler_kwargs"):
        steps = config.max_steps if config.max_steps > 0 else _STEPS
        get_scheduler(
            config.lr_scheduler_type,
            optimizer=torch.optim.AdamW(weights, lr=config.learning_rate),
            num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=cast("dict[str, Any]", config.lr_scheduler_kwargs),
        )


@contextmanager
def _key(where: str, keys: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the libraries raise
        raise RecipeError(f"{where}: {keys} cannot be used ({one_line(error)})") from error


def checkpointing(config: GRPOConfig) -> bool:
    """Tell whether activations are recomputed in the backward pass instead of kept."""
    return bool(getattr(config, CHECKPOINTING))


def described(config: GRPOConfig) -> str:
    """Format a resolved config: first the values that are not TRL's defaults, then the rest."""
    device = {key: getattr(config, key) for key in ("bf16", "fp16", "use_cpu", CHECKPOINTING)}
    defaults = settings(GRPOConfig(output_dir=str(config.output_dir), **device))
    values = sorted(settings(config).items())
    chosen = [
        f"  {key} = {value}   (TRL: {defaults.get(key)})"
        for key, value in values
        if value != defaults.get(key)
    ]
    left = ", ".join(f"{key}={value}" for key, value in values if value == defaults.get(key))
    rest = textwrap.fill(
        f"as TRL has it: {left}", 100, initial_indent="  ", subsequent_indent="  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([*chosen, rest])


def settings(config: GRPOConfig) -> dict[str, Any]:
    """Return a config as plain JSON values, without the folders it writes to."""
    values: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call, unused-ignore]
    for local in ("output_dir", "run_name", "logging_dir"):
        values.pop(local, None)
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
