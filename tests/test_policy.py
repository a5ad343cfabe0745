import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.nano.tokenizer import build_tokenizer
from harness.policy import SYSTEM_MESSAGE, PolicyError, find, load, slug
from harness.sampling import Request, Sampling
from harness.sampling.transformers import TransformersSampler

QWEN = "qwen/Qwen2-0.5B-Instruct"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of both hubs, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the untrained checkpoint to break."""
    return shutil.copytree(tiny, tmp_path / "copy")


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


class TestHubs:
    def test_modelscopes_cache_is_read_as_the_tutorial_lays_it_out(self, caches, save_tiny):
        folder = caches / "modelscope" / "models" / "qwen" / "Qwen2-0___5B-Instruct"
        save_tiny(folder, seed=1)
        policy = load(QWEN, device="cpu")
        assert policy.checkpoint.path == folder
        assert policy.name == QWEN
        (sample,) = TransformersSampler(policy, Sampling(max_new_tokens=4)).sample(
            [Request(policy.render("1 + 1"), 0)]
        )
        assert 1 <= sample.tokens <= 4

    @pytest.mark.parametrize(
        "where", ["models/Qwen/Qwen2-0___5B-Instruct", "hub/models/qwen/Qwen2-0.5B-Instruct"]
    )
    def test_other_layouts_and_spellings_of_it_too(self, caches, tiny, where):
        folder = shutil.copytree(tiny, caches / "modelscope" / where)
        assert find(QWEN).path == folder

    def test_hugging_faces_cache_comes_next(self, caches, tiny):
        repository = caches / "huggingface" / "models--Qwen--Qwen2-0.5B-Instruct"
        folder = shutil.copytree(tiny, repository / "snapshots" / "0123abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
        assert find(QWEN).path.resolve() == folder.resolve()

    def test_in_neither_cache_it_says_where_it_looked_and_what_to_do(self, caches):
        with pytest.raises(PolicyError) as error:
            find(QWEN)
        message = str(error.value)
        assert "\n" not in message
        for part in (QWEN, str(caches / "modelscope"), str(caches / "huggingface"), "hf download"):
            assert part in message


class TestBroken:
    def message(self, name):
        with pytest.raises(PolicyError) as error:
            load(str(name), device="cpu")
        message = str(error.value)
        assert "\n" not in message
        return message

    def test_a_name_that_is_nothing(self, tmp_path):
        assert "not a folder" in self.message(tmp_path / "nowhere")
        assert "nano-base" in self.message("nano")

    def test_an_empty_folder(self, tmp_path):
        assert "config.json" in self.message(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "\0"])
    def test_a_config_that_is_not_one(self, copy, text):
        (copy / "config.json").write_text(text)
        assert str(copy / "config.json") in self.message(copy)

    def test_an_unknown_architecture(self, copy):
        (copy / "config.json").write_text('{"model_type": "no_such_model"}')
        assert "cannot be loaded" in self.message(copy)

    def test_code_in_the_checkpoint_is_never_run(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "evil.py").write_text("raise SystemExit('ran')")
        assert "cannot be loaded" in self.message(copy)

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_weights_that_are_cut_short(self, copy, size):
        path = copy / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:size])
        message = self.message(copy)
        assert str(path) in message
        assert "again" in message

    def test_a_missing_shard(self, copy):
        (copy / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model-00001-of-00002" in self.message(copy)

    def test_a_shard_outside_the_folder(self, copy):
        (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
        index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "out of its folder" in self.message(copy)

    def test_pickled_weights(self, copy):
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        message = self.message(copy)
        assert "pytorch_model.bin" in message
        assert "never loaded" in message

    def test_no_tokenizer(self, copy):
        (copy / "tokenizer.json").unlink()
        assert "no tokenizer" in self.message(copy)

    def test_an_adapter(self, copy):
        (copy / "adapter_config.json").write_text("{}")
        assert "merge" in self.message(copy)

    def test_no_end_token(self, copy):
        config = json.loads((copy / "tokenizer_config.json").read_text())
        config["eos_token"] = None
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
        (copy / "generation_config.json").write_text("{}")
        assert "eos_token" in self.message(copy)

    def test_a_device_that_is_not_there(self, tiny):
        with pytest.raises(PolicyError, match="no device 'cuda:99'"):
            load(str(tiny), device="cuda:99")
        with pytest.raises(PolicyError, match="no dtype 'int8'"):
            load(str(tiny), device="cpu", dtype="int8")

    def test_smollm2_without_its_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "make smollm2" in self.message("smollm2")


def test_slugs(tiny, monkeypatch):
    assert slug("nano-base") == "nano-base"
    assert slug(QWEN) == "qwen--Qwen2-0.5B-Instruct"
    assert slug(str(tiny)) == "tiny"
    assert slug("../..//") != ""
    assert "/" not in slug("../../etc/passwd")
    monkeypatch.chdir(tiny)
    assert slug(".") == "tiny"


def test_the_tokenizer_of_the_tests_is_the_nano_pairs():
    assert build_tokenizer().decode(build_tokenizer()("a+b")["input_ids"]) == "a+b"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_half_precision_that_it_supports_is_taken(tiny):
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    policy = load(str(tiny))
    assert (policy.device.type, policy.dtype) == ("cuda", wanted)
