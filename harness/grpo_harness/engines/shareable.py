"""Can a model's prompts be read once for all their completions? Asked of its config, then tried."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_harness.engines.decoding import forced_logits
from grpo_harness.text import one_line

_TRIED_TOKENS = 48
_STEPS = 3
_LIMIT = {torch.float32: 0.01}
_LIMIT_OF_OTHERS = 0.5
"""The greatest difference of logits, in standard deviations of a token's logits."""


def unshared(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> str:
    """Return why the prompts of ``model`` are not shared, or an empty text.

    The logits of some tokens are computed both ways. What cannot be told from a config, such as an
    attention with further inputs, shows there.
    """
    if why := _by_config(model):
        return why
    # A short prompt is repeated: there must be something before the last tokens.
    found = [tuple((list(prompt) * (_STEPS + 1))[:_TRIED_TOKENS]) for prompt in prompts]
    tried = sorted(set(found), key=lambda tokens: -len(tokens))[:2]
    try:
        shared = forced_logits(model, tried, _STEPS)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model may raise anything where it is not made for this
        return f"reading prompts once fails ({one_line(error)})"
    limit = _LIMIT.get(model.dtype, _LIMIT_OF_OTHERS)
    for tokens, ours in zip(tried, shared, strict=True):
        ids = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -_STEPS - 1 : -1].float()
        theirs = logits.repeat(2, 1)
        difference = (ours.float() - theirs).abs().max() / theirs.std(-1).mean()
        # Logits that are not finite are found while drawing, and named with their module.
        if bool(theirs.isfinite().all()) and not bool(difference <= limit):
            return f"reading prompts once changes logits by {float(difference):.2g} deviations"
    return ""


def cache_bytes(config: Any, itemsize: int) -> int:
    """Return the bytes of the keys and values of one token, by the config of a decoder."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers: int = config.num_hidden_layers
    return 2 * layers * int(heads) * int(width) * itemsize


def _by_config(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if kinds:
        return f"it has layers of {', '.join(sorted(map(str, kinds)))}"
    if getattr(config, "sliding_window", None):
        return "it has a sliding window"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' interface"
    if model.get_output_embeddings() is None:
        return "it has no output layer"
    return ""
