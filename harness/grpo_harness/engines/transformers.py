"""The transformers engine: batched, left-padded ``generate`` with a seed for every row.

``generate`` draws a whole batch from one random stream, so that a row's luck depends on its
neighbours. Here the draw is made before ``generate`` sees the logits: one uniform number per
row and step, fixed by the row's seed, is looked up in the row's cumulative distribution. What
``generate`` gets has a single possible token left, and its own decoding is greedy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grpo_harness.engines.engine import Progress, Request, Sample, Sampling
from grpo_harness.policy.policy import Policy

_PINNED = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""What would bend the policy's distribution, switched off whatever a checkpoint asks for.

The cuts that only act on drawing (top_k, min_p, typical_p and their like) have no part in it: the
draw is made here, by temperature and top_p alone.
"""

_LIKELY = 256
"""How many of the likeliest tokens are looked at before the whole vocabulary is."""


class TransformersSampler:
    """Samples a policy through transformers, ``batch_size`` rows at a time.

    A batch that does not fit into the accelerator's memory is halved, for the rest of the
    sampler's life; a single row that does not fit is a sample with an error.
    """

    def __init__(self, policy: Policy, sampling: Sampling, *, batch_size: int = 256) -> None:
        self._policy = policy
        self._sampling = sampling
        self._batch_size = batch_size

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings, what is pinned beside them, and the end tokens."""
        return {
            **self._sampling.asdict(),
            **_PINNED,
            "eos_token_ids": list(self._policy.eos_token_ids),
        }

    def generation_config(self) -> GenerationConfig:
        """Return the generation config that is used, with nothing left to a model's own."""
        return GenerationConfig(
            **_PINNED,
            max_new_tokens=self._sampling.max_new_tokens,
            # The draw happens in _SeededDraw: what is left to generate is to take the maximum.
            do_sample=False,
            num_return_sequences=1,
            use_cache=True,
            eos_token_id=list(self._policy.eos_token_ids),
            pad_token_id=self._policy.tokenizer.pad_token_id,
            bos_token_id=self._policy.tokenizer.bos_token_id,
        )

    def sample(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Sample]:
        """Draw one sample per request; the order of the answers is that of the requests."""
        if not requests:
            return []
        # Neighbours of like length waste the least padding. The longest come first, so that
        # memory runs out at once or never.
        tokenized = self._policy.tokenizer(
            [request.prompt for request in requests], add_special_tokens=False
        )["input_ids"]
        order = sorted(range(len(requests)), key=lambda i: -len(tokenized[i]))
        samples: dict[int, Sample] = {}
        while len(samples) < len(order):
            rows = order[len(samples) : len(samples) + self._batch_size]
            try:
                drawn = self._batch([tokenized[i] for i in rows], [requests[i].seed for i in rows])
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if len(rows) > 1:
                    self._batch_size = len(rows) // 2
                    continue
                drawn = [Sample("", 0, truncated=False, error=str(error))]
            samples.update(zip(rows, drawn, strict=True))
            if progress is not None:
                progress(len(rows))
        return [samples[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], seeds: list[int]) -> list[Sample]:
        tokenizer, device = self._policy.tokenizer, self._policy.device
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(
            device
        )
        processors = LogitsProcessorList()
        if not self._sampling.greedy:
            processors.append(_SeededDraw(seeds, self._sampling, device))
        output = self._policy.model.generate(  # type: ignore[operator]  # it is typed as a Tensor
            **batch,
            generation_config=self.generation_config(),
            logits_processor=processors,
        )
        width = batch["input_ids"].shape[1]
        return [self._sample(row) for row in output[:, width:].tolist()]

    def _sample(self, tokens: list[int]) -> Sample:
        ends = (i for i, token in enumerate(tokens) if token in self._policy.eos_token_ids)
        end = next(ends, None)
        text = self._policy.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return Sample(text, len(tokens) if end is None else end + 1, truncated=end is None)


class _SeededDraw(LogitsProcessor):
    """Draws each row's next token from the row's own seed and leaves only that token."""

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        rows = [
            [rng.random() for _ in range(sampling.max_new_tokens)]
            for rng in map(random.Random, seeds)
        ]
        self._uniform = torch.tensor(rows, dtype=torch.float32, device=device)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return ``scores`` (rows × vocabulary) with all but the drawn token at -inf."""
        uniform = self._uniform[:, self._step, None]
        self._step += 1
        spread = (scores.float() / self._sampling.temperature).softmax(-1)
        # top_p nearly always lies within the first few hundred tokens, and sorting those is many
        # times cheaper than sorting a vocabulary of 150,000; the result is the same.
        probabilities, tokens = spread.topk(min(_LIKELY, spread.shape[-1]))
        if probabilities.sum(-1).min() < self._sampling.top_p:
            probabilities, tokens = spread.sort(-1, descending=True)
        cumulative = probabilities.cumsum(-1)
        # A token stays while the more likely ones before it fall short of top_p, so the first
        # always does; the draw is uniform over the mass that stays.
        kept = (cumulative - probabilities < self._sampling.top_p).sum(-1, keepdim=True)
        mass = cumulative.gather(-1, kept - 1)
        place = torch.searchsorted(cumulative, uniform * mass, right=True)
        drawn = tokens.gather(-1, torch.minimum(place, kept - 1))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)
