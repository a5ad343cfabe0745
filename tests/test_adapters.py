"""An adapter is a policy: PEFT's own unmerged model is what it is held against."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_harness.engines import weights as engines_weights
from grpo_harness.engines.engine import EngineError, Request, Sampling
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.engines.weights import load_weights
from grpo_harness.policy import PolicyError, PolicyName, load
from grpo_harness.policy.checkpoint import elements, find
from grpo_harness.training import load as load_recipe
from grpo_harness.training import train
from tests.projects import run
from tests.several import scattered

CPU, FULL = torch.device("cpu"), torch.float32
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
KINDS = {
    "lora": LORA,
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rank and scale": LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 8}, use_rslora=True
    ),
    "tied head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "tied embedding": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "both tied": LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=FULL)


def adapt(base, folder, config=LORA, scale=0.05, written=None, **how):
    """Write an adapter of ``base`` with random weights; with a scale of 0 as it begins."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(whole(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += scale * torch.randn_like(parameter)
        model.save_pretrained(folder, **how)
    change(folder, base_model_name_or_path=str(written or base))
    return folder


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def adapter(tiny, tmp_path):
    return adapt(tiny, tmp_path / "adapter")


def refused(act, *parts):
    with pytest.raises(PolicyError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def load_all(folder):
    return load_weights(load(str(folder)), CPU, FULL)


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_pefts_own(tiny, tmp_path, kind):
    folder = adapt(tiny, tmp_path / "adapter", KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unmerged = PeftModel.from_pretrained(whole(tiny), folder).eval()
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        ours = load_all(folder)(tokens).logits
        theirs, of_the_base = unmerged(tokens).logits, whole(tiny)(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (theirs - of_the_base).abs().max() > 1e-4


def test_what_it_does_not_touch_are_the_bases_own_tensors(tiny, adapter):
    merged, base = load_all(adapter).state_dict(), whole(tiny).state_dict()
    assert merged.keys() == base.keys()
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert moved == {f"model.layers.0.self_attn.{which}_proj.weight" for which in "qv"}


def test_a_tensor_that_merging_should_not_have_moved_is_named(adapter, monkeypatch):
    own = engines_weights.merge

    def careless(checkpoint, model):
        model, changed = own(checkpoint, model)
        model.model.norm.weight.data[0] += 1
        return model, changed

    monkeypatch.setattr(engines_weights, "merge", careless)
    refused(lambda: load_all(adapter), "model.norm.weight has other values")


def test_it_is_merged_in_the_engines_number_format(tiny, adapter):
    model = load_weights(load(str(adapter)), CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    stored = load_file(adapter / "adapter_model.safetensors")
    delta = 2 * stored[B] @ stored[B.replace("lora_B", "lora_A")]  # lora_alpha / r = 8 / 4
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = load_file(tiny / "model.safetensors")[name] + delta
    assert (model.state_dict()[name].float() - wanted).abs().max() < 0.01


def test_an_adapter_that_adds_nothing_has_the_same_weights_as_its_base(tiny, tmp_path):
    folder = adapt(tiny, tmp_path / "adapter", scale=0)
    assert not load_file(folder / "adapter_model.safetensors")[B].any()
    residents, sampling = Residents("all"), Sampling(max_new_tokens=2)
    base, same = (
        TransformersEngine(load(str(path)), sampling, device="cpu", residents=residents)
        for path in (tiny, folder)
    )
    base.sample([Request("a", 1)])
    for _ in range(2):  # however often it is asked
        with pytest.raises(EngineError, match="has the same weights"):
            same.sample([Request("a", 1)])


def test_adapters_are_candidates_like_any_other(project):
    """Of two, the one that adds nothing is named."""
    base = project.path / "base-policy"
    for step, scale in ((5, 0.05), (10, 0)):
        adapt(base, project.path / "out" / f"checkpoint-{step}", scale=scale, written="base-policy")
    run(project, "--grpo-record")
    project.makepyfile(
        test_both="""
        def test_both(base_policy, trained_policy, sample):
            for policy in (base_policy, trained_policy):
                sample(policy, ["1 + 1"])
        """
    )
    judged = run(project, "--grpo-trained=out/*", "test_both.py", passed=1, failed=1)
    judged.stdout.fnmatch_lines(
        ["*out/checkpoint-10* has the same weights in memory*", "FAILED *?checkpoint-10?*"]
    )
    rows = run(project, "--grpo-trained=out/*", "-k", "accuracy and not checkpoint-10")
    rows.stdout.fnmatch_lines(["palindrome *out/checkpoint-5 *"])


def test_the_fingerprint_is_of_the_base_the_adapter_and_how_they_are_merged(
    tiny, adapter, save_tiny, tmp_path
):
    def weights():
        return load(str(adapter)).fingerprint.weights

    first = weights()
    assert first != load(str(tiny)).fingerprint.weights
    change(adapter, base_model_name_or_path=str(shutil.copytree(tiny, tmp_path / "moved")))
    assert weights() == first
    change(adapter, target_modules=["v_proj", "q_proj"], peft_version="another")
    assert weights() == first
    change(adapter, target_modules=["q_proj", "v_proj"])
    assert weights() == first
    change(adapter, lora_alpha=9)
    assert (scaled := weights()) != first
    rewrite(adapter, lambda tensors: tensors[B].add_(1))
    assert (edited := weights()) != scaled
    change(adapter, base_model_name_or_path=str(save_tiny(tmp_path / "other", seed=3)))
    assert weights() != edited


def test_its_size_is_that_of_both(tiny, adapter):
    stored = load_file(adapter / "adapter_model.safetensors").values()
    own = elements(find(PolicyName(str(tiny))))
    assert elements(find(PolicyName(str(adapter)))) == own + sum(t.numel() for t in stored)


def test_what_its_base_was_trained_on_counts_too(copy, tmp_path):
    folder = adapt(copy, tmp_path / "adapter")
    (copy / "problems.txt").write_text("gcd-1\n")
    assert find(PolicyName(str(folder))).trained_on() == {"gcd-1"}
    (folder / "problems.txt").write_text("sort-1.2\n")
    assert find(PolicyName(str(folder))).trained_on() == {"gcd-1", "sort-1"}


@pytest.mark.parametrize("kind", ["lora", "tied head"])
def test_a_training_can_start_from_one_and_writes_a_whole_model(tiny, tmp_path, kind):
    folder = adapt(tiny, tmp_path / "adapter", KINDS[kind])
    recipe = load_recipe("smoke").with_values(
        model_name_or_path=str(folder), max_steps=1, max_completion_length=4, learning_rate=1e-12
    )
    train(recipe, tmp_path / "out", device="cpu", reward=scattered)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        before, after = (load_all(f)(tokens).logits for f in (folder, tmp_path / "out"))
    assert (before - after).abs().max() < 1e-5
    with pytest.raises(ValueError, match="is an adapter: save it"):
        train(recipe.with_values(beta=0.1), tmp_path / "again", device="cpu")


class TestTokenizer:
    """The adapter's own, or else its base's; and so is the chat template."""

    def test_of_the_base(self, tiny, adapter):
        own, base = load(str(adapter)), load(str(tiny))
        assert own.fingerprint.tokenizer == base.fingerprint.tokenizer
        assert own.render("1 + 1") == base.render("1 + 1")
        assert own.eos_token_ids == base.eos_token_ids

    def test_of_its_own(self, tiny, adapter):
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.chat_template = "own {{ messages[1].content }}"
        tokenizer.add_tokens(["<own>"])
        tokenizer.save_pretrained(adapter)
        policy = load(str(adapter))
        assert policy.render("1 + 1") == "own 1 + 1"
        assert "<own>" in policy.tokenizer.get_vocab()

    def test_of_its_own_with_the_bases_template(self, tiny, adapter):
        AutoTokenizer.from_pretrained(tiny).save_pretrained(adapter)
        (adapter / "chat_template.jinja").unlink()
        assert load(str(adapter)).render("1 + 1") == load(str(tiny)).render("1 + 1")

    def test_of_the_base_with_its_own_template(self, adapter):
        (adapter / "chat_template.jinja").write_text("own {{ messages[1].content }}")
        assert load(str(adapter)).render("1 + 1") == "own 1 + 1"


class TestBase:
    def test_is_looked_for_beside_the_adapter_and_from_the_project(self, copy, tmp_path):
        for home in (tmp_path / "out", tmp_path):
            folder = adapt(copy, tmp_path / "out" / "adapter", written="../../copy")
            if home == tmp_path:
                change(folder, base_model_name_or_path="copy")
            found = find(PolicyName("out/adapter" if home == tmp_path else "adapter", home))
            assert found.whole.path == copy

    def test_may_be_embedded(self, tmp_path):
        base = find(PolicyName("nano-base")).path
        folder = adapt(base, tmp_path / "adapter", written="nano-base")
        assert load(str(folder)).checkpoint.whole.path == base

    @pytest.mark.parametrize("revision", [None, "v1"])
    def test_may_be_on_a_hub_with_a_revision(self, adapter, tiny, tmp_path, monkeypatch, revision):
        from huggingface_hub import constants

        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        repository = tmp_path / "huggingface" / "models--o--m"
        shutil.copytree(tiny, repository / "snapshots" / "c")
        (repository / "refs").mkdir()
        (repository / "refs" / (revision or "main")).write_text("c")
        change(adapter, base_model_name_or_path="o/m", revision=revision)
        assert load(str(adapter)).checkpoint.whole.path == repository / "snapshots" / "c"
        change(adapter, revision="v2")
        refused(lambda: load(str(adapter)), "o/m@v2", "adapter", "hf download o/m --revision v2")

    def test_that_is_nowhere(self, adapter):
        change(adapter, base_model_name_or_path="../gone")
        config = adapter / "adapter_config.json"
        refused(lambda: load(str(adapter)), "its base", config, "this path does not exist")

    def test_that_is_an_adapter_itself(self, adapter, tmp_path):
        change(adapter, base_model_name_or_path=".")
        refused(lambda: load(str(adapter)), "adapter of another adapter", "merge_and_unload")

    def test_that_is_broken(self, copy, tmp_path):
        folder = adapt(copy, tmp_path / "adapter")
        (copy / "tokenizer.json").unlink()
        refused(lambda: load(str(folder)), copy, "no tokenizer")

    def test_of_another_shape(self, adapter, save_tiny, tmp_path):
        other = save_tiny(tmp_path / "other", head_dim=8)
        change(adapter, base_model_name_or_path=str(other))
        refused(lambda: load_all(adapter), "another shape of the tensor", "lora_B", adapter)

    def test_without_the_modules_it_adapts(self, adapter):
        change(adapter, target_modules=["nowhere"])
        refused(lambda: load_all(adapter), adapter, "cannot be merged", "nowhere")


class TestBroken:
    @pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
    def test_a_config_that_is_not_one(self, adapter, text):
        (adapter / "adapter_config.json").write_text(text)
        refused(lambda: load(str(adapter)), adapter / "adapter_config.json")

    @pytest.mark.parametrize("key", ["base_model_name_or_path", "peft_type"])
    @pytest.mark.parametrize("value", [None, "", 3])
    def test_a_config_that_lacks_what_it_needs(self, adapter, key, value):
        change(adapter, **{key: value})
        refused(lambda: load(str(adapter)), adapter / "adapter_config.json", f"names no {key}")

    @pytest.mark.parametrize(("key", "value"), [("peft_type", "NO_SUCH"), ("r", 0), ("r", "x")])
    def test_a_config_that_peft_refuses(self, adapter, key, value):
        change(adapter, **{key: value})
        refused(lambda: load_all(adapter), adapter, "cannot be merged")

    def test_a_pickle_is_never_loaded(self, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        refused(lambda: load(str(adapter)), "adapter_model.bin, a pickle, which is never loaded")

    def test_no_weights(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        refused(lambda: load(str(adapter)), f"there is no adapter_model.safetensors in {adapter}")

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_weights_that_are_cut_short(self, adapter, size):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        refused(lambda: load(str(adapter)), path, "again")

    def test_a_tensor_that_is_missing(self, adapter):
        rewrite(adapter, lambda tensors: tensors.pop(B))
        refused(lambda: load_all(adapter), f"lacks the tensor {B};", adapter)

    def test_a_saved_module_that_is_missing(self, tiny, tmp_path):
        folder = adapt(tiny, tmp_path / "adapter", KINDS["saved modules"])
        rewrite(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
        refused(lambda: load_all(folder), "lacks the tensor base_model.model.lm_head.weight")

    def test_tensors_too_many(self, adapter):
        rewrite(adapter, lambda t: t.update({B.replace("layers.0", "layers.7"): torch.zeros(2)}))
        refused(lambda: load_all(adapter), "in addition to", "layers.7.self_attn.q_proj.lora_B")

    def test_a_tensor_of_another_shape(self, adapter):
        rewrite(adapter, lambda tensors: tensors.update({B: torch.zeros(32, 5)}))
        refused(lambda: load_all(adapter), f"another shape of the tensor {B}")

    def test_a_tensor_that_is_no_number(self, adapter):
        rewrite(adapter, lambda tensors: tensors[B].fill_(torch.nan))
        refused(lambda: load_all(adapter), "q_proj.weight", "NaN", adapter)

    def test_an_adapter_of_the_prompt(self, tiny, tmp_path):
        config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        folder = adapt(tiny, tmp_path / "adapter", config)
        refused(lambda: load_all(folder), folder, "PROMPT_TUNING", "cannot be merged")

    def test_code_that_a_config_names_is_never_run(self, adapter, tmp_path, monkeypatch):
        (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
        monkeypatch.syspath_prepend(tmp_path)
        change(adapter, megatron_config={"a": 1}, megatron_core="evil")
        refused(lambda: load_all(adapter), "never run")
        assert "evil" not in sys.modules

    def test_without_peft(self, adapter, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        refused(lambda: find(PolicyName(str(adapter))), "pip install 'grpo-harness[peft]'")


def test_embeddings_that_were_saved_with_it_are_used(tiny, tmp_path):
    folder = adapt(tiny, tmp_path / "adapter", save_embedding_layers=True)
    both = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    rewrite(folder, lambda tensors: [tensors[name].mul_(2) for name in both])
    model = load_all(folder)
    base = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, 2 * base)
