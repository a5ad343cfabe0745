"""Merge an adapter into the model of its base, with PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from grpo_harness.policy.checkpoint import Checkpoint, PolicyError, weight_files
from grpo_harness.text import escape, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""


def merge(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[PreTrainedModel, frozenset[str]]:
    """Merge the adapter into ``model``, its base, in the number format of ``model``.

    Returns the merged model and the names of its tensors that the adapter may have changed. Raises
    ``PolicyError`` with the tensor that is missing, unexpected or of another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _merged(checkpoint, model)
    except (torch.OutOfMemoryError, MemoryError, PolicyError):
        raise
    except Exception as error:  # PEFT raises whatever its tuners raise
        raise PolicyError(
            f"{checkpoint}: the adapter in {checkpoint.path} cannot be merged into "
            f"{checkpoint.whole.path}: {one_line(error)}; train it on this base, or merge it "
            "yourself and name the result"
        ) from error


def _merged(checkpoint: Checkpoint, model: Any) -> tuple[PreTrainedModel, frozenset[str]]:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(checkpoint.path))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise PolicyError(
            f"{checkpoint}: the adapter in {checkpoint.path} is a {config.peft_type.value}, which "
            "adds to the prompt and cannot be merged into weights: train a LoRA"
        )
    if getattr(config, "megatron_config", None):
        raise PolicyError(
            f"{checkpoint}: {checkpoint.path} asks for a module of Megatron, and code that a "
            "checkpoint names is never run: merge it yourself, and name the result"
        )
    config.inference_mode = True
    tied: torch.Tensor = model.get_input_embeddings().weight
    adapted = PeftModel(model, config)
    changed = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
    ]
    # A tied tensor belongs to two modules, of which the adapter changes one.
    for layer in (module.base_layer for _, module in changed if hasattr(module, "base_layer")):
        if model.config.tie_word_embeddings and getattr(layer, "weight", None) is tied:
            layer.weight = torch.nn.Parameter(tied.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
    stored = _shapes(checkpoint)
    _same_tensors(checkpoint, adapted, stored)
    adapted.load_adapter(str(checkpoint.path), "default", torch_device="cpu")
    merged = adapted.merge_and_unload()
    inside = tuple(f"{name}." for name, _ in changed)
    saved = {name.removeprefix(_PREFIX) for name in stored}
    names = {name for name in merged.state_dict() if name.startswith(inside) or name in saved}
    return merged, frozenset(names)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the adapter's file."""
    (path,) = weight_files(checkpoint)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _same_tensors(checkpoint: Checkpoint, adapted: Any, stored: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors of the file with those that the adapter's config asks for."""
    from peft import get_peft_model_state_dict

    # Some trainers save the embeddings too, although the adapter leaves them as they are.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    required = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for what, names in (
        ("lacks the tensor", required.keys() - stored.keys()),
        ("has, in addition to what its config asks for, the tensor", stored.keys() - wanted.keys()),
        (
            "has another shape of the tensor",
            {name for name in stored.keys() & wanted.keys() if stored[name] != wanted[name]},
        ),
    ):
        if names:
            first, *others = sorted(names)
            more = f" (and {len(others)} more)" if others else ""
            raise PolicyError(
                f"{checkpoint}: the adapter in {checkpoint.path} {what} {escape(first)}{more}; "
                "get it again, or save it again with save_pretrained"
            )
