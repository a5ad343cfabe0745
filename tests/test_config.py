"""A recipe means one exact config, which is shown, and tried before anything slow begins."""

import re

import pytest
import torch

from grpo_harness.training import load
from grpo_harness.training.builtin import BUILT_IN
from grpo_harness.training.config import described, settings

SMOKE = load("smoke")


def test_tutorial_resolves_to_the_tutorials_values(tmp_path):
    tutorial = load("tutorial")
    assert {
        "num_generations": 2,
        "max_completion_length": 48,
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "generation_batch_size": 2,
        "learning_rate": 2e-6,
        "epsilon": 0.2,
        "beta": 0.0,
        "seed": 42,
    }.items() <= vars(tutorial.config(tmp_path, device="cpu")).items()
    assert tutorial.block.max_prompt_length == 512
    assert (tutorial.block.n_math, tutorial.block.n_prog) == (64, 64)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_recipe_pins_the_traps(name, tmp_path):
    recipe = load(name)
    assert {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "save_total_limit": 2,
        "report_to": [],
    }.items() <= vars(recipe.config(tmp_path, device="cpu")).items()
    # By the file, and not by a default that can flip.
    assert {
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "num_iterations": 1,
        "loss_type": "dapo",
        "use_bias_correction_kl": True,
        "max_grad_norm": 1.0,
    }.items() <= recipe.values.items()


def test_use_cpu_is_respected_on_a_machine_with_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for said in (True, "yes"):
        config = SMOKE.with_values(use_cpu=said).config(tmp_path)
        assert (config.use_cpu, config.bf16, config.device.type) == (True, False, "cpu")


def test_the_batch_is_that_of_one_process(tmp_path):
    config = SMOKE.with_values(gradient_accumulation_steps=2).config(tmp_path, device="cpu")
    assert (config.per_device_train_batch_size, config.generation_batch_size) == (64, 128)


def test_batch_that_does_not_divide_into_groups_is_an_error(tmp_path):
    recipe = SMOKE.with_values(per_device_train_batch_size=9)
    with pytest.raises(ValueError, match=r"^recipe 'smoke': TRL .* refuses it .*divisible"):
        recipe.config(tmp_path, device="cpu")


def test_what_the_recipe_chose_is_shown_before_what_trl_chose(tmp_path):
    config = SMOKE.config(tmp_path, device="cpu")
    text = described(config)
    chosen, rest = text.split("as TRL has it:")
    assert "learning_rate = 0.0002   (TRL: 1e-06)" in chosen
    assert "loss_type=dapo" in " ".join(rest.split())
    shown = re.findall(r"(?:^|[\s,])(\w+) ?=", text, re.MULTILINE)
    assert sorted(shown) == sorted(settings(config))
