"""A policy: its files, tokenizer, chat template, end tokens and fingerprint. No weights.

Weights in memory belong to an engine. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_harness.policy.checkpoint import Checkpoint, PolicyError, PolicyName, find, weights_digest
from grpo_harness.tasks.task import Message, Prompt
from grpo_harness.text import digest, escape, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_MESSAGE = "You are a helpful assistant."


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a policy, as SHA-256 digests."""

    weights: str
    tokenizer: str
    chat_template: str

    def __str__(self) -> str:
        together = self.weights + self.tokenizer + self.chat_template
        return digest(together)[:16]


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy on disk: what an engine needs to know of it, without weights.

    ``eos_token_ids`` are all end tokens, in ascending order: the tokenizer's and those that the
    checkpoint's generation config names. Nothing else of that config is used.
    """

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    fingerprint: Fingerprint

    @property
    def name(self) -> str:
        """The policy's name, as the user gave it."""
        return self.checkpoint.name.text

    @property
    def slug(self) -> str:
        """The policy's name as a folder name."""
        return self.checkpoint.name.slug

    def __repr__(self) -> str:
        return f"<Policy {self.name} {self.fingerprint}>"

    def render(self, prompt: Prompt, **template: Any) -> str:
        """Render a conversation with the chat template, up to where the completion begins.

        A text is a user message, after the default system message. ``template`` has further
        variables of the template. A tokenizer without one gets the text of the last message. Raises
        ``PolicyError`` with what the template raises.
        """
        try:
            return render(self.tokenizer, prompt, **template)
        except Exception as error:  # a template is a program and can raise anything
            cause = f"{one_line(error)}: change the messages or chat_template_kwargs"
        messages = conversation(prompt)
        if messages[0].get("role") == "system":
            with suppress(Exception):
                render(self.tokenizer, messages[1:], **template)
                cause = 'it takes no system message: set system = ""'
        raise PolicyError(
            f"{self.checkpoint}: its chat template cannot be applied to messages of "
            f"{', '.join(escape(str(m.get('role'))) for m in messages)} ({cause}), or fix "
            f"chat_template.jinja in {self.checkpoint.path}"
        )


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **template: Any) -> str:
    """Render a conversation, or a user prompt, with the chat template of ``tokenizer``."""
    messages = conversation(prompt)
    if not tokenizer.chat_template:
        return str(messages[-1]["content"])
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **template
    )
    return str(text)


def conversation(prompt: Prompt) -> list[Message]:
    """Return a user prompt as a conversation, with the default system message."""
    if not isinstance(prompt, str):
        return prompt
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": prompt}]


def load(name: str | PolicyName) -> Policy:
    """Load the policy that ``name`` means, without weights. Raises ``PolicyError``."""
    checkpoint = find(name if isinstance(name, PolicyName) else PolicyName(name))
    try:
        with quiet():
            named = _named_ends(checkpoint)
            tokenizer = _tokenizer(checkpoint)
    except Exception as error:  # transformers raises whatever its readers raise
        raise PolicyError(
            f"{checkpoint} cannot be loaded from {checkpoint.path}: {one_line(error)}; "
            "get the checkpoint again, or name another"
        ) from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = (
            "<|endoftext|>" if "<|endoftext|>" in vocabulary else tokenizer.eos_token
        )
    tokenizer.padding_side = "left"
    ends = {int(i) for i in [*named, tokenizer.eos_token_id] if i is not None}
    if not ends:
        raise PolicyError(
            f"{checkpoint} names no token that ends an answer: set eos_token in the "
            f"tokenizer_config.json of {checkpoint.path}"
        )
    return Policy(checkpoint, tokenizer, tuple(sorted(ends)), _fingerprint(checkpoint, tokenizer))


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return arguments for transformers' loaders: where to read, and to run no code."""
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if checkpoint.gguf_file:
        source["gguf_file"] = checkpoint.gguf_file
    return source


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the chat template: of each an adapter may have its own."""
    from transformers import AutoTokenizer

    def of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        source = source_of(checkpoint)
        return AutoTokenizer.from_pretrained(checkpoint.path, **source)

    holder = checkpoint.with_tokenizer
    tokenizer = of(holder)
    template = checkpoint.path / "chat_template.jinja"
    if holder is checkpoint.base and template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not tokenizer.chat_template and holder is not checkpoint.whole:
        tokenizer.chat_template = of(checkpoint.whole).chat_template
    return tokenizer


def _named_ends(checkpoint: Checkpoint) -> list[Any]:
    """Return the end tokens of the generation config, or else of the model's config."""
    from transformers import AutoConfig, GenerationConfig

    # Always read, so that an unknown architecture is reported before weights are loaded.
    whole = checkpoint.whole
    model = AutoConfig.from_pretrained(whole.path, **source_of(whole))
    folder = checkpoint.having("generation_config.json").path
    if (folder / "generation_config.json").is_file():
        config: Any = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        config = GenerationConfig.from_model_config(model)
    named = config.eos_token_id
    return list(named) if isinstance(named, list) else [named]


def _fingerprint(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    else:
        described = json.loads(backend.to_str())
        # The caller sets padding and truncation, which change from call to call.
        described.pop("padding", None)
        described.pop("truncation", None)
    return Fingerprint(
        weights=weights_digest(checkpoint),
        tokenizer=digest(json.dumps(described, sort_keys=True)),
        chat_template=digest(json.dumps(tokenizer.chat_template, sort_keys=True)),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and messages of transformers while it loads or saves."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
