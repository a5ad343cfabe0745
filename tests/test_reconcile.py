"""A checkpoint is the policy whose curve was logged, or it is named; on real runs."""

import json
import random
import shutil
import sys
from statistics import fmean

import pytest
import yaml
from scipy.special import stdtrit

from grpo_harness.cli import main
from grpo_harness.logs.read import LogError, read
from grpo_harness.logs.reconcile import _noise, _trend, reconcile
from grpo_harness.policy import PolicyName, find
from grpo_harness.training import train
from grpo_harness.training.files import load

pytestmark = pytest.mark.heavy  # four trainings

REWARDS = """
def short(completions, **_):
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
        train(load(home / "ours.yaml"), home / "run", device="cpu")
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
    assert short.logged - first > 2 * short.most, "the run has learned, so that it can be told"


def test_a_base_that_was_saved_in_place_of_it_is_named(home, recipe, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    for file in find(PolicyName("nano-trained")).path.iterdir():
        if file.suffix == ".safetensors":
            shutil.copy(file, tmp_path / "run" / file.name)
    found = reconcile(read(tmp_path / "run"), recipe, device="cpu")
    assert found.verdict == "FAIL"
    assert found.message().splitlines()[1].startswith("  short: logged ")
    assert "not the policy whose curve was logged" in found.message()


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
    for seed in range(3):
        small = load(home / "ours.yaml", {"seed": seed, "max_steps": 25})
        if not (home / f"seed{seed}").exists():
            train(small, home / f"seed{seed}", device="cpu")
    assert main(["log", "seed0", "seed1", "seed2", "--record"]) == 0
    capsys.readouterr()
    main(["log", "run", "--recipe", "ours.yaml", "--device", "cpu"])
    assert "PASS: run against the last steps of its log" in capsys.readouterr().out


def test_the_slope_of_a_line_is_found():
    """The last fifth of 50 steps is 10: from its middle to its end a line of slope s rises 5 s."""
    assert _trend([0.3 * i for i in range(50)]) == pytest.approx(1.5)
    assert _trend([1.0] * 50) == 0.0
    assert _trend([1.0, 2.0]) == 0.0


@pytest.mark.parametrize("steps", [15, 100])
def test_the_noise_of_the_last_steps_is_known_as_well_as_it_is_said_to_be(steps):
    """The last fifth's mean of pure noise is off by more than a quantile as often as that says."""
    luck, n, times = random.Random(0), steps // 5, 4000
    outside = 0
    for _ in range(times):
        series = [luck.gauss(0, 1) for _ in range(steps)]
        error, freedom = _noise(series)
        outside += abs(fmean(series[-n:])) > error * stdtrit(freedom, 0.99)
    assert outside / times == pytest.approx(0.02, abs=0.01)
