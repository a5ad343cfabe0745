"""Any trainer under the contract: what holds of a team's own, and what is said when it does not."""

import functools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_harness.contract import INVARIANTS, watch
from grpo_harness.contract.watched import OF_ONE_RUN

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("trainers.py"))))

# A user's own configuration decides what is an error; these are of TRL and transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using '(rollout|environment)_f.*:UserWarning"),
]

SEVERAL = [made.reward_digits, made.reward_answer, made.reward_length]
SHORT = {"gradient_accumulation_steps": 4, "num_generations": 2, "max_completion_length": 2}
FIRST = {"num_iterations": 2, "max_steps": 4, "learning_rate": 5e-3}


def lora(**fields):
    modules = ["q_proj", "v_proj", "up_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=modules, **fields)


WHOLE = {
    "as documented": {},
    "subclass": {"trainer": made.OwnTrainer},
    "conversations": {"conversations": True},
    "several rewards": {
        "rewards": SEVERAL,
        "reward_weights": [0.3, 1.0, 0.5],
        "conversations": True,
        "log_completions": True,
        "num_completions_to_print": 0,
    },
    "rewards of None": {"rewards": made.reward_length},
    "rewards of one name": {
        "rewards": [made.reward_digits, made.reward_short],
        "log_completions": True,
        "num_completions_to_print": 0,
    },
    "a reward that changes its arguments": {"rewards": made.reward_in_place},
    "stopped": {"trainer": made.Stopped},
    "advantages of tokens": {"trainer": made.OfTokens},
    "one prompt": {"trainer": made.OnePrompt, "loss_type": "bnpo", **SHORT},
    "async": {"rewards": [functools.partial(made.reward_later), made.reward_answer]},
    "lora": {"peft": lora()},
    "lora and beta": {"peft": lora(), "beta": 0.1},
    "beta": {"beta": 0.2},
    **{
        name: {"loss_type": name, "gradient_accumulation_steps": 2}
        for name in ("grpo", "bnpo", "dr_grpo", "dapo")
    },
    "batch-scaled": {"scale_rewards": "batch"},
    "unscaled": {"scale_rewards": "none"},
    "sampling": {"temperature": 0.8, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
    "update": {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_grad_norm": 0.1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
    },
    "masked": {"mask_truncated_completions": True},
    "dora": {"peft": lora(use_dora=True)},
    "whole modules": {"peft": lora(modules_to_save=["norm"])},
    "trained adapter": {"trainer": made.Adapted, "beta": 0.1, "learning_rate": 5e-3},
    "padded by the end": {"trainer": made.PaddedByTheEnd, "conversations": True},
    "padded to eight": {
        "trainer": made.PaddedByTheEnd,
        "pad_to_multiple_of": 8,
        "conversations": True,
        "gradient_accumulation_steps": 2,
    },
    "padding that is drawn": {"trainer": made.PaddedByAnAnswer, "max_completion_length": 3},
    "padding that is drawn, masked": {
        "trainer": made.PaddedByAnAnswer,
        "max_completion_length": 3,
        "mask_truncated_completions": True,
    },
    "evaluated": {
        "trainer": made.Evaluated,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 4,
    },
    "epochs": {"max_steps": -1, "num_train_epochs": 0.2, "num_generations": 2},
}
"""Trainers of which everything is looked at."""

REUSED = {
    "iterations": {**FIRST, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "beta": 0.05},
    "no correction": {**FIRST, "beta": 0.2, "use_bias_correction_kl": False},
    "window": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "one prompt": {"trainer": made.OnePrompt, **SHORT, "gradient_accumulation_steps": 1}
    | {"steps_per_generation": 4, "max_steps": 4},
}
"""Trainers whose completions are used in several steps."""

LEFT_OUT = {
    "optimizer sgd": {"optim": "sgd"},
    "schedule polynomial": {"lr_scheduler_type": "polynomial"},
    "loss_type cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "importance_sampling_level sequence": {"importance_sampling_level": "sequence"},
    "multi_objective_aggregation normalize_then_sum": {
        "multi_objective_aggregation": "normalize_then_sum"
    },
    "entropy_coef": {"entropy_coef": 0.01},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "a data set that is streamed": {"trainer": made.Streamed},
    "log-probabilities that the model's forward does not return: the trainer computes them by "
    "itself": {"trainer": made.OwnLogps, "temperature": 0.7},
    "an optimizer or a schedule of your own": {"trainer": made.OwnOptimizer},
    "reward models": {"trainer": made.Judged},
    "a rollout function": {"trainer": made.Rolled},
    "dropout": {"peft": lora(lora_dropout=0.2)},
    "half precision": {"bf16": True},
    "generation batches that do not divide into whole steps": {
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
    },
}
"""Settings that there is no formula for."""


@pytest.mark.parametrize("name", WHOLE)
def test_every_invariant_holds(name, tmp_path):
    run = watch(made.build(tmp_path, **WHOLE[name]))
    run.holds()
    assert run.not_looked_at == {}


@pytest.mark.parametrize("name", REUSED)
def test_completions_that_are_used_again(name, tmp_path):
    run = watch(made.build(tmp_path, **REUSED[name]))
    run.holds()
    assert run.not_looked_at == {"on_policy_the_ratio_is_one": "completions that several steps use"}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_has_no_formula_is_named(what, tmp_path):
    run = watch(made.build(tmp_path, **LEFT_OUT[what]))
    run.holds()
    assert set(run.not_looked_at.values()) == {what}
    assert f"- {what} (" in run.report()
    name = next(iter(run.not_looked_at))
    with pytest.raises(AssertionError, match=f"{name} is not looked at: {what}"):
        run.holds(name)


def test_an_environment_is_named(tmp_path):
    short = {"per_device_train_batch_size": 4, "max_steps": 1}
    run = watch(made.build(tmp_path, made.InAnEnvironment, conversations=True, **short))
    run.holds()
    reasons = {"tools", "environments", "a response template"}
    assert set(", ".join(run.not_looked_at.values()).split(", ")) == reasons
    assert "every_problem_has_its_turn" in run.not_looked_at


def test_all_that_broke_is_one_report(tmp_path):
    run = watch(made.build(tmp_path, made.LengthTerm, optim="sgd"))
    with pytest.raises(AssertionError) as broken:
        run.holds()
    text = str(broken.value)
    assert text.startswith("LengthTerm: 2 of 22 invariants differ\n")
    assert "\nloss_equals_the_oracles: " in text
    assert "times the right one" in text
    assert "\ngradient_equals_the_oracles: " in text
    assert "- optimizer sgd (every_update_is_adamws)" in text


def test_but_is_strict(tmp_path):
    run = watch(made.build(tmp_path, made.LengthTerm))
    names = ("loss_equals_the_oracles", "gradient_equals_the_oracles")
    run.holds(but=dict.fromkeys(names, "we add a length term"))
    run.holds("the_mask_is_the_completions")
    with pytest.raises(AssertionError, match="1 of 22 invariants differ\n\ngradient_equals_the_o"):
        run.holds(but={"loss_equals_the_oracles": "we add a length term"})
    more = dict.fromkeys((*names, "the_mask_is_the_completions"), "ours")
    with pytest.raises(
        AssertionError, match=r"the_mask_is_the_completions holds now: remove it from but \(ours\)"
    ):
        run.holds(but=more)


def test_names_are_checked(tmp_path):
    run = watch(made.build(tmp_path))
    with pytest.raises(ValueError, match="'loss_equals_the_oracle': the nearest is 'loss_equals_"):
        run.holds("loss_equals_the_oracle")
    with pytest.raises(ValueError, match="accumulation_changes_nothing compares two runs: give"):
        run.holds(but={"accumulation_changes_nothing": ""})
    with pytest.raises(ValueError, match="a_nan_is_seen needs a NaN: plant it with watch"):
        run.holds("a_nan_is_seen")
    with pytest.raises(ValueError, match="clipping_acts_off_policy is of the recipes' runs"):
        run.holds("clipping_acts_off_policy")
    assert run.trainer.state.global_step == 0


def test_only_a_new_trainer_is_watched(tmp_path):
    with pytest.raises(TypeError, match="a GRPOTrainer, or one of a subclass, not 'nano'"):
        watch("nano")
    trainer = made.build(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="has already trained 1 steps"):
        watch(trainer)
    with pytest.raises(ValueError, match="has 36 prompts, and a batch of completions asks 50: no"):
        watch(made.build(tmp_path, per_device_train_batch_size=200))


def test_advantages_that_differ_within_a_completion_are_named(tmp_path):
    run = watch(made.build(tmp_path, made.OfLaterTokens, max_steps=1))
    with pytest.raises(AssertionError, match="the advantage used is nan, and"):
        run.holds("advantages_are_group_relative")


def test_a_reward_of_infinity_is_named(tmp_path):
    def rewards(completions, **kwargs):
        return [math.inf, *made.reward_digits(completions[1:])]

    run = watch(made.build(tmp_path, rewards=rewards, max_steps=1))
    with pytest.raises(AssertionError, match=r"step 1, completion 0 \(group 0\) scored inf by rew"):
        run.holds("rewards_are_the_completions")


def test_a_crash_is_made_once_and_named_once(tmp_path):
    calls = []

    def broken(completions, **kwargs):
        calls.append(1)
        raise ZeroDivisionError("in the reward")

    run = watch(made.build(tmp_path, rewards=broken))
    with pytest.raises(AssertionError, match="crashed in step 1: ZeroDivisionError: in the rew"):
        run.holds()
    with pytest.raises(AssertionError, match="as the first check says"):
        run.holds("loss_equals_the_oracles")
    assert calls == [1]


def test_the_trainer_is_left_as_it_was(tmp_path):
    trainer = made.build(tmp_path, logging_steps=7)
    rewards = trainer.reward_funcs
    watch(trainer).holds()
    assert trainer.reward_funcs is rewards
    assert (trainer.args.logging_strategy, trainer.args.logging_steps) == ("steps", 7)
    assert "generate" not in vars(trainer.model)
    assert isinstance(trainer.compute_loss.__self__, GRPOTrainer)


def test_a_reward_that_changes_its_mind_is_named(tmp_path):
    scores = iter(range(10_000))

    def judge(completions, **kwargs):
        return [float(next(scores) % 7) for _ in completions]

    run = watch(made.build(tmp_path, rewards=judge))
    run.holds()
    assert list(run.not_looked_at) == ["rewards_are_the_completions"]
    assert "judge, which scores the same text differently" in run.report()


def test_completions_that_are_all_alike_are_rounding(tmp_path):
    """The advantages cancel each other out, and what is left of the gradient is rounding."""

    def reward_place(completions, **kwargs):
        return [100 * float(i % 7) for i in range(len(completions))]

    alike = {"top_k": 1, "scale_rewards": "none"}
    run = watch(made.build(tmp_path, rewards=reward_place, **alike))
    run.holds()
    step = run._seen[0].steps[0]
    assert len(set(step.batch.completion_ids[:4])) == 1 < len(set(step.batch.rewards[:4]))


@pytest.mark.parametrize("reward", [0.7, -12345.6])
def test_equal_rewards_are_no_alarm(tmp_path, reward):
    """TRL divides the rounding of their mean by 1e-4."""

    def alike(completions, **kwargs):
        return [reward] * len(completions)

    watch(made.build(tmp_path, rewards=alike, num_generations=8, reward_weights=[0.3])).holds()


def test_the_invariants_of_one_run_are_known():
    assert set(OF_ONE_RUN) <= INVARIANTS.keys()


SUITE = """
import sys

import pytest

sys.path.append({tests!r})
from trainers import build

from grpo_harness.contract import watch


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ours(tmp_path):
    run = watch(build(tmp_path, max_steps=1, optim="sgd"))
    run.holds()
    run.holds("the_mask_is_the_completions")


def test_another():
    pass
"""


def test_a_green_test_says_what_was_not_looked_at(pytester):
    pytester.makepyfile(SUITE.format(tests=str(Path(__file__).parent)))
    result = pytester.runpytest_inprocess("--junitxml=out.xml", "-p", "no:benchmark")
    result.assert_outcomes(passed=2)
    line = "test_ours: optimizer sgd (every_update_is_adamws)"
    assert sum(line in text for text in result.outlines) == 1
    assert 'value="optimizer sgd (every_update_is_adamws)"' in (
        pytester.path / "out.xml"
    ).read_text("utf-8")


def test_rewards_that_do_not_differ_are_named(tmp_path):
    """Advantages of 0 are right whatever a trainer makes of rewards, and tell nothing."""

    def reward_none_of_them(completions, **kwargs):
        return [0.0] * len(completions)

    run = watch(made.build(tmp_path / "one", rewards=reward_none_of_them))
    run.holds()
    assert list(run.not_looked_at) == ["advantages_are_group_relative"]
    assert "rewards that are the same within every group" in run.report()
    with pytest.raises(AssertionError, match="advantages_are_group_relative is not looked at"):
        run.holds("advantages_are_group_relative")

    both = [made.reward_digits, reward_none_of_them]
    run = watch(made.build(tmp_path / "two", rewards=both, reward_weights=[1.0, 0.5]))
    run.holds()
    assert "every group: reward_none_of_them (reward_weights)" in run.report()
    run.holds("advantages_are_group_relative")
