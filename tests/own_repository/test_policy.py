"""Is the policy still as good as its baseline?"""

import pytest


@pytest.mark.grpo("accuracy")
def test_accuracy(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)


@pytest.mark.grpo("length", "truncation", "unparsable")
def test_form(evaluation, baseline, gate):
    gate.length(evaluation, baseline)
    gate.truncation(evaluation, baseline)
    gate.unparsable(evaluation, baseline)


@pytest.mark.grpo("reward")
def test_reward(evaluation, baseline, gate):
    gate.reward(evaluation, baseline)


@pytest.mark.grpo("rewards")
def test_each_reward(evaluation, baseline, gate):
    gate.rewards(evaluation, baseline)


@pytest.mark.grpo("no_loss")
def test_training_does_no_harm(base_policy, trained_policy, task_type, evaluate, gate):
    gate.no_loss([evaluate(trained_policy, task_type)], [evaluate(base_policy, task_type)])
