"""How a checkpoint is asked: as its training drew, the prompts of the last steps, by its log."""

import json
import shutil
import sys
from itertools import islice
from statistics import NormalDist

import pytest
import yaml
from transformers import AutoTokenizer

from grpo_harness.logs.read import read
from grpo_harness.logs.reconcile import LEAST, RISK, SAMPLES, reconcile
from grpo_harness.policy import PolicyName, find
from grpo_harness.training.files import load
from grpo_harness.training.order import asked

REWARDS = """
SEEN = []

def letters(prompts, completions, completion_ids, **_):
    SEEN.extend(zip(prompts, completions, completion_ids))
    return [sum(map(str.isalpha, text)) / 8 for text in completions]

def one(completions, **_):
    return [1.0] * len(completions)
"""
STEPS, PROMPTS = 25, [f"What is {i} + 1?" for i in range(16)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that writes a recipe with some changes, beside a checkpoint with a log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "asked_rewards", raising=False)
    (tmp_path / "asked_rewards.py").write_text(REWARDS)
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS))
    shutil.copytree(find(PolicyName("nano-base")).path, tmp_path / "run")
    rows = []
    for step in range(1, STEPS + 1):
        value = max(step - 20, 0) / 6  # in the last fifth a half, on average
        rewards = {f"rewards/{name}/mean": value for name in ("letters", "one")}
        rows.append({"step": step, "loss": 0.0, "reward": value, **rewards})
    (tmp_path / "run" / "log.json").write_text(json.dumps(rows))

    def recipe(*rewards, **changes):
        content = {
            "model_name_or_path": "nano-base",
            "dataset_name": "train.jsonl",
            "reward_funcs": [f"asked_rewards.{name}" for name in rewards or ("letters",)],
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            **changes,
        }
        (tmp_path / "ours.yaml").write_text(yaml.safe_dump(content))
        return load(tmp_path / "ours.yaml")

    return recipe


def reconciled(recipe):
    return reconcile(read(recipe.path.parent / "run"), recipe, device="cpu")


def drawn(recipe):
    """The prompts and the token ids that the checkpoint drew, in the order of the prompts."""
    seen = sys.modules["asked_rewards"].SEEN if "asked_rewards" in sys.modules else []
    seen.clear()
    reconciled(recipe)
    found = sys.modules["asked_rewards"].SEEN
    return [prompt for prompt, _, _ in found], [tuple(ids) for _, _, ids in found]


def test_completions_are_drawn_as_in_the_training(project):
    def kinds(**changes):
        """How many completions of a prompt differ, at most."""
        _, ids = drawn(project(**changes))
        return max(len({*ids[i : i + SAMPLES]}) for i in range(0, len(ids), SAMPLES))

    hot = {"temperature": 3.0}
    assert kinds(**hot) == SAMPLES
    for certain in ({"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert kinds(**{**hot, **certain}) == 1, certain
    (_, often), (_, seldom) = (drawn(project(**hot, repetition_penalty=p)) for p in (1.0, 9.0))
    assert max(map(len, often)) == 6, "the recipe's max_completion_length"
    assert often != seldom, "from the same seeds"


def test_the_last_fifth_of_the_steps_is_asked_and_compared(project):
    recipe = project()
    prompts, _ = drawn(recipe)
    found = reconciled(recipe)
    config = recipe.config(recipe.path.parent / "unused", device="cpu")
    steps = dict(islice(asked(config, len(PROMPTS)), STEPS))
    assert [*steps] == [*range(1, STEPS + 1)]
    last = [i for step in range(21, 26) for i in steps[step]]
    assert sorted(prompts) == sorted(PROMPTS[i] for i in last for _ in range(SAMPLES))
    assert found.asked == "the 10 prompts of steps 21 to 25"
    (letters,) = found.rewards
    assert (letters.logged, letters.moved) == (pytest.approx(0.5), pytest.approx(0.5))


def test_rewards_share_the_risk_and_a_small_part_of_the_range_is_no_fault(project):
    (alone,) = reconciled(project("letters")).rewards
    both = reconciled(project("letters", "one")).rewards
    assert [reward.name for reward in both] == ["letters", "one"]
    assert both[0].earned == alone.earned, "the same draws"
    one, two = (NormalDist().inv_cdf(1 - RISK / 2 / n) for n in (1, 2))
    assert both[0].noise / alone.noise == pytest.approx(two / one)
    steady = [
        {"step": step, "loss": 0.0, "reward": 1.0, "rewards/one/mean": float(step > 5)}
        for step in range(1, STEPS + 1)
    ]
    (project("one").path.parent / "run" / "log.json").write_text(json.dumps(steady))
    (one,) = reconciled(project("one")).rewards
    assert (one.earned, one.logged, one.noise) == (1.0, 1.0, LEAST)


def test_another_end_token_is_named(project):
    recipe = project()
    folder = recipe.path.parent / "run"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = next(token for token in tokenizer.get_vocab() if token == "a")
    tokenizer.save_pretrained(folder)
    found = reconciled(recipe)
    assert found.verdict == "FAIL"
    assert "another end token" in found.message()
