"""A checkpoint is the policy whose curve was logged, or it is named; on real runs."""

import json
import random
import shutil
import statistics
import sys
from dataclasses import replace
from itertools import islice
from statistics import NormalDist

import numpy as np
import pytest
import yaml

from grpo_harness.cli import main
from grpo_harness.logs.read import LogError, read
from grpo_harness.logs.reconcile import (
    RISK,
    SAMPLES,
    Reconciled,
    Reconciliation,
    _Asked,
    _error,
    reconcile,
)
from grpo_harness.policy import PolicyName, find
from grpo_harness.training import train
from grpo_harness.training.files import load
from grpo_harness.training.order import asked

pytestmark = pytest.mark.heavy  # several trainings

REWARDS = """
import json

def short(prompts, completions, trainer_state, **_):
    if trainer_state is not None:  # in the training: what each step asks
        with open("asked.jsonl", "a") as file:
            file.write(json.dumps([trainer_state.global_step + 1, prompts]) + "\\n")
    return [max(0.0, 1 - len(text) / 40) for text in completions]

def digits(completions, answer, **_):
    return [None if len(a) > 2 else float(any(c.isdigit() for c in t))
            for t, a in zip(completions, answer)]
"""
RECIPE = {
    "model_name_or_path": "nano-trained",
    "dataset_name": "train.jsonl",
    "reward_funcs": ["short_rewards.short", "short_rewards.digits"],
    "max_steps": 25,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 24,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project with a policy that was trained, by a reward that it soon earns."""
    home = tmp_path_factory.mktemp("home")
    luck = random.Random(0)
    with (home / "train.jsonl").open("w") as file:
        for _ in range(64):
            a, b = luck.randrange(90), luck.randrange(90)
            row = {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}
            file.write(json.dumps(row) + "\n")
    (home / "short_rewards.py").write_text(REWARDS)
    (home / "ours.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "path", [*sys.path])
        # A checkpoint of step 1 is kept, to be saved in place of the last.
        train(load(home / "ours.yaml", {"max_steps": 1}), home / "first", device="cpu")
        (home / "asked.jsonl").unlink()
        train(load(home / "ours.yaml"), home / "run", device="cpu")
        (home / "asked.jsonl").rename(home / "run-asked.jsonl")
    return home


@pytest.fixture
def recipe(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load(home / "ours.yaml")


@pytest.mark.parametrize("seed", range(3))
def test_the_trained_policy_earns_what_was_logged(home, recipe, seed):
    found = reconcile(read(home / "run"), recipe, device="cpu", seed=seed)
    assert [reward.name for reward in found.rewards] == ["short", "digits"]
    assert found.verdict == "PASS", found.message()
    (short, _) = found.rewards
    first = read(home / "run").series("rewards/short/mean")[0][1]
    assert short.logged - first > 2 * short.noise, "the run has learned, so that it can be told"
    assert "it was asked the 40 prompts of steps 21 to 25" in found.message()


def test_the_prompts_of_each_step_are_those_that_the_trainer_asked(home, recipe):
    """The run wrote down the prompts that its reward got."""
    rows = [json.loads(line)["prompt"] for line in (home / "train.jsonl").read_text().splitlines()]
    seen = [json.loads(line) for line in (home / "run-asked.jsonl").read_text().splitlines()]
    config = recipe.config(home / "unused", device="cpu")
    found = [*islice(asked(config, len(rows)), len(seen))]
    assert len(found) == 25, "a generation each step"
    assert [[step, [rows[i] for i in own for _ in range(8)]] for step, own in found] == seen


@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 32},
        {"steps_per_generation": 4, "per_device_train_batch_size": 16, "seed": 3},
        {"steps_per_generation": 2, "per_device_train_batch_size": 88, "shuffle_dataset": False},
    ],
)
def test_the_prompts_are_known_for_other_schedules(changes, home, recipe):
    """Epochs of 64 rows that do not divide, parts of steps, and completions used twice."""
    (home / "asked.jsonl").unlink(missing_ok=True)
    steps = {"max_steps": 8, "max_completion_length": 2, "learning_rate": 0.0, **changes}
    short = load(home / "ours.yaml", steps)
    name = "-".join(map(str, changes.values()))
    train(short, home / f"schedule-{name}", device="cpu")
    rows = [json.loads(line)["prompt"] for line in (home / "train.jsonl").read_text().splitlines()]
    seen = [json.loads(line) for line in (home / "asked.jsonl").read_text().splitlines()]
    found = islice(asked(short.config(home / "unused", device="cpu"), len(rows)), len(seen))
    assert [[step, [rows[i] for i in own for _ in range(8)]] for step, own in found] == seen
    assert len(seen) > 1


def test_an_order_that_is_not_known_is_said(home, recipe, monkeypatch):
    log = replace(read(home / "run"), processes=2)
    found = reconcile(log, recipe, device="cpu")
    assert found.verdict == "PASS"
    assert "64 random training prompts: it was trained by 2 processes" in found.message()


def swapped(home, tmp_path, other):
    """The run with the weights of another folder."""
    shutil.copytree(home / "run", tmp_path / "run")
    for file in other.iterdir():
        if file.suffix == ".safetensors" or file.name == "adapter_config.json":
            shutil.copy(file, tmp_path / "run" / file.name)
    return tmp_path / "run"


@pytest.mark.parametrize("saved", ["the base", "the policy of step 1"])
def test_another_policy_that_was_saved_in_place_of_it_is_named(saved, home, recipe, tmp_path):
    base = find(PolicyName("nano-trained")).path
    run = swapped(home, tmp_path, base if saved == "the base" else home / "first")
    found = reconcile(read(run), recipe, device="cpu")
    assert found.verdict == "FAIL"
    assert found.message().splitlines()[1].startswith("  short: logged ")
    assert "not the policy whose curve was logged" in found.message()


def test_another_adapter_is_named(home, recipe, tmp_path):
    """LoRA: the adapter that was saved is one that was trained for a step, and not the run's."""
    lora = {
        "use_peft": True,
        "lora_r": 8,
        "learning_rate": 1e-2,
        "lora_target_modules": "all-linear",
    }
    runs = {}
    for name, steps in (("right", 25), ("wrong", 1)):
        runs[name] = load(home / "ours.yaml", {**lora, "max_steps": steps})
        train(runs[name], tmp_path / name, device="cpu")
    honest = reconcile(read(tmp_path / "right"), runs["right"], device="cpu")
    assert honest.verdict != "FAIL", honest.message()
    shutil.copy(
        tmp_path / "wrong" / "adapter_model.safetensors",
        tmp_path / "right" / "adapter_model.safetensors",
    )
    found = reconcile(read(tmp_path / "right"), runs["right"], device="cpu")
    assert found.verdict == "FAIL", found.message()


def other_order(folder):
    """The ids of two tokens are swapped."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    a, b = [name for name, of in vocab.items() if len(name) == 1 and name.isdigit()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(content))


def other_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "helper"))


@pytest.mark.parametrize(
    ("edit", "said"),
    [(other_order, "another vocabulary"), (other_template, "chat template is not that")],
)
def test_a_tokenizer_that_was_swapped_at_saving_is_named(edit, said, home, recipe, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    edit(tmp_path / "run")
    found = reconcile(read(tmp_path / "run"), recipe, device="cpu")
    assert (found.verdict, said in found.message()) == ("FAIL", True)


def test_changed_rewards_and_another_recipe_are_named(home, recipe, tmp_path, monkeypatch):
    lenient = REWARDS.replace("/ 40", "/ 400")
    (home / "lenient_rewards.py").write_text(lenient)
    funcs = ["lenient_rewards.short", "lenient_rewards.digits"]
    changed = load(home / "ours.yaml", {"reward_funcs": funcs})
    assert reconcile(read(home / "run"), changed, device="cpu").verdict == "FAIL"
    (home / "new_rewards.py").write_text(REWARDS.replace("def digits", "def numbers"))
    funcs = ["new_rewards.short", "new_rewards.numbers"]
    renamed = reconcile(
        read(home / "run"), load(home / "ours.yaml", {"reward_funcs": funcs}), device="cpu"
    )
    assert renamed.left_out == ("digits", "numbers")
    assert "not compared: digits, which the log" in renamed.message()
    (home / "other_rewards.py").write_text("def other(completions, **_):\n    return [0.0]\n")
    other = load(home / "ours.yaml", {"reward_funcs": ["other_rewards.other"]})
    with pytest.raises(LogError, match="logs none of the rewards of ours"):
        reconcile(read(home / "run"), other, device="cpu")


def test_the_command_asks_the_checkpoint(home, recipe, capsys):
    rows = json.loads((home / "run" / "log.json").read_text())
    for seed in range(5):  # recorded runs that differ a little; what is asked is the checkpoint
        luck = random.Random(seed)
        near = [{k: v * luck.uniform(0.9, 1.1) for k, v in row.items()} for row in rows]
        near = [{**row, "step": of["step"]} for row, of in zip(near, rows, strict=True)]
        (home / f"seed{seed}").mkdir()
        (home / f"seed{seed}" / "log.json").write_text(json.dumps(near))
    seeds = [f"seed{seed}" for seed in range(5)]
    assert main(["log", *seeds, "--record", "--name", "ours"]) == 0
    capsys.readouterr()
    main(["log", "run", "--recipe", "ours.yaml", "--device", "cpu", "--decisive", "digits"])
    assert "PASS: run against the last steps of its log" in capsys.readouterr().out


# ------------------------------------------------------------------ the noise, simulated


PER_STEP, GROUP = 16, 4
BETWEEN, WITHIN = 0.05, 0.2
"""Variance of a reward between prompts, and of completions of one prompt."""
STEP = (BETWEEN + WITHIN / GROUP) / PER_STEP
"""Variance of a logged step."""


def earned_less_logged(luck, steps, policies, exact=True):
    """Simulate the log of a run whose policies earn these means, and the last one asked anew.

    Returns the difference and its standard error.
    """
    n = steps // 5
    hard = luck.normal(size=(steps, PER_STEP)) * BETWEEN**0.5
    draws = luck.normal(size=(steps, PER_STEP, GROUP)) * WITHIN**0.5
    log = policies[:steps] + (hard[:, :, None] + draws).mean((1, 2))
    asked = hard[-n:].ravel() if exact else luck.normal(size=n * PER_STEP) * BETWEEN**0.5
    anew = luck.normal(size=(len(asked), SAMPLES)) * WITHIN**0.5
    scored = policies[-1] + asked[:, None] + anew
    prompts = _Asked(range(len(asked)), (), exact, "", PER_STEP)
    error = _error(log.tolist(), n, scored.tolist(), prompts, GROUP)
    return scored.mean() - log[-n:].mean(), error


def policies_of(kind, size, steps, luck):
    """The mean reward of each policy of a run, by how it moves; size in errors of a step."""
    moves = luck.normal(size=steps + 1) * size * STEP**0.5
    return {
        "steady": moves * 0,
        "trembling": moves,
        "wandering": moves.cumsum() / 2,
        "rising": np.arange(steps + 1) * size * STEP**0.5 / 10,
    }[kind]


@pytest.mark.parametrize(("steps", "exact"), [(15, True), (40, True), (15, False)])
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("steady", 0),
        *((kind, size) for kind in ("trembling", "wandering", "rising") for size in (0.5, 1, 5)),
    ],
)
def test_an_honest_checkpoint_is_accepted_however_policies_move(kind, size, steps, exact):
    """1 % are not; up to 3 % where few steps say how the policies move. Of 300."""
    luck = np.random.default_rng(1)
    limit, refused = NormalDist().inv_cdf(1 - RISK / 2), 0
    for _ in range(300):
        off, error = earned_less_logged(luck, steps, policies_of(kind, size, steps, luck), exact)
        refused += abs(off) > limit * error
    assert refused <= (3 + 5 if kind == "steady" else 9 + 8), refused / 300


def test_the_noise_of_draws_is_not_taken_for_movement():
    """Of a steady policy, a difference of 2.2 standard deviations of a logged step is seen.

    It was not while all that steps differ by counted as movement: 2.9 were needed.
    """
    luck = np.random.default_rng(2)
    limit = NormalDist().inv_cdf(1 - RISK / 2)
    errors = [earned_less_logged(luck, 30, np.zeros(31))[1] for _ in range(100)]
    assert limit * statistics.median(errors) < 2.2 * STEP**0.5


def test_a_reward_that_moved_less_than_the_noise_proves_nothing():
    seen = Reconciled("a", 0.9, 0.85, noise=0.1, moved=0.4)
    still = Reconciled("b", 0.5, 0.55, noise=0.1, moved=-0.1)
    assert Reconciliation("run", (seen, still)).verdict == "PASS"
    found = Reconciliation("run", (still,))
    assert found.verdict == "UNPROVEN"
    assert "blind: b: only a difference of more than 0.1 would be seen" in found.message()
    assert Reconciliation("run", (replace(still, earned=0.7),)).verdict == "FAIL"
    assert Reconciliation("run", (), otherwise="its tokenizer").verdict == "FAIL"
