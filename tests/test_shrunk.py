"""A small policy for smoke runs: the same architecture and tokenizer, the same every time."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_harness.errors import HarnessError
from grpo_harness.policy import load
from grpo_harness.training.shrunk import shrink

BIG = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8}


def policy(path):
    """A policy of a folder that has a config alone: the weights of a real one are not read."""
    nano = load("nano-base")
    checkpoint = SimpleNamespace(path=path, gguf_file=None, base=None)
    checkpoint.whole = checkpoint
    return SimpleNamespace(
        name=str(path), checkpoint=checkpoint, tokenizer=nano.tokenizer,
        eos_token_ids=nano.eos_token_ids,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["qwen2", "qwen3", "llama", "mistral", "gpt2", "gpt_neox", "phi3", "gemma2", "gemma3_text",
     "mixtral", "qwen3_moe", "olmo2", "smollm3"],
)  # fmt: skip
def test_every_architecture_becomes_small_and_stays_itself(kind, tmp_path):
    config = AutoConfig.for_model(kind, **BIG)
    config.save_pretrained(tmp_path / "big")
    small = load(str(shrink(policy(tmp_path / "big"), tmp_path / "small")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.config.model_type == config.model_type
    assert model.config.vocab_size == config.vocab_size
    assert model.config.num_hidden_layers == 2
    kinds = [getattr(of, "layer_types", None) or [] for of in (config, model.config)]
    assert set(kinds[0]) == set(kinds[1]), "of attention: a kind that is rare stays too"
    layers = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and p.dim() > 1)
    assert layers < 3e5 + 64 * config.vocab_size
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 6
    again = load(str(shrink(policy(tmp_path / "big"), tmp_path / "again")))
    assert again.fingerprint == small.fingerprint


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
def test_what_is_small_already_does_not_grow(kind, tmp_path):
    size = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 8}
    AutoConfig.for_model(kind, **size, num_key_value_heads=1).save_pretrained(tmp_path / "tiny")
    small = AutoConfig.from_pretrained(shrink(policy(tmp_path / "tiny"), tmp_path / "small"))
    assert {name: getattr(small, name) for name in size} == size


def test_a_small_policy_is_made_once(tmp_path):
    first = shrink(load("nano-base"), tmp_path / "small")
    before = (first / "model.safetensors").stat().st_mtime_ns
    state = torch.random.get_rng_state()
    assert shrink(load("nano-base"), tmp_path / "small") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    shrink(load("nano-base"), tmp_path / "other")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is its own"
    text = "What is 2 + 2?"
    assert load(str(first)).render(text) == load("nano-base").render(text)


def test_what_cannot_be_made_small_is_one_clear_line(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(HarnessError, match=r"cannot be made small.*recipe_policy"):
        shrink(policy(tmp_path / "big"), tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert not list(tmp_path.glob(".*half"))
