"""Draw a batch by transformers' own ``generate``, for models whose prompts cannot be shared.

``generate`` draws a whole batch from one random stream, so a row's draws depend on the other rows.
Here the draw is made before ``generate`` sees the logits, from each row's own random numbers, and
``generate`` gets logits with a single possible token: it decodes greedily.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from grpo_harness.engines.completions import Completions
from grpo_harness.engines.draw import DecodingError, NotFiniteError, draw, penalize
from grpo_harness.engines.engine import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    config: GenerationConfig,
    completions: Completions,
) -> list[list[int]]:
    """Return the tokens that each row draws; some may be behind its end.

    Raises ``DecodingError``.
    """
    batch = tokenizer.pad(
        {"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt"
    ).to(model.device)
    width = batch["input_ids"].shape[1]
    drawing = _Drawing(prompts, seeds, sampling)
    stop = [_Stop(width, completions)] if sampling.stop else []
    output = model.generate(  # type: ignore[operator]  # it is typed as a Tensor
        **batch,
        generation_config=config,
        logits_processor=LogitsProcessorList([drawing]),
        stopping_criteria=StoppingCriteriaList(stop),
    )
    return [list(row) for row in output[:, width:].tolist()]


class _Drawing(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Draws each row's next token from the row's own numbers and leaves only that token."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> None:
        self._sampling = sampling
        self._numbers = [random.Random(seed) for seed in seeds]
        self._lengths = [len(prompt) for prompt in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave one token in each row of ``scores`` (rows × vocabulary), the drawn one."""
        logits = scores.float()
        if self._sampling.repetition_penalty != 1:
            width = max(self._lengths)
            # The padding on the left is no token of the prompt.
            there = input_ids.clone()
            for row, length in enumerate(self._lengths):
                there[row, : width - length] = input_ids[row, -1]
            logits = penalize(logits.clone(), there, self._sampling.repetition_penalty)
        uniform = torch.tensor(
            [numbers.random() for numbers in self._numbers],
            dtype=torch.float32, device=scores.device,
        )  # fmt: skip
        try:
            drawn = draw(logits, uniform, self._sampling)
        except NotFiniteError as error:
            padding = max(self._lengths) - self._lengths[error.row]
            raise DecodingError(input_ids[error.row, padding:].tolist()) from None
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


class _Stop(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends the rows whose last token completes a stop string; prompts have ``width`` tokens."""

    def __init__(self, width: int, completions: Completions) -> None:
        self._width, self._completions = width, completions

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Tell for each row of ``input_ids`` (rows × tokens) whether it has ended."""
        drawn = input_ids[:, self._width :].tolist()
        ended = [self._completions.stopped(tokens) for tokens in drawn]
        return torch.tensor(ended, device=input_ids.device)
