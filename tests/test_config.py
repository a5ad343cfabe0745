"""A recipe means one exact config; a key that is none of its own is an error with a right one."""

import dataclasses
import re

import pytest

import grpo_harness.training.config
from grpo_harness.training.config import batch_per_process, described, resolve, settings
from grpo_harness.training.recipes import RECIPES

SMOKE = RECIPES["smoke"]
SHORT = dataclasses.replace(SMOKE, prompts_per_step=4, num_generations=4)


def test_tutorial_resolves_to_the_tutorials_values(tmp_path):
    config = resolve(RECIPES["tutorial"], tmp_path, device="cpu")
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
    }.items() <= vars(config).items()
    assert RECIPES["tutorial"].max_prompt_length == 512
    assert (RECIPES["tutorial"].n_math, RECIPES["tutorial"].n_prog) == (64, 64)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_pins_the_traps(name, tmp_path):
    config = resolve(RECIPES[name], tmp_path, device="cpu")
    assert {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "num_iterations": 1,
        "loss_type": "dapo",
        "use_bias_correction_kl": True,
        "report_to": [],
    }.items() <= vars(config).items()


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("clip_range", "epsilon"),
        ("clip_eps", "epsilon"),
        ("kl_coef", "beta"),
        ("group_size", "num_generations"),
        ("max_new_tokens", "max_completion_length"),
        ("max_prompt_length", "max_prompt_length of the recipe"),
        ("batch_size", "prompts_per_step of the recipe"),
        ("learning_rte", "learning_rate"),
        ("max_step", "steps of the recipe"),
        ("beta1", "adam_beta1"),
        ("overwrite_output_dir", "nothing, a folder that exists is never written over"),
        ("zzz", "a field of GRPOConfig"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_right_one(key, right, tmp_path):
    recipe = dataclasses.replace(SHORT, config={key: 1})
    with pytest.raises(ValueError, match=f"no '{key}': use {right}"):
        resolve(recipe, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("epsilon", "has a field of that name"),
        ("max_steps", "a recipe calls it steps"),
        ("num_train_epochs", "a recipe calls it steps"),
        ("per_device_train_batch_size", "a recipe calls it prompts_per_step"),
        ("save_strategy", "a recipe calls it save_steps"),
        ("output_dir", "the folder that the run writes"),
        ("logging_nan_inf_filter", "not the recipe's to set"),
        ("logging_strategy", "judged by what it logs"),
        ("save_only_model", "a resumed run is the same as an uninterrupted one"),
    ],
)
def test_key_that_the_recipe_or_the_run_decides_is_an_error(key, why, tmp_path):
    recipe = dataclasses.replace(SHORT, config={key: 1})
    with pytest.raises(ValueError, match=why):
        resolve(recipe, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_iterations", 0, "a number from 1 on"),
        ("steps_per_generation", -1, "a number from 1 on"),
        ("epsilon_high", -1, "a number from 0 on"),
        ("max_grad_norm", "1", "a number from 0 on"),
        ("adam_beta1", float("nan"), "finite"),
        ("logging_steps", 5, "of 4 steps none would be logged"),
        ("optim", "adamm", "GRPOConfig of TRL .* refuses it .*adamm.*: fix that field"),
    ],
)
def test_value_that_no_run_is_made_of_is_an_error(key, value, wanted, tmp_path):
    recipe = dataclasses.replace(SHORT, config={key: value})
    with pytest.raises(ValueError, match=rf"^recipe 'smoke'.*{wanted}"):
        resolve(recipe, tmp_path, device="cpu")


def test_field_that_this_trl_does_not_have_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delitem(grpo_harness.training.config._FIELDS, "epsilon")
    with pytest.raises(ValueError, match="has no 'epsilon', which every run needs"):
        resolve(SHORT, tmp_path, device="cpu")


def test_further_keys_reach_the_config(tmp_path):
    recipe = dataclasses.replace(SHORT, config={"epsilon_high": 0.28, "max_grad_norm": 0.5})
    config = resolve(recipe, tmp_path, device="cpu")
    assert (config.epsilon_high, config.max_grad_norm) == (0.28, 0.5)


def test_batch_that_does_not_divide_into_groups_is_an_error(tmp_path):
    recipe = dataclasses.replace(
        SHORT, gradient_accumulation_steps=8, config={"steps_per_generation": 1}
    )
    with pytest.raises(ValueError, match="2 completions drawn at once do not divide into groups"):
        resolve(recipe, tmp_path, device="cpu")


def test_batch_that_does_not_divide_into_parts_is_an_error(tmp_path):
    recipe = dataclasses.replace(SHORT, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"16 completions a step .* 3 equal parts"):
        resolve(recipe, tmp_path, device="cpu")


def test_the_batch_is_that_of_all_processes_together():
    recipe = dataclasses.replace(SHORT, gradient_accumulation_steps=2)
    assert [batch_per_process(recipe, n) for n in (1, 2, 4)] == [8, 4, 2]
    with pytest.raises(ValueError, match="split among 3 processes into 2 equal parts"):
        batch_per_process(recipe, 3)


def test_what_the_recipe_chose_is_shown_before_what_trl_chose(tmp_path):
    config = resolve(SMOKE, tmp_path, device="cpu")
    text = described(config)
    chosen, rest = text.split("as TRL has it:")
    assert "learning_rate = 0.0002   (TRL: 1e-06)" in chosen
    assert "loss_type=dapo" in " ".join(rest.split())
    shown = re.findall(r"(?:^|[\s,])(\w+) ?=", text, re.MULTILINE)
    assert sorted(shown) == sorted(settings(config))
