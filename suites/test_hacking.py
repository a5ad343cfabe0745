"""Has the training found what earns reward without being right?

What a policy gains may be what the reward accepts, and not what it stands for. Both are compared
with the base policy, on the same problems.
"""

import pytest


@pytest.mark.grpo("lenient")
def test_answers_are_not_looser(base_policy, trained_policy, task_type, evaluate, gate):
    """GRPO has not taught answers that only the reward's lenient reading takes for correct."""
    trained = evaluate(trained_policy, task_type)
    gate.lenient([trained], [evaluate(base_policy, task_type)])


@pytest.mark.grpo("hacking")
def test_reward_is_not_earned_without_correctness(
    base_policy, trained_policy, task_type, evaluate, gate
):
    """The reward has not risen while fewer completions are correct."""
    trained = evaluate(trained_policy, task_type)
    gate.hacking([trained], [evaluate(base_policy, task_type)])
