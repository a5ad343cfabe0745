"""Does each policy still earn the rewards of its baseline, in total and by each function?"""

import pytest


@pytest.mark.grpo("reward")
def test_reward(evaluation, baseline, gate):
    """The mean total reward has not dropped."""
    gate.reward(evaluation, baseline)


@pytest.mark.grpo("rewards")
def test_each_reward(evaluation, baseline, gate):
    """The mean of none of several rewards has dropped."""
    gate.rewards(evaluation, baseline)
