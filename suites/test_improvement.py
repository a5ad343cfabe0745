"""Is the trained policy better than the base policy that it was trained from?"""

import pytest


@pytest.mark.grpo("no_loss")
def test_no_task_type_got_worse(base_policy, trained_policy, task_type, evaluate, gate):
    """GRPO has not made the policy worse on this task type."""
    trained = evaluate(trained_policy, task_type)
    gate.no_loss([trained], [evaluate(base_policy, task_type)])


@pytest.mark.grpo("improvement")
def test_trained_beats_base(base_policy, trained_policy, all_task_types, evaluate, gate):
    """Over all task types together a gain is proven: UNPROVEN is not enough."""
    check = gate.improvement(
        [evaluate(trained_policy, task_type) for task_type in all_task_types],
        [evaluate(base_policy, task_type) for task_type in all_task_types],
    )
    assert check.verdict == "PASS", check.message()
