"""The contract catches what it is there for: TRL is broken in one place, and the place is named."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from grpo_harness.contract import INVARIANTS, RUNS, BrokenInvariantError, Oracle, observe
from grpo_harness.contract.adam import rate
from grpo_harness.contract.conventions import Conventions
from grpo_harness.contract.trace import Step
from grpo_harness.contract.watched import OF_SEVERAL_PROCESSES

ROOT = Path(__file__).parent.parent
patches = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("trl_patches.py"))))


@pytest.fixture(scope="module")
def oracle():
    return Oracle.of_policy("nano-base", device="cpu")


ALONE = (
    "settings_are_the_recipes",
    "rows_are_complete_and_finite",
    "on_policy_the_ratio_is_one",
    "every_draw_has_its_own_random_numbers",
    "gradients_are_clipped_as_asked",
    "every_update_is_adamws",
    "only_updates_move_the_weights",
    "rates_logged_are_the_schedules",
    "what_is_saved_is_what_was_trained",
)
WITH_ORACLE = (
    "training_starts_from_the_base",
    "every_problem_has_its_turn",
    "prompts_are_the_templates",
    "the_mask_is_the_completions",
    "the_checkpoint_is_whole",
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


OFF_POLICY = ("clipped", "halves")

PAIRS = {
    "the_same_seed_gives_the_same_rows": ("plain", "again"),
    "another_seed_gives_another_run": ("plain", "reseeded"),
    "resumed_equals_uninterrupted": ("resumed", "tuned"),
}
"""Invariants that compare two runs, and which."""


def text(invariant, *seen):
    """What an invariant says, or None if it holds."""
    try:
        INVARIANTS[invariant](*seen)
    except BrokenInvariantError as broken:
        return str(broken)
    return None


def watched(name, folder, steps):
    """Watch a run of the contract for at most so many steps."""
    run = RUNS[name]
    recipe = run.recipe.with_values(max_steps=min(run.recipe.values["max_steps"], steps))
    return observe(dataclasses.replace(run, recipe=recipe), folder / name, device="cpu")


def broken(name, oracle, folder):
    """The invariants that a run of the contract breaks, with what they say."""
    # Whatever can be seen is seen within two steps.
    seen = watched(name, folder, 2)
    if RUNS[name].policy is not None:
        oracle = Oracle.of_policy(seen.recipe.policy, device="cpu")
    if name == "poisoned":
        said = {"a_nan_is_seen": text("a_nan_is_seen", seen)}
    else:
        alone, with_oracle = list(ALONE), list(WITH_ORACLE)
        if name in OFF_POLICY:
            alone.remove("on_policy_the_ratio_is_one")
        if name == "clipped":
            with_oracle.append("clipping_acts_off_policy")
        said = {invariant: text(invariant, seen) for invariant in alone}
        said |= {i: text(i, seen, oracle) for i in with_oracle}
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
    "nan_filtered_out_of_the_step": ("poisoned", "a_nan_is_seen", "step 2: the loss is NaN and"),
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
    "epsilon_high_ignored": (
        "clipped",
        "clipping_acts_off_policy",
        "the gradient of epsilon_high = epsilon",
    ),
    "epsilon_low_hard_coded": ("clipped", "loss_equals_the_oracles", "is right"),
    "delta_ignored": (
        "clipped",
        "gradient_equals_the_oracles",
        "the gradient of no delta: the ratio is not bounded",
    ),
    "kl_times_the_clipped_ratio": (
        "clipped",
        "gradient_equals_the_oracles",
        "away from the oracle",
    ),
    "low_min_is_the_maximum": (
        "clipped",
        "figures_of_the_policy_are_the_oracles",
        "clip_ratio/low_min is",
    ),
    "high_max_is_0": (
        "clipped",
        "figures_of_the_policy_are_the_oracles",
        "clip_ratio/high_max is 0.0",
    ),
    "tokens_of_the_whole_window": (
        "halves",
        "gradient_equals_the_oracles",
        "it is 0.5 times the right one",
    ),
    "dr_grpo_by_the_longest": ("dr-grpo", "gradient_equals_the_oracles", "times the right one"),
    "a_token_more": (
        "plain",
        "counts_are_those_of_the_completions",
        "has 17 tokens, and max_completion_length is 16",
    ),
    "a_token_less": (
        "plain",
        "counts_are_those_of_the_completions",
        "has 15 tokens, none of which is an end token, and max_completion_length is 16",
    ),
    "last_token_out_of_the_loss": ("plain", "gradient_equals_the_oracles", "away from the oracle"),
    "top_p_ignored": ("tuned", "rollouts_are_the_current_policys", "(without top_p: 100.0%)"),
    "no_shuffle": ("plain", "every_problem_has_its_turn", "round 1 has the order of the recipe"),
    "same_prompts_each_step": (
        "plain",
        "every_problem_has_its_turn",
        "step 2 asks problem 6 again",
    ),
    "seed_ignored": ("plain", "the_same_seed_gives_the_same_rows", "step 1: "),
    "seed_constant": (
        "plain",
        "every_draw_has_its_own_random_numbers",
        "step 2 draws from the random numbers of step 1",
    ),
    "seed_does_not_reach_the_sampler": (
        "plain",
        "another_seed_gives_another_run",
        "step 1 asks the same problems in the same order",
    ),
    "lr_schedule_ignored": (
        "tuned",
        "every_update_is_adamws",
        " times as far as at the rate 0.000",
    ),
    "lr_linear_always": ("plain", "every_update_is_adamws", "times as far as at the rate 0.001"),
    "logged_lr_wrong": ("plain", "rates_logged_are_the_schedules", "is 0.002, and 0.001 is right"),
    "no_grad_clip": ("tuned", "gradients_are_clipped_as_asked", "it is not clipped"),
    "adam_second_step_reset": (
        "plain",
        "every_update_is_adamws",
        "the first update of an optimizer without state",
    ),
    "sgd_after_1": ("plain", "every_update_is_adamws", "step 2: "),
    "skip_every_second_step": (
        "plain",
        "every_update_is_adamws",
        "the weights are left as they are",
    ),
    "double_update": ("plain", "every_update_is_adamws", "step 2: "),
    "weight_decay_dropped": ("tuned", "every_update_is_adamws", "step 1: "),
    "weights_averaged_between_steps": ("plain", "only_updates_move_the_weights", "after step 1: "),
    "resume_loses_optimizer": (
        "resumed",
        "resumed_equals_uninterrupted",
        "makes another update of the same gradient",
    ),
    "resume_loses_rng": ("resumed", "resumed_equals_uninterrupted", "draws other random numbers"),
    "bf16_weights_saved": ("plain", "what_is_saved_is_what_was_trained", "on disk: "),
    "advantages_clamped": ("large", "advantages_are_group_relative", "5.000000, and "),
    "mask_cut_after_32": ("long", "the_mask_is_the_completions", "has mask 0, and 1 is right"),
    "loss_cut_after_32": ("long", "gradient_equals_the_oracles", "away from the oracle"),
    "second_end_ignored": ("two-ended", "counts_are_those_of_the_completions", "is right"),
    "beginning_twice": ("two-ended", "prompts_are_the_templates", "; without the first they are"),
    "template_not_saved": ("plain", "the_checkpoint_is_whole", "its chat template is"),
    "generation_config_not_saved": (
        "two-ended",
        "the_checkpoint_is_whole",
        "its set of end tokens is",
    ),
    "problems_not_listed": ("plain", "the_checkpoint_is_whole", "problems.txt lists 0 problems"),
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
    "top_p_ignored": set(),
    "no_shuffle": set(),
    "same_prompts_each_step": set(),
    "lr_schedule_ignored": {"rates_logged_are_the_schedules"},
    "lr_linear_always": {"rates_logged_are_the_schedules"},
    "logged_lr_wrong": set(),
    "no_grad_clip": set(),
    "adam_second_step_reset": set(),
    "sgd_after_1": set(),
    "skip_every_second_step": set(),
    "double_update": set(),
    "weight_decay_dropped": set(),
    "weights_averaged_between_steps": set(),
    "bf16_weights_saved": set(),
    "advantages_clamped": {"loss_equals_the_oracles", "gradient_equals_the_oracles"},
    "loss_cut_after_32": {
        "log_probabilities_are_the_policys",
        "loss_equals_the_oracles",
        "figures_of_the_policy_are_the_oracles",
    },
    "beginning_twice": {"every_problem_has_its_turn"},
    "template_not_saved": set(),
    "generation_config_not_saved": set(),
    "problems_not_listed": set(),
}
"""What else a patch breaks, for those that are told from every other by it."""


SHORT = (
    "ddof_0",
    "temperature_ignored",
    "a_token_less",
    "tokens_of_the_whole_window",
    "dr_grpo_by_the_longest",
    "delta_ignored",
    "epsilon_0",
    "bnpo_for_dapo",
    "k1_for_k3",
    "halved_under_accumulation",
    "rewards_broadcast",
    "rollouts_from_the_base",
    "nan_to_num_on_the_loss",
    "advantages_of_the_wrong_group",
    "top_p_ignored",
    "same_prompts_each_step",
    "seed_constant",
    "lr_linear_always",
    "no_grad_clip",
    "adam_second_step_reset",
    "resume_loses_optimizer",
    "bf16_weights_saved",
    "advantages_clamped",
    "mask_cut_after_32",
    "loss_cut_after_32",
    "second_end_ignored",
    "beginning_twice",
    "template_not_saved",
    "generation_config_not_saved",
    "problems_not_listed",
)
"""One patch of each kind; `make contract` takes all of them, and the whole suite for each."""


def check_patch(patch, oracle, folder, monkeypatch):
    name, invariant, says = CAUGHT[patch]
    getattr(patches, patch)(monkeypatch)
    if invariant in PAIRS:
        pair = [watched(name, folder, 4) for name in PAIRS[invariant]]
        texts = {invariant: text(invariant, *pair) or "holds"}
    else:
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
    plain, cool = (watched(name, tmp_path, steps=1) for name in ("plain", "cool"))
    assert "step 1: " in text("the_same_seed_gives_the_same_rows", plain, cool)
    assert "from the turned gradient" in text("negated_reward_negates_the_gradient", plain, plain)
    assert "not those of run 'cool'" in text("negated_reward_negates_the_gradient", plain, cool)
    assert "1 and 1 micro-batches" in text("accumulation_changes_nothing", plain, plain)
    assert "changed" in text("constant_reward_changes_nothing", plain)
    assert text("weights_move", plain) is None
    plain.after = plain.steps[0].weights
    assert "0.0% of the elements" in text("weights_move", plain)
    assert "after step 1: " in text("only_updates_move_the_weights", plain)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_rates_are_the_schedulers(name, warmup):
    """The formulas are those of the schedules that transformers has by these names."""
    config = transformers.TrainingArguments(
        lr_scheduler_type=name, warmup_steps=warmup, learning_rate=1e-3, use_cpu=True
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-3)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, 7)
    for step in range(1, 8):
        assert rate(config, 7, step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_schedule_without_a_formula_is_an_error():
    config = transformers.TrainingArguments(lr_scheduler_type="polynomial", use_cpu=True)
    with pytest.raises(ValueError, match="no formula of the schedule 'polynomial'"):
        rate(config, 1, 1)


def test_update_that_is_a_thousandth_off_is_seen(tmp_path):
    plain = watched("plain", tmp_path, 2)
    assert text("every_update_is_adamws", plain) is None
    last = plain.steps[-1]
    last.after = {name: w + 1e-3 * (w - last.weights[name]) for name, w in last.after.items()}
    assert "1.001 times as far as at the rate 0.001" in text("every_update_is_adamws", plain)
    plain.steps.pop()
    assert "made in steps [1], of 2" in text("every_update_is_adamws", plain)


def test_loss_that_alone_is_off_is_said_to_be(oracle, tmp_path):
    plain = watched("plain", tmp_path, 1)
    (micro_batch,) = plain.steps[0].micro_batches
    plain.steps[0].micro_batches = [dataclasses.replace(micro_batch, loss=micro_batch.loss + 0.1)]
    assert "is right; the gradient is the right one" in text(
        "loss_equals_the_oracles", plain, oracle
    )


def test_nothing_to_learn_from_is_a_loss_of_zero(oracle, tmp_path, monkeypatch):
    """Every completion is masked; or a micro-batch holds what was never drawn."""
    run = watched("plain", tmp_path, steps=1)
    (step,) = run.steps
    how = Conventions.of(run.config)
    strange = dataclasses.replace(step.micro_batches[0], rows=(((1,), (2,)),))
    alone = Step(step.number, step.batch, step.weights, [strange])
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


def test_the_suite_checks_every_invariant():
    table = runpy.run_path(str(ROOT / "suites" / "test_training.py"))["CONTRACT"]
    assert table.keys() == INVARIANTS.keys() - set(OF_SEVERAL_PROCESSES)
    assert {name for runs in table.values() for names in runs for name in names.split()} <= set(
        RUNS
    )


def test_suite_turns_red_and_names_the_invariant():
    result = pytest_of_the_suite("ddof_0", "-k", "plain and (advantages or counts)")
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert "advantages_are_group_relative: " in result.stdout
    assert "they are advantages with ddof = 0" in result.stdout
