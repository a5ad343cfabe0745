import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from grpo_harness.engines.engine import Request, Sampling
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy import SYSTEM_MESSAGE, PolicyError, load
from tools.nano.tokenizer import build_tokenizer


def fingerprint(folder):
    return load(str(folder)).fingerprint


def test_it_is_read_without_its_weights(tiny):
    policy = load(str(tiny))
    assert policy.tokenizer.padding_side == "left"
    assert policy.eos_token_ids == (policy.tokenizer.eos_token_id,)
    assert not hasattr(policy, "model")


def test_every_end_token_of_the_generation_config_ends_an_answer(copy):
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    assert load(str(copy)).eos_token_ids == (0, 2)


def test_rendering_is_the_chat_templates(tiny_policy):
    text = tiny_policy.render("1 + 1")
    assert text == (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n"
        "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_chat_template_the_prompt_is_as_it_is(copy):
    (copy / "chat_template.jinja").unlink()
    assert load(str(copy)).render("1 + 1") == "1 + 1"


def test_the_pad_token_falls_back_to_endoftext(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(str(copy)).tokenizer.pad_token == "<|endoftext|>"


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
        policy = load(str(tiny))
        engine = TransformersEngine(policy, Sampling(max_new_tokens=2), device="cpu")
        engine.sample([Request("a", 1)] * 3)
        policy.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
        policy.tokenizer.save_pretrained(tiny.parent / "used")
        shutil.copytree(tiny, tiny.parent / "again", dirs_exist_ok=True)
        shutil.copytree(tiny.parent / "used", tiny.parent / "again", dirs_exist_ok=True)
        assert fingerprint(tiny.parent / "again") == policy.fingerprint


def test_the_tokenizer_of_the_tests_is_the_nano_pairs():
    assert build_tokenizer().decode(build_tokenizer()("a+b")["input_ids"]) == "a+b"


def test_without_a_generation_config_the_models_config_names_the_ends(copy):
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": [0]}))
    assert load(str(copy)).eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_template_that_raises_is_one_line(copy, template):
    (copy / "chat_template.jinja").write_text(template)
    policy = load(str(copy))
    with pytest.raises(PolicyError) as error:
        policy.render("1 + 1")
    assert "\n" not in str(error.value)
    assert "chat template" in str(error.value)
    assert str(copy) in str(error.value)
