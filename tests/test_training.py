"""The recipe resolves to one exact config, and a run leaves a whole policy or nothing."""

import csv
import dataclasses
import hashlib
import json
import math

import pytest
import torch

from harness.policy import find, load
from harness.recipes import RECIPES
from harness.training import TrainingError, resolve, train

SHORT = dataclasses.replace(RECIPES["smoke"], steps=2, prompts_per_step=4, num_generations=4)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(SHORT, tmp_path_factory.mktemp("training") / "trained", device="cpu")


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
        "report_to": [],
    }.items() <= vars(config).items()


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("clip_range", "epsilon"),
        ("clip_eps", "epsilon"),
        ("max_prompt_length", "max_prompt_length of the recipe"),
        ("learning_rte", "learning_rate"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_right_one(key, right, tmp_path):
    recipe = dataclasses.replace(SHORT, config={key: 1})
    with pytest.raises(ValueError, match=f"no '{key}': use {right}"):
        resolve(recipe, tmp_path, device="cpu")


def test_key_with_a_field_of_its_own_is_an_error(tmp_path):
    recipe = dataclasses.replace(SHORT, config={"epsilon": 0.3})
    with pytest.raises(ValueError, match="has a field of that name"):
        resolve(recipe, tmp_path, device="cpu")


def test_further_keys_reach_the_config(tmp_path):
    recipe = dataclasses.replace(SHORT, config={"epsilon_high": 0.28, "max_grad_norm": 0.5})
    config = resolve(recipe, tmp_path, device="cpu")
    assert (config.epsilon_high, config.max_grad_norm) == (0.28, 0.5)


def test_batch_that_does_not_divide_into_groups_is_an_error(tmp_path):
    recipe = dataclasses.replace(SHORT, config={"per_device_train_batch_size": 6})
    with pytest.raises(ValueError, match="6 completions a step do not divide into groups"):
        resolve(recipe, tmp_path, device="cpu")


def test_batch_that_does_not_divide_into_parts_is_an_error(tmp_path):
    recipe = dataclasses.replace(SHORT, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"16 completions a step .* 3 equal parts"):
        resolve(recipe, tmp_path, device="cpu")


def test_prompt_too_long_is_an_error(tmp_path):
    recipe = dataclasses.replace(SHORT, max_prompt_length=25)
    with pytest.raises(ValueError, match="max_prompt_length is 25"):
        train(recipe, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_every_step_is_logged_and_finite(run):
    assert [row["step"] for row in run.log] == [1, 2]
    for row in run.log:
        for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
            assert math.isfinite(row[name]), name


def test_weights_move(run):
    assert run.weights_moved >= 0.5


def test_checkpoint_reloads_to_the_same_logits(run):
    policy = load(str(run.path), device="cpu")
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.inference_mode():
        assert torch.equal(policy.model(ids).logits, run.model(ids).logits)
    base = load("nano-base", device="cpu")
    assert policy.eos_token_ids == base.eos_token_ids
    assert policy.fingerprint.tokenizer == base.fingerprint.tokenizer
    assert policy.fingerprint.weights != base.fingerprint.weights


def test_folder_is_complete(run):
    record = json.loads((run.path / "recipe.json").read_text())
    assert record["recipe"]["num_generations"] == 4
    assert record["config"]["loss_type"] == "dapo"
    assert "trl" in record["versions"]
    assert record["base"]["fingerprint"] == str(load("nano-base", device="cpu").fingerprint)
    with (run.path / "curves.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    assert len(json.loads((run.path / "log.json").read_text())) == 2
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in run.path.parent.iterdir()] == ["trained"]
    assert not list(run.path.glob("*.bin"))


def test_same_seed_same_run_and_base_unchanged(run, tmp_path):
    before = digests(find("nano-base").path)
    again = train(SHORT, tmp_path / "again", device="cpu")
    assert digests(find("nano-base").path) == before
    assert [row["reward"] for row in again.log] == [row["reward"] for row in run.log]
    assert [row["grad_norm"] for row in again.log] == [row["grad_norm"] for row in run.log]


def test_progress_sees_every_step(tmp_path):
    seen = []
    train(SHORT, tmp_path / "out", device="cpu", progress=seen.append)
    assert [row["step"] for row in seen] == [1, 2]


def test_existing_out_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        train(SHORT, tmp_path, device="cpu")


def test_nothing_is_left_when_the_reward_raises(tmp_path):
    def broken(prompts, completions, **kwargs):
        raise RuntimeError("the reward is broken")

    with pytest.raises(RuntimeError, match="the reward is broken"):
        train(SHORT, tmp_path / "out", device="cpu", reward=broken)
    assert not list(tmp_path.iterdir())


def test_reward_that_is_no_number_ends_the_run(tmp_path):
    def nan(prompts, completions, **kwargs):
        return [math.nan] * len(prompts)

    with pytest.raises(TrainingError, match="step 1: "):
        train(SHORT, tmp_path / "out", device="cpu", reward=nan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no recipe 'nonsense'"),
        (["smoke", "--policy", "no-such-policy"], "no policy 'no-such-policy'"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
