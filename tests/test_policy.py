import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_harness.engines.engine import Request, Sampling
from grpo_harness.engines.transformers import TransformersSampler
from grpo_harness.policy.policy import SYSTEM_MESSAGE, load
from tools.nano.tokenizer import build_tokenizer


def fingerprint(folder):
    return load(str(folder), device="cpu").fingerprint


def test_a_folder_is_loaded_on_the_cpu_in_fp32(tiny):
    policy = load(str(tiny), device="cpu")
    assert policy.dtype == torch.float32
    assert next(policy.model.parameters()).dtype == torch.float32
    assert not policy.model.training
    assert policy.tokenizer.padding_side == "left"
    assert policy.eos_token_ids == (policy.tokenizer.eos_token_id,)


def test_nothing_of_the_models_generation_config_stays(tiny_policy):
    left = tiny_policy.model.generation_config
    assert (left.do_sample, left.temperature, left.top_k) == (None, None, None)
    assert left.repetition_penalty is None


def test_every_end_token_of_the_generation_config_ends_an_answer(copy):
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    assert load(str(copy), device="cpu").eos_token_ids == (0, 2)


def test_rendering_is_the_chat_templates(tiny_policy):
    text = tiny_policy.render("1 + 1")
    assert text == (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n"
        "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_chat_template_the_prompt_is_as_it_is(copy):
    (copy / "chat_template.jinja").unlink()
    assert load(str(copy), device="cpu").render("1 + 1") == "1 + 1"


def test_the_pad_token_falls_back_to_endoftext(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(str(copy), device="cpu").tokenizer.pad_token == "<|endoftext|>"


class TestFingerprint:
    def test_is_the_same_for_the_same_files_elsewhere(self, tiny, copy):
        assert fingerprint(copy) == fingerprint(tiny)

    def test_is_the_same_however_the_tensors_are_spread_over_files(self, tiny, copy):
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, held in shards.items():
            save_file({n: tensors[n] for n in held}, copy / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: s for s, held in shards.items() for n in held}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert fingerprint(copy) == fingerprint(tiny)

    def test_tells_one_changed_weight(self, tiny, copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-3
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        changed, same = fingerprint(copy), fingerprint(tiny)
        assert changed.weights != same.weights
        assert str(changed) != str(same)
        assert (changed.tokenizer, changed.chat_template) == (same.tokenizer, same.chat_template)

    def test_tells_a_changed_chat_template(self, tiny, copy):
        template = copy / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant", "model"))
        changed, same = fingerprint(copy), fingerprint(tiny)
        assert changed.chat_template != same.chat_template
        assert (changed.weights, changed.tokenizer) == (same.weights, same.tokenizer)

    def test_tells_a_changed_tokenizer(self, tiny, copy):
        path = copy / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(content))
        assert fingerprint(copy).tokenizer != fingerprint(tiny).tokenizer

    def test_does_not_change_by_use(self, tiny):
        policy = load(str(tiny), device="cpu")
        TransformersSampler(policy, Sampling(max_new_tokens=2)).sample([Request("a", 1)] * 3)
        policy.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
        policy.tokenizer.save_pretrained(tiny.parent / "used")
        shutil.copytree(tiny, tiny.parent / "again", dirs_exist_ok=True)
        shutil.copytree(tiny.parent / "used", tiny.parent / "again", dirs_exist_ok=True)
        assert fingerprint(tiny.parent / "again") == policy.fingerprint


def test_the_tokenizer_of_the_tests_is_the_nano_pairs():
    assert build_tokenizer().decode(build_tokenizer()("a+b")["input_ids"]) == "a+b"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_half_precision_that_it_supports_is_taken(tiny):
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    policy = load(str(tiny))
    assert (policy.device.type, policy.dtype) == ("cuda", wanted)
