"""A checkpoint becomes a policy: model and tokenizer on a device, with its fingerprint.

No code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_harness.policy.checkpoint import (
    Checkpoint,
    PolicyError,
    digest,
    find,
    one_line,
    weights_digest,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM_MESSAGE = "You are a helpful assistant."


@dataclass(frozen=True)
class Fingerprint:
    """What a policy is, as SHA-256 digests: the same digests, the same policy."""

    weights: str
    tokenizer: str
    chat_template: str

    def __str__(self) -> str:
        together = self.weights + self.tokenizer + self.chat_template
        return digest(together)[:16]


@dataclass(frozen=True, eq=False)
class Policy:
    """A loaded policy: model and tokenizer on one device, with its fingerprint.

    ``eos_token_ids`` are all tokens that end an answer, in ascending order: the tokenizer's and
    those that the checkpoint's generation config names. The model's own generation config is
    emptied, so that nothing else of it can leak into sampling.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    fingerprint: Fingerprint

    @property
    def name(self) -> str:
        """What the user called the policy."""
        return self.checkpoint.name

    def __repr__(self) -> str:
        return f"<Policy {self.name} {self.fingerprint} on {self.device}, {self.dtype}>"

    def render(self, prompt: str) -> str:
        """Put a user prompt into the chat template, up to where the answer begins.

        A tokenizer without a chat template gets the prompt as it is.
        """
        return render(self.tokenizer, prompt)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Put a user prompt into the chat template of ``tokenizer``, behind the system message."""
    if not tokenizer.chat_template:
        return prompt
    messages = [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": prompt},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> Policy:
    """Load the policy that ``name`` means, ready to sample from.

    ``device`` is ``auto`` (CUDA where there is one, else the CPU) or any of torch's; ``dtype``
    is ``auto`` (bfloat16 where CUDA supports it, else float16 on CUDA, else float32),
    ``bfloat16``, ``float16`` or ``float32``. Raises ``PolicyError``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    checkpoint = find(name)
    on = _device(device)
    as_type = _dtype(dtype, on)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if checkpoint.gguf_file:
        source["gguf_file"] = checkpoint.gguf_file
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **source)
            if not checkpoint.gguf_file:
                source["use_safetensors"] = True
            model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=as_type, **source)
    except Exception as error:  # transformers raises whatever its readers raise
        raise PolicyError(
            f"policy {name!r} cannot be loaded from {checkpoint.path}: {one_line(error)}; "
            "get the checkpoint again, or name another"
        ) from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = (
            "<|endoftext|>" if "<|endoftext|>" in vocabulary else tokenizer.eos_token
        )
    tokenizer.padding_side = "left"
    eos_token_ids = _eos_token_ids(model, tokenizer)
    if not eos_token_ids:
        raise PolicyError(
            f"policy {name!r} names no token that ends an answer: set eos_token in the "
            f"tokenizer_config.json of {checkpoint.path}"
        )
    model.generation_config = GenerationConfig()
    return Policy(
        checkpoint=checkpoint,
        model=model.eval().requires_grad_(False).to(on),
        tokenizer=tokenizer,
        device=on,
        dtype=as_type,
        eos_token_ids=eos_token_ids,
        fingerprint=_fingerprint(checkpoint, tokenizer),
    )


def _fingerprint(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    else:
        described = json.loads(backend.to_str())
        # How a batch is padded or cut is the caller's doing and changes from call to call.
        described.pop("padding", None)
        described.pop("truncation", None)
    return Fingerprint(
        weights=weights_digest(checkpoint),
        tokenizer=digest(json.dumps(described, sort_keys=True)),
        chat_template=digest(json.dumps(tokenizer.chat_template, sort_keys=True)),
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    own = model.generation_config.eos_token_id if model.generation_config else None
    named = own if isinstance(own, list) else [own]
    return tuple(sorted({int(i) for i in [*named, tokenizer.eos_token_id] if i is not None}))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PolicyError(
            f"no device {name!r} on this machine ({one_line(error)}): name cpu, cuda or auto"
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in known:
        raise PolicyError(f"no dtype {name!r}: it is auto, {', '.join(known)}")
    return known[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of transformers out of logs while it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
