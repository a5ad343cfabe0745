"""The engine of transformers: batched, left-padded ``generate`` with a seed for every row.

``generate`` draws a whole batch from one random stream, so a row's draws depend on the other rows.
Here the draw is made before ``generate`` sees the logits: one uniform number per row and step, from
the row's seed, is looked up in the row's cumulative distribution. ``generate`` gets logits with a
single possible token, and decodes greedily.

A stop string ends a row where its text first has one. The text decides, and :class:`_Stop` only
spares the steps after it.
"""

from __future__ import annotations

import copy
import gc
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

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
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""Settings that would change the policy's distribution, switched off whatever a checkpoint says.

typical_p and similar settings act only on sampling in ``generate``. They have no effect, because
the draw is made here, by what :class:`Sampling` has.
"""

_LIKELY = 256
"""The number of most likely tokens that are searched before the whole vocabulary."""

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of a RuntimeError that mean out of memory, where torch has no error class for it."""


class TransformersEngine:
    """Samples a policy through transformers, ``batch_size`` rows at a time.

    ``device`` is ``auto`` (CUDA where there is one, else the CPU) or any of torch's; ``dtype`` is
    ``auto`` (bfloat16 where CUDA supports it, else float16 on CUDA, else float32), ``bfloat16``,
    ``float16`` or ``float32``. ``residents`` are the engines that share the device: some of them
    release their weights if there is no memory for these.

    If a batch does not fit into memory, the batch size is halved for the rest of the engine's life;
    a single row that does not fit is a sample with an error. Raises ``PolicyError``.
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
        self._owner: TransformersEngine | None = None

    def drawing(self, sampling: Sampling) -> TransformersEngine:
        """Return an engine of the same policy and weights that draws otherwise."""
        other = copy.copy(self)
        other._sampling, other._owner = sampling, self
        return other

    @property
    def model(self) -> PreTrainedModel:
        """The model with the policy's weights, which are loaded if they are not in memory."""
        if self._owner is not None:
            return self._owner.model
        if self._model is None:
            self._residents.make_room(self)
            model = load_weights(self.policy, self.device, self.dtype)
            self._residents.take_in(self, loaded_digest(model))
            self._model = model
        return self._model

    def __enter__(self) -> Self:
        """Load the weights into memory."""
        _ = self.model
        return self

    def __exit__(self, *_: object) -> None:
        """Release the weights."""
        self.close()

    def close(self) -> None:
        """Release the weights; the next request loads them again."""
        if self._owner is not None:
            self._owner.close()
            return
        self._model = None
        self._residents.leave(self)
        _free()

    def fits(self) -> bool:
        """Tell whether the device has memory for the weights, and as much again to draw with."""
        room = psutil.virtual_memory().available
        if self.device.type == "cuda":
            _free()
            room = torch.cuda.mem_get_info(self.device)[0]
        return bool(room >= 2 * elements(self.policy.checkpoint) * self.dtype.itemsize)

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings, the pinned settings and the end tokens."""
        return {
            **self._sampling.asdict(),
            **_PINNED,
            "eos_token_ids": list(self.policy.eos_token_ids),
        }

    def identity(self) -> dict[str, Any]:
        """Return the engine, the device, its hardware and the number format."""
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "engine": "transformers",
            "device": self.device.type,
            "hardware": hardware,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def generation_config(self) -> GenerationConfig:
        """Return the generation config in use; the model's own is ignored."""
        return GenerationConfig(
            **_PINNED,
            repetition_penalty=float(self._sampling.repetition_penalty),
            max_new_tokens=self._sampling.max_new_tokens,
            # The draw happens in _SeededDraw; generate only takes the maximum.
            do_sample=False,
            num_return_sequences=1,
            use_cache=True,
            eos_token_id=list(self.policy.eos_token_ids),
            pad_token_id=self.policy.tokenizer.pad_token_id,
            bos_token_id=self.policy.tokenizer.bos_token_id,
        )

    def sample(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Sample]:
        """Draw one sample per request, in the order of the requests.

        Raises ``PolicyError`` for weights that cannot be loaded, and ``EngineError`` if the
        policy's logits are not finite.
        """
        if not requests:
            return []
        # Prompts of similar length need the least padding. The longest come first, so that a lack
        # of memory shows at once.
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
        """Return the token ids of rendered prompts, without added special tokens."""
        ids: list[list[int]] = self.policy.tokenizer(list(prompts), add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    def _fitting(self, prompts: list[list[int]], seeds: list[int]) -> list[Sample] | None:
        """Draw a batch; return ``None`` if it does not fit into memory and a part of it may."""
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
        width = batch["input_ids"].shape[1]
        draw = _SeededDraw(seeds, self._sampling, self.device)
        stop = [_Stop(self._sampling.stop, width, self._text)] if self._sampling.stop else []
        try:
            output = model.generate(  # type: ignore[operator]  # it is typed as a Tensor
                **batch,
                generation_config=self.generation_config(),
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList(stop),
            )
        except _NotFiniteError as error:
            where = first_not_finite(model, error.tokens)
            dtype = str(self.dtype).removeprefix("torch.")
            raise EngineError(
                f"{self.policy.checkpoint} gives logits that are NaN or infinite in {dtype}: the "
                f"first module whose output is not finite is {where}. If the checkpoint is sound, "
                "a wider number format helps: --grpo-dtype float32"
            ) from None
        return [self._sample(row) for row in output[:, width:].tolist()]

    def _sample(self, tokens: list[int]) -> Sample:
        ends = (i for i, token in enumerate(tokens) if token in self.policy.eos_token_ids)
        end = next(ends, None)
        text, ids = self._text(tokens[:end]), tokens if end is None else tokens[: end + 1]
        if stop := _stop_end(text, self._sampling.stop):
            text = text[:stop]
            last = bisect_left(
                range(len(ids)),
                True,
                key=lambda i: _stop_end(self._text(ids[: i + 1]), self._sampling.stop) > 0,
            )
            ids = ids[: last + 1]
        return Sample(text, len(ids), truncated=end is None and not stop, ids=tuple(ids))

    def _text(self, tokens: list[int]) -> str:
        text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class _NotFiniteError(Exception):
    """Logits without a finite maximum; ``tokens`` are those before it, shape (1, tokens)."""

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
        """Leave one token in each row of ``scores`` (rows × vocabulary), the drawn one."""
        greatest = scores.amax(-1)
        if not bool(greatest.isfinite().all()):
            row = int((~greatest.isfinite()).nonzero()[0])
            raise _NotFiniteError(input_ids[row, None])
        if self._sampling.greedy:
            return scores
        uniform = self._uniform[:, self._step, None]
        self._step += 1
        tokens, cumulative, kept = _kept(scores.float(), self._sampling)
        # The draw is uniform over the kept mass.
        mass = cumulative.gather(-1, kept - 1)
        place = torch.searchsorted(cumulative, uniform * mass, right=True)
        drawn = tokens.gather(-1, torch.minimum(place, kept - 1))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def _kept(
    scores: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply temperature, top_k, top_p and min_p, as transformers does, to logits.

    Returns the tokens, the most likely first, the sums of the probabilities up to each (both of
    shape (rows, tokens)), and how many of them are kept, shape (rows, 1).
    """
    scores = scores / sampling.temperature
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    spread = scores.softmax(-1)
    # Nearly always the kept tokens are among a few hundred, and sorting those is many times cheaper
    # than sorting a vocabulary of 150,000; the result is the same.
    probabilities, tokens = spread.topk(min(_LIKELY, spread.shape[-1]))
    # At least the smallest normal number, because a token without probability is never kept.
    least = (probabilities[:, :1] * (sampling.min_p or 0)).clamp_min(torch.finfo(spread.dtype).tiny)
    enough = (probabilities.sum(-1) >= sampling.top_p) | (probabilities[:, -1:] < least)[:, 0]
    if not bool(enough.all()):
        probabilities, tokens = spread.sort(-1, descending=True)
    cumulative = probabilities.cumsum(-1)
    # A token is kept if the more likely ones together are below top_p, so the first always is.
    kept = (cumulative - probabilities < sampling.top_p) & (probabilities >= least)
    return tokens, cumulative, kept.sum(-1, keepdim=True)


class _Stop(StoppingCriteria):
    """Ends the rows whose text has a stop string that their last token completes.

    ``width`` is the number of tokens of the padded prompts, and ``text`` decodes tokens.
    """

    def __init__(self, stop: Sequence[str], width: int, text: Callable[[list[int]], str]) -> None:
        self._stop = stop
        self._width = width
        self._text = text
        # A token has a byte at least. One more, because some tokenizers trim the first.
        self._reach = max(len(string.encode()) for string in stop) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Tell for each row of ``input_ids`` (rows × tokens) whether it has ended."""
        last = input_ids[:, max(self._width, input_ids.shape[1] - self._reach) :].tolist()
        ended = [_stop_end(self._text(tokens), self._stop) > 0 for tokens in last]
        return torch.tensor(ended, device=input_ids.device)


def _stop_end(text: str, stop: Sequence[str]) -> int:
    """Return where the stop string that ends first in ``text`` ends; 0 if there is none."""
    ends = (at + len(string) for string in stop if (at := text.find(string)) >= 0)
    return min(ends, default=0)


@contextmanager
def _out_of_memory_as_one_error() -> Iterator[None]:
    """Raise ``MemoryError`` for every error that means out of memory, on device or host."""
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
