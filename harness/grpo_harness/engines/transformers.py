"""The engine of transformers, on this machine.

Prompts are read once for all their completions (`decoding.py`), where the model allows it; other
models draw by transformers' own ``generate``. Either way a completion is drawn by the random
numbers of its own seed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch

from grpo_harness.engines.completions import Completions
from grpo_harness.engines.draw import DecodingError
from grpo_harness.engines.engine import PINNED, EngineError, Progress, Request, Sample, Sampling
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
    from transformers import GenerationConfig, PreTrainedModel

# What draws is imported where it draws: it loads seconds of transformers, and a run whose
# completions are all stored needs none of it.

_SMALL, _ENOUGH = 64 << 20, 256
"""A CPU draws from weights of more bytes than ``_SMALL`` with at most so many rows.

More rows hardly make matrix products of that size any faster, and take memory.
"""

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of a RuntimeError that mean out of memory, where torch has no error class for it."""


class TransformersEngine:
    """Samples a policy through transformers, at most ``batch_size`` rows at a time.

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
        batch_size: int = 512,
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
        self._unshared: str | None = None

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
        self._model = self._unshared = None
        self._residents.leave(self)
        _free()

    def fits(self) -> bool:
        """Tell whether the device has memory for the weights, and as much again to draw with."""
        return self._room() >= 2 * elements(self.policy.checkpoint) * self.dtype.itemsize

    def _room(self) -> int:
        """Return the free bytes of the device's memory."""
        if self.device.type == "cuda":
            _free()
            return int(torch.cuda.mem_get_info(self.device)[0])
        return int(psutil.virtual_memory().available)

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings, the pinned settings and the end tokens."""
        return {
            **self._sampling.asdict(),
            **PINNED,
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

    def remarks(self) -> dict[str, str]:
        """Say that prompts are read again for each completion, and why, where it is so."""
        why = (self._owner or self)._unshared
        return {"prompts": f"read again for each completion, since {why}"} if why else {}

    def generation_config(self) -> GenerationConfig:
        """Return the generation config of ``generate``; the model's own is ignored."""
        from transformers import GenerationConfig

        return GenerationConfig(
            **PINNED,
            # The draw happens before generate sees the logits; it only takes the maximum.
            repetition_penalty=1.0,
            max_new_tokens=self._sampling.max_new_tokens,
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
        prompts = self.tokens([request.prompt for request in requests])
        if self.unshared(prompts):
            return self._by_generate(requests, prompts, progress)
        samples: dict[int, Sample] = {}
        while missing := [i for i in range(len(requests)) if i not in samples]:
            self._share(requests, prompts, missing, samples, progress)
        return [samples[i] for i in range(len(requests))]

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered prompts, without added special tokens."""
        distinct = list(dict.fromkeys(prompts))
        found = self.policy.tokenizer(distinct, add_special_tokens=False)["input_ids"]
        ids: dict[str, list[int]] = dict(zip(distinct, found, strict=True))
        return [ids[prompt] for prompt in prompts]

    def unshared(self, prompts: Sequence[Sequence[int]]) -> str:
        """Return why prompts cannot be read once for all their completions, or an empty text.

        The weights are loaded, and the model is tried on ``prompts``, once.
        """
        from grpo_harness.engines.shareable import unshared

        owner = self._owner or self
        if owner._unshared is None:
            with torch.inference_mode():
                owner._unshared = unshared(self.model, prompts)
        return owner._unshared

    def _share(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Sequence[int]],
        missing: Sequence[int],
        samples: dict[int, Sample],
        progress: Progress | None,
    ) -> None:
        """Draw what is missing; if memory does not suffice, some of it, and fewer at once then."""
        from grpo_harness.engines.decoding import decode

        ending = self._ending()
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i in missing:
            groups.setdefault(tuple(prompts[i]), []).append((i, requests[i].seed))

        def done(number: int, tokens: list[int]) -> None:
            samples[number] = ending.sample(tokens)
            if progress is not None:
                progress(1)

        rows = min(len(missing), self._rows(max(map(len, groups))))
        try:
            with _out_of_memory_as_one_error():
                decode(self.model, [*groups.items()], self._sampling, ending.ended, rows, done)
        except DecodingError as error:
            raise self._not_finite(error.tokens) from None
        except MemoryError as error:
            _free()
            if rows > 1:
                self._batch_size = rows // 2
            else:
                longest = max(
                    (i for i in missing if i not in samples), key=lambda i: len(prompts[i])
                )
                samples[longest] = _without_memory(error)

    def _rows(self, prompt: int) -> int:
        """Return how many rows pay, and fit into half of the free memory.

        ``prompt`` is the number of tokens of the longest prompt.
        """
        from grpo_harness.engines.shareable import cache_bytes

        text = self.model.config.get_text_config(decoder=True)
        a_token = cache_bytes(text, self.dtype.itemsize)
        a_row = a_token * (prompt + self._sampling.max_new_tokens) + 16 * int(text.vocab_size)
        large = elements(self.policy.checkpoint) * self.dtype.itemsize > _SMALL
        pay = _ENOUGH if large and self.device.type == "cpu" else self._batch_size
        return max(1, min(self._batch_size, pay, self._room() // 2 // a_row))

    def _by_generate(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Sequence[int]],
        progress: Progress | None,
    ) -> list[Sample]:
        # Prompts of similar length need the least padding. The longest come first, so that a lack
        # of memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
        samples: dict[int, Sample] = {}
        while len(samples) < len(order):
            most = self._rows(len(prompts[order[len(samples)]]))
            rows = order[len(samples) : len(samples) + most]
            try:
                with _out_of_memory_as_one_error():
                    drawn = self._batch(
                        [prompts[i] for i in rows], [requests[i].seed for i in rows]
                    )
            except MemoryError as error:
                _free()
                if len(rows) > 1:
                    self._batch_size = len(rows) // 2
                    continue
                drawn = [_without_memory(error)]
            samples.update(zip(rows, drawn, strict=True))
            if progress is not None:
                progress(len(rows))
        return [samples[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sample]:
        from grpo_harness.engines.generate import generate

        ending = self._ending()
        try:
            drawn = generate(
                self.model,
                self.policy.tokenizer,
                prompts,
                seeds,
                self._sampling,
                self.generation_config(),
                ending,
            )
        except DecodingError as error:
            raise self._not_finite(error.tokens) from None
        return [ending.sample(tokens) for tokens in drawn]

    def _ending(self) -> Completions:
        policy = self.policy
        return Completions(policy.tokenizer, policy.eos_token_ids, self._sampling.stop)

    def _not_finite(self, tokens: Sequence[int]) -> EngineError:
        where = first_not_finite(self.model, torch.tensor([list(tokens)]))
        dtype = str(self.dtype).removeprefix("torch.")
        return EngineError(
            f"{self.policy.checkpoint} gives logits that are NaN or infinite in {dtype}: the "
            f"first module whose output is not finite is {where}. If the checkpoint is sound, "
            "a wider number format helps: --grpo-dtype float32"
        )


def _without_memory(error: MemoryError) -> Sample:
    return Sample("", 0, truncated=False, error=f"out of memory: {one_line(error)}")


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
