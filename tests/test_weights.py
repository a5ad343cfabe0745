"""Weights in memory are those of the files, every one of them, and numbers."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_harness.engines.weights import device_of, dtype_of, load_weights, loaded_digest
from grpo_harness.policy import PolicyError, PolicyName, load
from grpo_harness.policy.checkpoint import Checkpoint

CPU, FULL = torch.device("cpu"), torch.float32
LOST = "model.layers.0.mlp.down_proj.weight"


def weights(folder, dtype=FULL):
    return load_weights(load(str(folder)), CPU, dtype)


def refused(folder):
    with pytest.raises(PolicyError) as error:
        weights(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def change(folder, edit):
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spread(folder):
    """Spread a checkpoint over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: s for s, held in shards.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_they_are_frozen_in_full_precision_and_ready(tiny):
    model = weights(tiny)
    assert {p.dtype for p in model.parameters()} == {FULL}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    left = model.generation_config
    assert (left.do_sample, left.temperature, left.top_k) == (None, None, None)
    assert left.repetition_penalty is None


def test_tied_weights_are_not_missing(tiny):
    assert "lm_head.weight" not in load_file(tiny / "model.safetensors")
    model = weights(tiny)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("sharded", [False, True])
class TestIncomplete:
    """transformers would fill what is missing with random numbers, and warn."""

    def broken(self, copy, sharded, edit):
        change(copy, edit)
        if sharded:
            spread(copy)
        return refused(copy)

    def test_a_tensor_that_is_missing(self, copy, sharded):
        message = self.broken(copy, sharded, lambda tensors: tensors.pop(LOST))
        assert f"lack the tensor {LOST};" in message

    def test_tensors_that_are_missing(self, copy, sharded):
        def lose(tensors):
            for name in [name for name in tensors if "mlp" in name]:
                del tensors[name]

        assert f"lack the tensor {LOST} (and 2 more)" in self.broken(copy, sharded, lose)

    def test_a_tensor_too_many(self, copy, sharded):
        extra = {"model.layers.7.mlp.down_proj.weight": torch.zeros(2)}
        message = self.broken(copy, sharded, lambda tensors: tensors.update(extra))
        assert "in addition to the model's, the tensor model.layers.7.mlp.down_proj" in message

    def test_a_tensor_of_another_shape(self, copy, sharded):
        message = self.broken(copy, sharded, lambda t: t.update({LOST: torch.zeros(32, 60)}))
        assert f"have another shape of the tensor {LOST}" in message

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_a_tensor_with_what_is_no_number(self, copy, sharded, value):
        def spoil(tensors):
            tensors[LOST][3, 5] = value

        message = self.broken(copy, sharded, spoil)
        assert f"the tensor {LOST} in" in message
        assert "NaN or infinity" in message


def test_a_number_that_half_precision_cannot_hold_is_named(copy):
    change(copy, lambda tensors: tensors[LOST][0].fill_(1e6))
    weights(copy)
    with pytest.raises(PolicyError, match="read as float16"):
        weights(copy, torch.float16)


def test_weights_that_are_not_the_files_are_named(copy, save_tiny, tmp_path, monkeypatch):
    """As where a library loads the base in place of what was asked for."""
    other = save_tiny(tmp_path / "other", seed=1)
    own = AutoModelForCausalLM.from_pretrained

    def of_the_other(path, **how):
        return own(other, **how)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", of_the_other)
    assert "are not those of its files" in refused(copy)


def test_in_half_precision_they_are_the_files_rounded(tiny):
    model = weights(tiny, torch.bfloat16)
    stored = load_file(tiny / "model.safetensors")[LOST]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, stored.bfloat16())


def test_the_digest_in_memory_is_of_every_value(tiny, copy):
    same = loaded_digest(weights(tiny))
    assert loaded_digest(weights(copy)) == same
    spread(copy)
    assert loaded_digest(weights(copy)) == same
    shutil.rmtree(copy)
    shutil.copytree(tiny, copy)

    def nudge(tensors):
        tensors[LOST][0, 0] += 1e-3

    change(copy, nudge)
    assert loaded_digest(weights(copy)) != same
    assert loaded_digest(weights(tiny, torch.bfloat16)) != same


def test_devices_and_number_formats():
    assert device_of("cpu") == CPU
    assert dtype_of("auto", CPU) == FULL
    assert dtype_of("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(PolicyError, match="no device 'cuda:99'"):
        device_of("cuda:99")
    with pytest.raises(PolicyError, match="no device 'toaster'"):
        device_of("toaster")
    with pytest.raises(PolicyError, match="no dtype 'int8'"):
        dtype_of("int8", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_half_precision_that_it_supports_is_taken():
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    assert device_of("auto").type == "cuda"
    assert dtype_of("auto", device_of("auto")) == wanted


def gguf(folder, *without):
    """Write weights of one layer as GGUF."""
    writer = GGUFWriter(folder / "policy.gguf", "llama")
    wide, heads, inner, vocabulary = 32, 4, 64, 96
    writer.add_context_length(64)
    writer.add_embedding_length(wide)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(wide // heads)
    writer.add_vocab_size(vocabulary)
    square = [f"blk.0.attn_{which}.weight" for which in ("q", "k", "v", "output")]
    shapes = {
        "token_embd.weight": (vocabulary, wide),
        "output_norm.weight": (wide,),
        "output.weight": (vocabulary, wide),
        "blk.0.attn_norm.weight": (wide,),
        "blk.0.ffn_norm.weight": (wide,),
        "blk.0.ffn_gate.weight": (inner, wide),
        "blk.0.ffn_up.weight": (inner, wide),
        "blk.0.ffn_down.weight": (wide, inner),
        **dict.fromkeys(square, (wide, wide)),
    }
    for i, (name, shape) in enumerate(shapes.items()):
        if name not in without:
            values = np.random.default_rng(i).normal(0, 0.02, shape)
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_holds_every_tensor(tmp_path, tiny):
    gguf(tmp_path)
    checkpoint = Checkpoint(PolicyName("ours"), tmp_path, gguf_file="policy.gguf")
    policy = dataclasses.replace(load(str(tiny)), checkpoint=checkpoint)
    assert load_weights(policy, CPU, FULL).lm_head.weight.shape == (96, 32)
    gguf(tmp_path, "blk.0.ffn_down.weight")
    with pytest.raises(PolicyError, match=re.escape(f"lack the tensor {LOST}")):
        load_weights(policy, CPU, FULL)
