"""The floor of drawing: the time of the model's matrix products alone, for the same work.

It is what the machine allows: no sampler can be faster with these products. A sampler's speed as a
share of it does not depend on how fast the machine is.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from grpo_harness.engines.engine import Sample

ROWS = 512
"""Rows of a decoding step at most, like those of the engine."""

_PROMPT_TOKENS = 1024
"""Tokens of prompts whose products are timed at once."""


@torch.inference_mode()
def floor(model: Any, prompts: Sequence[int], samples: Sequence[Sample], rounds: int = 8) -> float:
    """Return the seconds of the products: each prompt's tokens once, and each drawn token once.

    ``prompts`` has the tokens of each distinct prompt. A decoding step has as many rows as there
    are samples, at most ``ROWS``. Each size is timed ``rounds`` times, and the least time counts.
    """
    head = model.get_output_embeddings()
    weights = [_weight(m) for m in model.modules() if m is not head and _is_product(m)]
    rows = min(len(samples), ROWS)
    reading = _least([*weights], min(_PROMPT_TOKENS, sum(prompts)), rounds)
    step = _least([*weights, head.weight], rows, rounds)
    return reading * sum(prompts) + step * sum(sample.tokens for sample in samples)


def _is_product(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def _weight(module: Any) -> torch.Tensor:
    """Return a layer's weight as (outputs, inputs)."""
    weight: torch.Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def _least(weights: Sequence[torch.Tensor], rows: int, rounds: int) -> float:
    """Return the least seconds a row of one pass through all weights."""
    given = {of.shape[1]: torch.randn(rows, of.shape[1]).to(of) for of in weights}

    def once() -> None:
        for weight in weights:
            torch.nn.functional.linear(given[weight.shape[1]], weight)

    return min(_seconds(once, weights[0].device) for _ in range(rounds)) / rows


def _seconds(what: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
