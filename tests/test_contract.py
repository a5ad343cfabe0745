"""The contract catches what it is there for: TRL is broken in one place, and the place is named."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.contract import INVARIANTS, RUNS, BrokenInvariantError, Oracle, watch
from harness.contract.oracle import Conventions
from harness.contract.witness import Step

ROOT = Path(__file__).parent.parent
patches = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("trl_patches.py"))))


@pytest.fixture(scope="module")
def oracle():
    return Oracle("nano-base", device="cpu")


ALONE = (
    "settings_are_the_recipes",
    "rows_are_complete_and_finite",
    "on_policy_the_ratio_is_one",
)
WITH_ORACLE = (
    "training_starts_from_the_base",
    "what_is_drawn_is_scored_and_trained_on",
    "rollouts_are_the_current_policys",
    "rewards_are_the_completions",
    "advantages_are_group_relative",
    "counts_are_those_of_the_completions",
    "log_probabilities_are_the_policys",
    "loss_equals_the_oracles",
    "gradient_equals_the_oracles",
    "figures_of_the_policy_are_the_oracles",
)


def text(invariant, *seen):
    """What an invariant says, or None if it holds."""
    try:
        INVARIANTS[invariant](*seen)
    except BrokenInvariantError as broken:
        return str(broken)
    return None


def broken(name, oracle, folder):
    """The invariants that a run of the contract breaks, with what they say."""
    run = RUNS[name]
    # Whatever can be seen is seen within two steps.
    recipe = dataclasses.replace(run.recipe, steps=min(run.recipe.steps, 2))
    seen = watch(recipe, folder / name, device="cpu", reward=run.reward, nan_at=run.nan_at)
    if name == "poisoned":
        said = {"a_nan_is_seen": text("a_nan_is_seen", seen)}
    elif name == "clipped":
        said = {"clipping_acts_off_policy": text("clipping_acts_off_policy", seen, oracle)}
    else:
        said = {invariant: text(invariant, seen) for invariant in ALONE}
        said |= {invariant: text(invariant, seen, oracle) for invariant in WITH_ORACLE}
    return {invariant: words for invariant, words in said.items() if words}


CAUGHT = {
    "ddof_0": ("plain", "advantages_are_group_relative", "advantages with ddof = 0"),
    "ddof_0_behind_the_logs": ("plain", "advantages_are_group_relative", "the advantage used is"),
    "temperature_ignored": (
        "cool",
        "log_probabilities_are_the_policys",
        "the temperature is ignored",
    ),
    "epsilon_0": ("clipped", "clipping_acts_off_policy", "the gradient of epsilon = 0"),
    "epsilon_0_in_the_trainer": ("accumulated", "settings_are_the_recipes", "epsilon_low is 0.0"),
    "bnpo_for_dapo": ("accumulated", "gradient_equals_the_oracles", "of loss_type bnpo"),
    "k1_for_k3": ("anchored", "gradient_equals_the_oracles", "KL estimator k1 times the ratio"),
    "halved_under_accumulation": (
        "accumulated",
        "gradient_equals_the_oracles",
        "it is 0.5 times the right one",
    ),
    "rewards_broadcast": ("plain", "rewards_are_the_completions", "is logged with reward"),
    "first_completion_scored_for_all": (
        "plain",
        "what_is_drawn_is_scored_and_trained_on",
        "and scored as",
    ),
    "rollouts_from_the_base": (
        "plain",
        "rollouts_are_the_current_policys",
        "(the base policy's draw 100.0%)",
    ),
    "rollouts_from_another_model": (
        "plain",
        "rollouts_are_the_current_policys",
        "the model under training drew nothing",
    ),
    "nan_filter_forced": ("poisoned", "a_nan_is_seen", "NaN is filtered"),
    "nan_to_num_on_the_loss": ("poisoned", "a_nan_is_seen", "NaN is filtered"),
    "advantages_of_the_wrong_group": (
        "plain",
        "advantages_are_group_relative",
        "they are advantages of the wrong group, 1 further on",
    ),
    "advantages_of_the_wrong_group_in_the_loss": (
        "plain",
        "gradient_equals_the_oracles",
        "advantages of the wrong group, 1 further on",
    ),
    "attention_mask_left_out": ("plain", "log_probabilities_are_the_policys", "is right"),
}


ONLY = {
    "epsilon_0_in_the_trainer": set(),
    "rollouts_from_the_base": set(),
    "rollouts_from_another_model": set(),
    "halved_under_accumulation": {"loss_equals_the_oracles"},
    "advantages_of_the_wrong_group_in_the_loss": {"loss_equals_the_oracles"},
    "k1_for_k3": {"loss_equals_the_oracles", "figures_of_the_policy_are_the_oracles"},
    "ddof_0_behind_the_logs": {"loss_equals_the_oracles", "gradient_equals_the_oracles"},
    "first_completion_scored_for_all": {"rewards_are_the_completions"},
}
"""What else a patch breaks, for those that are told from every other by it."""


SHORT = (
    "ddof_0",
    "temperature_ignored",
    "epsilon_0",
    "bnpo_for_dapo",
    "k1_for_k3",
    "halved_under_accumulation",
    "rewards_broadcast",
    "rollouts_from_the_base",
    "nan_to_num_on_the_loss",
    "advantages_of_the_wrong_group",
)
"""One patch of each kind; `make contract` takes all of them, and the whole suite for each."""


def check_patch(patch, oracle, folder, monkeypatch):
    name, invariant, says = CAUGHT[patch]
    getattr(patches, patch)(monkeypatch)
    texts = broken(name, oracle, folder)
    assert says in texts[invariant]
    assert texts[invariant].startswith(f"{invariant}: ")
    assert f"broken in run '{name}'" in texts[invariant]
    if patch in ONLY:
        assert set(texts) == {invariant, *ONLY[patch]}


@pytest.mark.parametrize("patch", SHORT)
def test_patch_breaks_its_invariant(patch, oracle, tmp_path, monkeypatch):
    check_patch(patch, oracle, tmp_path, monkeypatch)


def test_without_a_patch_nothing_is_broken(oracle, tmp_path):
    assert broken("plain", oracle, tmp_path) == {}


def test_pairs_of_runs_are_told_apart(tmp_path):
    """What compares two runs is false of two that differ."""
    short = {name: dataclasses.replace(RUNS[name].recipe, steps=1) for name in ("plain", "cool")}
    plain, cool = (watch(short[name], tmp_path / name, device="cpu") for name in short)
    assert "step 1: " in text("the_same_seed_gives_the_same_rows", plain, cool)
    assert "from the turned gradient" in text("negated_reward_negates_the_gradient", plain, plain)
    assert "not those of run 'cool'" in text("negated_reward_negates_the_gradient", plain, cool)
    assert "1 and 1 parts" in text("accumulation_changes_nothing", plain, plain)
    assert "changed" in text("constant_reward_changes_nothing", plain)
    assert text("weights_move", plain) is None
    assert text("the_first_update_is_adams", plain) is None
    plain.after = plain.steps[0].weights
    assert "0.0% of the elements" in text("weights_move", plain)
    assert "off, of 0.001" in text("the_first_update_is_adams", plain)


def test_nothing_to_learn_from_is_a_loss_of_zero(oracle, tmp_path, monkeypatch):
    """A window of which every completion is masked, and a part that the window knows nothing of."""
    recipe = dataclasses.replace(RUNS["plain"].recipe, steps=1)
    run = watch(recipe, tmp_path / "run", device="cpu")
    (step,) = run.steps
    how = Conventions.of(run.recipe)
    strange = dataclasses.replace(step.parts[0], rows=(((1,), (2,)),))
    alone = Step(step.number, step.window, step.weights, [strange])
    monkeypatch.setattr(oracle, "truncated", lambda completion: True)
    masked = dataclasses.replace(how, mask_truncated=True)
    for seen in (oracle.step(run, alone, how), oracle.step(run, step, masked)):
        assert seen.loss == 0
        assert not any(values.any() for values in seen.gradient.values())


def pytest_of_the_suite(patch, *arguments):
    """Run the real suite in a process of its own, with TRL patched from its start."""
    command = [sys.executable, "-m", "pytest", "suites/test_training.py", "-q", *arguments]
    if patch:
        command += ["-p", "trl_patches"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    named = os.environ | {"PYTHONPATH": path, patches.VARIABLE: patch or ""}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=named)


def test_suite_turns_red_and_names_the_invariant():
    result = pytest_of_the_suite("ddof_0", "-k", "plain and (advantages or counts)")
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert "advantages_are_group_relative: " in result.stdout
    assert "they are advantages with ddof = 0" in result.stdout
