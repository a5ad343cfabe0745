"""The shipped pair: whole, small, safetensors only, and read exactly as it was trained."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import grpo_harness.nano
from grpo_harness.policy.policy import load, render
from grpo_harness.rewards.rule import read
from grpo_harness.tasks import task_types
from tools.nano.answers import mixed, right
from tools.nano.tokenizer import SPOKEN, build_tokenizer

FOLDER = Path(grpo_harness.nano.__file__).parent
PAIR = ("base", "trained")
TYPES = sorted(task_types())
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER / "base")


@pytest.mark.parametrize("name", PAIR)
def test_shipped_files(name):
    files = {path.name for path in (FOLDER / name).iterdir()}
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert files == wanted | ({"recipe.json", "problems.txt"} if name == "trained" else set())
    assert (FOLDER / name / "model.safetensors").stat().st_size <= 6_000_000


def test_trained_comes_from_this_base():
    record = json.loads((FOLDER / "trained" / "recipe.json").read_text())
    base, trained = load("nano-base"), load("nano-trained")
    assert record["base"]["name"] == "nano-base"
    assert record["base"]["fingerprint"] == str(base.fingerprint)
    assert base.fingerprint.tokenizer == trained.fingerprint.tokenizer
    assert base.fingerprint.weights != trained.fingerprint.weights


@pytest.mark.parametrize("name", PAIR)
def test_shipped_tokenizer_is_the_built_one(name):
    shipped = AutoTokenizer.from_pretrained(FOLDER / name)
    assert shipped.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert shipped.chat_template == build_tokenizer().chat_template
    assert (shipped.eos_token, shipped.pad_token) == ("<|im_end|>", "<|endoftext|>")


@given(st.sampled_from(TYPES), st.integers(0, 2**32))
def test_prompts_round_trip_in_few_tokens(name, seed):
    problem = task_types()[name].problem(random.Random(seed))
    text = render(TOKENIZER, problem.prompt)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert max(ids) < SPOKEN
    assert len(ids) <= 90


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_answers_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@given(st.text(st.characters(codec="utf-8")))
def test_other_text_does_not_fail(text):
    TOKENIZER.decode(TOKENIZER(text)["input_ids"])


@pytest.mark.parametrize("name", TYPES)
def test_answers_are_of_mixed_quality(name):
    rng = random.Random(0)
    problems = [task_types()[name].problem(rng) for _ in range(400)]
    assert all(read(p.prompt, right(p)) == "correct" for p in problems)
    taught = [mixed(p, rng) for p in problems]
    assert all(text.isascii() and text.isprintable() for text in taught)
    share = sum(read(p.prompt, t) == "correct" for p, t in zip(problems, taught, strict=True)) / 400
    assert 0.35 < share < 0.75


def test_card_has_every_number():
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    accuracies, _, collapse = card.partition("## The collapse")
    assert "n = 256" in card
    assert "k = 4" in card
    for name in (*TYPES, "all"):
        for part in (accuracies, collapse):
            row = re.search(rf"^\| {name} \|(.*)\|$", part, re.MULTILINE)
            assert row, name
            assert len([float(cell.strip(" <")) for cell in row[1].split("|")]) == 6
    assert "nan" not in card.replace("nano", "")
    assert (FOLDER / "curves.png").read_bytes().startswith(b"\x89PNG")
