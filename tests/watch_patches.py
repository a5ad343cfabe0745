"""Every patch of TRL is caught in a trainer of a team's own: `make contract`.

Kept out of `make test` by its name. A plain ``GRPOTrainer`` and a subclass are built by TRL's
documentation, with the settings that the patch acts on.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_harness.contract import watch

HERE = Path(__file__).parent
patches = SimpleNamespace(**runpy.run_path(str(HERE / "trl_patches.py")))
made = SimpleNamespace(**runpy.run_path(str(HERE / "trainers.py")))

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LOGGED = {"log_completions": True, "num_completions_to_print": 0}
HALVES = {"gradient_accumulation_steps": 2}
REUSED = {
    "num_iterations": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 16,
    "beta": 0.05,
    "lr_scheduler_type": "constant",
    "temperature": 1.2,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "delta": 1.5,
}
"""The second step is off-policy: some of its ratios are beyond each of the bounds."""
LONG = {"temperature": 3.0, "max_completion_length": 96, "max_steps": 1}
TUNED = {"max_grad_norm": 0.2, "weight_decay": 0.1, "max_steps": 4}
CONSTANT = {"lr_scheduler_type": "constant"}

CAUGHT = {
    "ddof_0": ({}, "advantages_are_group_relative"),
    "ddof_0_behind_the_logs": ({}, "advantages_are_group_relative"),
    "temperature_ignored": ({"temperature": 0.7}, "log_probabilities_are_the_policys"),
    "epsilon_0": (REUSED, "gradient_equals_the_oracles"),
    "epsilon_0_in_the_trainer": ({}, "settings_are_the_recipes"),
    "bnpo_for_dapo": (HALVES, "gradient_equals_the_oracles"),
    "k1_for_k3": ({"beta": 0.5}, "gradient_equals_the_oracles"),
    "halved_under_accumulation": (HALVES, "gradient_equals_the_oracles"),
    "rewards_broadcast": (LOGGED, "rewards_are_the_completions"),
    "first_completion_scored_for_all": ({}, "what_is_drawn_is_scored_and_trained_on"),
    "rollouts_from_the_base": ({}, "rollouts_are_the_current_policys"),
    "rollouts_from_another_model": ({}, "rollouts_are_the_current_policys"),
    "advantages_of_the_wrong_group": ({}, "advantages_are_group_relative"),
    "advantages_of_the_wrong_group_in_the_loss": ({}, "gradient_equals_the_oracles"),
    "attention_mask_left_out": ({}, "log_probabilities_are_the_policys"),
    "epsilon_high_ignored": (REUSED, "gradient_equals_the_oracles"),
    "epsilon_low_hard_coded": (REUSED, "loss_equals_the_oracles"),
    "delta_ignored": (REUSED, "gradient_equals_the_oracles"),
    "kl_times_the_clipped_ratio": (REUSED, "gradient_equals_the_oracles"),
    "low_min_is_the_maximum": (REUSED, "figures_of_the_policy_are_the_oracles"),
    "high_max_is_0": (REUSED, "figures_of_the_policy_are_the_oracles"),
    "tokens_of_the_whole_window": (
        {**HALVES, "steps_per_generation": 4},
        "gradient_equals_the_oracles",
    ),
    "dr_grpo_by_the_longest": (
        {**HALVES, "loss_type": "dr_grpo", "max_completion_length": 64, "max_steps": 1},
        "gradient_equals_the_oracles",
    ),
    "a_token_more": ({}, "counts_are_those_of_the_completions"),
    "a_token_less": ({}, "counts_are_those_of_the_completions"),
    "last_token_out_of_the_loss": ({}, "gradient_equals_the_oracles"),
    "top_p_ignored": ({"top_p": 0.7}, "rollouts_are_the_current_policys"),
    "no_shuffle": ({}, "every_problem_has_its_turn"),
    "same_prompts_each_step": ({}, "every_problem_has_its_turn"),
    "seed_constant": ({}, "every_draw_has_its_own_random_numbers"),
    "lr_schedule_ignored": ({}, "every_update_is_adamws"),
    "lr_linear_always": (CONSTANT, "every_update_is_adamws"),
    "logged_lr_wrong": ({}, "rates_logged_are_the_schedules"),
    "no_grad_clip": (TUNED, "gradients_are_clipped_as_asked"),
    "adam_second_step_reset": ({}, "every_update_is_adamws"),
    "sgd_after_1": ({}, "every_update_is_adamws"),
    "skip_every_second_step": ({}, "every_update_is_adamws"),
    "double_update": ({}, "every_update_is_adamws"),
    "weight_decay_dropped": (TUNED, "every_update_is_adamws"),
    "weights_averaged_between_steps": ({}, "only_updates_move_the_weights"),
    "bf16_weights_saved": ({}, "what_is_saved_is_what_was_trained"),
    "advantages_clamped": (
        {"rewards": made.reward_of_twenty, "scale_rewards": "none"},
        "advantages_are_group_relative",
    ),
    "mask_cut_after_32": (LONG, "the_mask_is_the_completions"),
    "loss_cut_after_32": (LONG, "gradient_equals_the_oracles"),
    "second_end_ignored": ({"second_end": True}, "counts_are_those_of_the_completions"),
    "template_not_saved": ({}, "the_checkpoint_is_whole"),
    "generation_config_not_saved": ({}, "the_checkpoint_is_whole"),
}
"""For each patch the settings that it acts on, and the invariant that names it."""


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "OwnTrainer"])
@pytest.mark.parametrize("patch", CAUGHT)
def test_patch_is_caught(patch, trainer, tmp_path, monkeypatch):
    settings, invariant = CAUGHT[patch]
    watch(made.build(tmp_path / "whole", getattr(made, trainer), **settings)).holds()
    getattr(patches, patch)(monkeypatch)
    run = watch(made.build(tmp_path / "broken", getattr(made, trainer), **settings))
    with pytest.raises(AssertionError, match=f"\n{invariant}: ") as broken:
        run.holds()
    assert "it cannot be checked" not in str(broken.value)


SAME, OTHER = "the_same_seed_gives_the_same_rows", "another_seed_gives_another_run"


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "OwnTrainer"])
@pytest.mark.parametrize(
    ("patch", "invariant", "change"),
    [("seed_ignored", SAME, {}), ("seed_does_not_reach_the_sampler", OTHER, {"seed": 43})],
)
def test_patch_is_caught_by_a_second_run(patch, invariant, change, trainer, tmp_path, monkeypatch):
    def pair(folder):
        return (
            watch(made.build(tmp_path / folder / name, getattr(made, trainer), **settings))
            for name, settings in (("one", {}), ("two", change))
        )

    run, other = pair("whole")
    run.holds(invariant, beside=other)
    getattr(patches, patch)(monkeypatch)
    run, other = pair("broken")
    with pytest.raises(AssertionError, match=f"\n{invariant}: "):
        run.holds(invariant, beside=other)


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "OwnTrainer"])
@pytest.mark.parametrize("patch", ["resume_loses_optimizer", "resume_loses_rng"])
def test_patch_is_caught_by_a_resumed_run(patch, trainer, tmp_path, monkeypatch):
    def resumed(folder):
        kind = getattr(made, trainer)
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        made.build(tmp_path / folder / "one", kind, **saving, logging_steps=1).train()
        again = made.build(tmp_path / folder / "two", kind, **saving)
        run = watch(again, resume=tmp_path / folder / "one" / "checkpoint-2")
        other = watch(made.build(tmp_path / folder / "three", kind, **saving))
        run.holds("resumed_equals_uninterrupted", beside=other)

    resumed("whole")
    getattr(patches, patch)(monkeypatch)
    with pytest.raises(AssertionError, match="\nresumed_equals_uninterrupted: "):
        resumed("broken")


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "OwnTrainer"])
@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ("nan_to_num_on_the_loss", "NaN is filtered"),
        ("nan_filtered_out_of_the_step", "NaN is filtered"),
        # The patch sets what a user may have set: it is named, and does not pass.
        ("nan_filter_forced", "a_nan_is_seen is not looked at: logging_nan_inf_filter"),
    ],
)
def test_patch_is_caught_by_a_nan(patch, says, trainer, tmp_path, monkeypatch):
    def planted(folder):
        kind, settings = getattr(made, trainer), {"logging_nan_inf_filter": False}
        run = watch(made.build(tmp_path / folder, kind, **settings), nan_at=2)
        run.holds("a_nan_is_seen")

    planted("whole")
    getattr(patches, patch)(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        planted("broken")


def test_every_patch_is_here():
    """The patches of the product's own code are not: no trainer of a team's own has it."""
    table = runpy.run_path(str(HERE / "test_contract.py"))["CAUGHT"]
    apart = {
        *("seed_ignored", "seed_does_not_reach_the_sampler"),
        *("resume_loses_optimizer", "resume_loses_rng"),
        *("nan_to_num_on_the_loss", "nan_filtered_out_of_the_step", "nan_filter_forced"),
    }
    assert table.keys() - CAUGHT.keys() - apart == {"beginning_twice", "problems_not_listed"}
