"""Prompts are read once for all their completions: the tokens are those of `generate`."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_harness.engines.completions import Completions
from grpo_harness.engines.decoding import _moves, decode
from grpo_harness.engines.engine import Request, Sampling, sample_seed
from grpo_harness.engines.shareable import cache_bytes, unshared
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.tasks import task_types

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 256,
    "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4,
}  # fmt: skip
SHARED = [
    "llama", "qwen2", "qwen3", "phi3", "gemma", "olmo2", "smollm3", "gpt_neox", "gpt2", "granite",
    "cohere", "mixtral", "qwen3_moe", "starcoder2", "opt", "helium", "glm", "nemotron",
]  # fmt: skip
NOT_SHARED = {
    "mistral": "sliding window",
    "gemma2": "sliding_attention",
    "gemma3_text": "sliding_attention",
    "bloom": "interface",
    "stablelm": "interface",
    "mamba": "linear_attention",
}


def model_of(kind):
    torch.manual_seed(0)
    more = {"sliding_window": 16} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    if kind in ("phi3", "starcoder2"):
        more = {"sliding_window": None}
    if kind == "qwen3_moe":
        more = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    if kind == "opt":
        more = {"ffn_dim": 96, "word_embed_proj_dim": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **more)).eval()
    # Weights as they are made give nearly the same logits for all tokens, and ties.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def prompts_of(seed, n):
    """Prompts of different lengths, of which some have the same beginning."""
    of = random.Random(seed)
    beginning = [of.randrange(3, 96) for _ in range(11)]
    return [
        (beginning if of.random() < 0.7 else [])
        + [of.randrange(3, 96) for _ in range(of.randint(2, 20))]
        for _ in range(n)
    ]


def by_generate(model, prompt, n):
    """The greedy tokens of one prompt, up to its end token, by transformers alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
        eos_token_id=1, pad_token_id=0, repetition_penalty=1.0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def decoded(model, prompts, k, rows, sampling):
    found = {}

    def done(number, tokens):
        assert number not in found
        found[number] = list(tokens)

    groups = [
        (prompt, [(i * k + j, 1000 * i + j) for j in range(k)]) for i, prompt in enumerate(prompts)
    ]
    decode(model, groups, sampling, Completions(None, (1,), ()).ended, rows, done)
    return [found[i] for i in range(len(prompts) * k)]


@pytest.mark.parametrize("kind", SHARED)
def test_greedy_tokens_are_those_of_generate(kind):
    model, prompts = model_of(kind), prompts_of(kind, 9)
    assert unshared(model, prompts) == ""
    wanted = [by_generate(model, prompt, 12) for prompt in prompts]
    for rows in (1, 5, 100):
        greedy = Sampling(greedy=True, max_new_tokens=12)
        assert decoded(model, prompts, 2, rows, greedy) == [t for t in wanted for _ in range(2)]


@pytest.mark.parametrize("kind", NOT_SHARED)
def test_a_model_that_cannot_share_says_why(kind):
    assert NOT_SHARED[kind] in unshared(model_of(kind), prompts_of(kind, 3))


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    k=st.integers(1, 4),
    rows=st.integers(1, 24),
    most=st.sampled_from([1, 2, 9, 34]),
)
@settings(max_examples=12, deadline=None)
def test_what_a_row_draws_depends_on_nothing_else(llama, seed, n, k, rows, most):
    model, prompts = llama, prompts_of(seed, n)
    sampling = Sampling(max_new_tokens=most, temperature=1.3, top_p=0.95)
    together = decoded(model, prompts, k, rows, sampling)
    alone = [
        decoded_alone(model, prompt, 1000 * i + j, sampling)
        for i, prompt in enumerate(prompts)
        for j in range(k)
    ]
    # Where two tokens are as likely, up to the last digit, their order may be another.
    assert sum(a != b for a, b in zip(together, alone, strict=True)) <= 1
    for tokens in together:
        assert 1 not in tokens[:-1]
        assert tokens[-1] == 1 or len(tokens) == most


def decoded_alone(model, prompt, seed, sampling):
    found = []
    decode(
        model, [(prompt, [(0, seed)])], sampling, lambda tokens: tokens[-1] == 1, 1,
        lambda _, tokens: found.append(list(tokens)),
    )  # fmt: skip
    return found[0]


@given(st.sets(st.integers(0, 30)))
def test_places_that_are_kept_move_to_the_beginning_with_the_fewest_moves(kept):
    kept = sorted(kept)
    source, target = _moves(kept)
    left = {**{place: place for place in kept}, **dict(zip(target, source, strict=True))}
    assert sorted(left[i] for i in range(len(kept))) == kept
    assert len(source) == sum(place >= len(kept) for place in kept)


def test_prompts_are_read_once_and_ended_rows_leave(tiny_policy):
    problems = task_types()["sort"].problems(8)
    requests = [
        Request(tiny_policy.render(p.prompt), sample_seed(1, p.id, j))
        for p in problems
        for j in range(6)
    ]
    engine = TransformersEngine(tiny_policy, Sampling(max_new_tokens=64), device="cpu")
    engine.sample(requests[:1])
    read = []
    engine.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    samples = engine.sample(requests)
    prompts = {tuple(tokens) for tokens in engine.tokens([r.prompt for r in requests])}
    of_prompts = sum(rows * tokens for rows, tokens in read if tokens > 1)
    assert of_prompts < 1.1 * sum(map(len, prompts)), "a prompt is read more than once"
    drawn = sum(sample.tokens for sample in samples)
    steps = sum(rows for rows, tokens in read if tokens == 1)
    assert steps <= 1.25 * drawn, "rows that have ended go on"


def test_the_bytes_of_a_token_are_those_of_the_models_cache():
    model = model_of("llama")
    out = model(torch.tensor([[5, 6, 7, 8]]), use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
    assert cache_bytes(model.config, 4) == 4 * held // 4


def test_a_model_that_cannot_share_draws_by_generate(tiny_policy, monkeypatch):
    requests = [
        Request(tiny_policy.render(p.prompt), sample_seed(1, p.id, j))
        for p in task_types()["gcd"].problems(5)
        for j in range(3)
    ]
    sampling = Sampling(max_new_tokens=12)
    shared = TransformersEngine(tiny_policy, sampling, device="cpu").sample(requests)
    plain = TransformersEngine(tiny_policy, sampling, device="cpu")
    monkeypatch.setattr(type(plain.model), "_supports_attention_backend", False)
    assert "interface" in plain.unshared(plain.tokens([requests[0].prompt]))
    calls = []
    own = plain.model.generate
    monkeypatch.setattr(plain.model, "generate", lambda **how: calls.append(1) or own(**how))
    assert plain.sample(requests) == shared
    assert calls


def test_a_report_says_that_prompts_are_read_again(tiny_policy, monkeypatch):
    engine = TransformersEngine(tiny_policy, Sampling(max_new_tokens=2), device="cpu")
    assert engine.remarks() == {}
    monkeypatch.setattr(type(engine.model), "_supports_attention_backend", False)
    engine.drawing(Sampling(max_new_tokens=1)).sample([Request("a prompt", 1)])
    assert "since its attention does not go" in engine.remarks()["prompts"]
