"""The engine of transformers: batched, left-padded ``generate`` with a seed for every row.

``generate`` draws a whole batch from one random stream, so that a row's luck depends on its
neighbours. Here the draw is made before ``generate`` sees the logits: one uniform number per
row and step, fixed by the row's seed, is looked up in the row's cumulative distribution. What
``generate`` gets has a single possible token left, and its own decoding is greedy.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grpo_harness.engines.engine import EngineError, Progress, Request, Sample, Sampling
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.weights import (
    device_of,
    dtype_of,
    first_not_finite,
    load_weights,
    loaded_digest,
)
from grpo_harness.policy.checkpoint import elements
from grpo_harness.policy.policy import Policy
from grpo_harness.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a RuntimeError says where torch has no error of its own for it."""


class TransformersEngine:
    """Samples a policy through transformers, ``batch_size`` rows at a time.

    ``device`` is ``auto`` (CUDA where there is one, else the CPU) or any of torch's; ``dtype``
    is ``auto`` (bfloat16 where CUDA supports it, else float16 on CUDA, else float32),
    ``bfloat16``, ``float16`` or ``float32``. ``residents`` are the engines that share the device:
    some of them let their weights go where there is no room for these.

    A batch that does not fit into memory is halved, for the rest of the engine's life; a single
    row that does not fit is a sample with an error. Raises ``PolicyError``.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 256,
        residents: Residents | None = None,
    ) -> None:
        self.policy = policy
        self.device = device_of(device)
        self.dtype = dtype_of(dtype, self.device)
        self._sampling = sampling
        self._batch_size = batch_size
        self._residents = residents or Residents("all")
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model with the policy's weights, which are loaded if they are not in memory."""
        if self._model is None:
            self._residents.make_room(self)
            self._model = load_weights(self.policy, self.device, self.dtype)
            self._residents.take_in(self, loaded_digest(self._model))
        return self._model

    def __enter__(self) -> Self:
        """Take the weights into memory."""
        _ = self.model
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the weights go."""
        self.close()

    def close(self) -> None:
        """Let the weights go; the next request takes them into memory again."""
        self._model = None
        self._residents.leave(self)
        _free()

    def fits(self) -> bool:
        """Tell whether the device has room for the weights, and as much again to draw with."""
        room = psutil.virtual_memory().available
        if self.device.type == "cuda":
            _free()
            room = torch.cuda.mem_get_info(self.device)[0]
        return bool(room >= 2 * elements(self.policy.checkpoint) * self.dtype.itemsize)

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings, what is pinned beside them, and the end tokens."""
        return {
            **self._sampling.asdict(),
            **_PINNED,
            "eos_token_ids": list(self.policy.eos_token_ids),
        }

    def identity(self) -> dict[str, Any]:
        """Return what draws: the engine, the kind of device and the number format."""
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "engine": "transformers",
            "device": self.device.type,
            "hardware": hardware,
            "dtype": str(self.dtype).removeprefix("torch."),
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
            eos_token_id=list(self.policy.eos_token_ids),
            pad_token_id=self.policy.tokenizer.pad_token_id,
            bos_token_id=self.policy.tokenizer.bos_token_id,
        )

    def sample(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Sample]:
        """Draw one sample per request; the order of the samples is that of the requests.

        Raises ``PolicyError`` for weights that cannot be loaded, and ``EngineError`` where the
        policy's logits are not numbers.
        """
        if not requests:
            return []
        # Neighbours of like length waste the least padding. The longest come first, so that
        # memory runs out at once or never.
        tokenized = self.tokens([request.prompt for request in requests])
        order = sorted(range(len(requests)), key=lambda i: -len(tokenized[i]))
        samples: dict[int, Sample] = {}
        while len(samples) < len(order):
            rows = order[len(samples) : len(samples) + self._batch_size]
            drawn = self._fitting([tokenized[i] for i in rows], [requests[i].seed for i in rows])
            if drawn is None:
                self._batch_size = len(rows) // 2
                continue
            samples.update(zip(rows, drawn, strict=True))
            if progress is not None:
                progress(len(rows))
        return [samples[i] for i in range(len(requests))]

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered prompts, to which nothing is added."""
        ids: list[list[int]] = self.policy.tokenizer(list(prompts), add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    def _fitting(self, prompts: list[list[int]], seeds: list[int]) -> list[Sample] | None:
        """Draw a batch; return ``None`` where it does not fit into memory and a part of it may."""
        try:
            with _out_of_memory_as_one_error():
                return self._batch(prompts, seeds)
        except MemoryError as error:
            _free()
            if len(prompts) > 1:
                return None
            return [Sample("", 0, truncated=False, error=f"out of memory: {one_line(error)}")]

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], seeds: list[int]) -> list[Sample]:
        model = self.model
        batch = self.policy.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        ).to(self.device)
        draw = _SeededDraw(seeds, self._sampling, self.device)
        try:
            output = model.generate(  # type: ignore[operator]  # it is typed as a Tensor
                **batch,
                generation_config=self.generation_config(),
                logits_processor=LogitsProcessorList([draw]),
            )
        except _NotFiniteError as error:
            where = first_not_finite(model, error.tokens)
            dtype = str(self.dtype).removeprefix("torch.")
            raise EngineError(
                f"{self.policy.checkpoint} gives logits that are NaN or infinite in {dtype}: the "
                f"first module whose output is not finite is {where}. If the checkpoint is sound, "
                "a wider number format helps: --grpo-dtype float32"
            ) from None
        width = batch["input_ids"].shape[1]
        return [self._sample(row) for row in output[:, width:].tolist()]

    def _sample(self, tokens: list[int]) -> Sample:
        ends = (i for i, token in enumerate(tokens) if token in self.policy.eos_token_ids)
        end = next(ends, None)
        text = self.policy.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return Sample(text, len(tokens) if end is None else end + 1, truncated=end is None)


class _NotFiniteError(Exception):
    """Logits without a maximum; ``tokens`` are those before it, shape (1, tokens), unpadded."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens


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
        """Return ``scores`` (rows × vocabulary) with all but the drawn token at -inf.

        Raises ``_NotFiniteError`` for a row that has no greatest finite score.
        """
        greatest = scores.amax(-1)
        if not bool(greatest.isfinite().all()):
            row = int((~greatest.isfinite()).nonzero()[0])
            raise _NotFiniteError(input_ids[row, None])
        if self._sampling.greedy:
            return scores
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


@contextmanager
def _out_of_memory_as_one_error() -> Iterator[None]:
    """Raise ``MemoryError`` for whatever says that a device or the host has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if not any(said in str(error) for said in _OUT_OF_MEMORY):
            raise
        raise MemoryError(str(error)) from error


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
