"""A policy's own architecture and tokenizer, but small: for smoke runs on any machine.

It has few narrow layers of random weights, and is made in seconds without the policy's own weights.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from grpo_harness.errors import HarnessError
from grpo_harness.policy import Policy
from grpo_harness.policy.policy import quiet, source_of
from grpo_harness.text import one_line

LAYERS, WIDTH, HEADS = 2, 64, 4

_SIZES: Mapping[str, int] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": WIDTH // HEADS,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_inner": 2 * WIDTH,
    "max_window_layers": LAYERS,
}
"""Sizes of a small model by their names in configs; a config that lacks one is left without."""


def shrink(policy: Policy, folder: Path) -> Path:
    """Write a small policy of the same architecture and tokenizer to ``folder`` and return it.

    The same policy gives the same weights every time; a folder that is there is used again. Raises
    ``HarnessError`` for an architecture that cannot be made small.
    """
    if (folder / "config.json").is_file():
        return folder
    checkpoint = policy.checkpoint.whole
    half = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(checkpoint.path, **source_of(checkpoint))
            model = AutoModelForCausalLM.from_config(_small(config), dtype=torch.float32)
            model.generation_config = GenerationConfig(
                eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.tokenizer.pad_token_id
            )
            model.save_pretrained(half)
            policy.tokenizer.save_pretrained(half)
        half.replace(folder)
    except Exception as error:  # every architecture has its own checks
        shutil.rmtree(half, ignore_errors=True)
        raise HarnessError(
            f"{policy.name} cannot be made small for a smoke run ({one_line(error)}): name a small "
            "policy, recipe_policy in [tool.grpo-harness]"
        ) from error
    return folder


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    before = config.num_hidden_layers
    for name, size in _SIZES.items():
        was = getattr(config, name, None)
        if isinstance(was, int) and not isinstance(was, bool):
            setattr(config, name, min(was, size))
    for name, value in list(vars(config).items()):  # one entry a layer, such as layer_types
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, _kinds(value))
    # Written for the whole model: a checkpoint's own dtype or quantization.
    for name in ("quantization_config",):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _kinds(layers: list[Any]) -> list[Any]:
    """Return an entry for each layer that is left: the kinds that occur, first ones first."""
    distinct = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
    return (distinct + layers)[: min(LAYERS, len(layers))]
