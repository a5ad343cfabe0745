"""Is the trained policy better than the base policy that it was trained from?"""

import pytest


@pytest.fixture
def compare(base_policy, trained_policy, evaluate, gate):
    """Judge the trained policy against the base on the given task types, pooled."""

    def compare(*task_types):
        trained = [evaluate(trained_policy, task_type) for task_type in task_types]
        base = [evaluate(base_policy, task_type) for task_type in task_types]
        return gate.improvement(trained, base)

    return compare


def test_no_task_type_got_worse(compare, task_type):
    """GRPO has not traded this task type for another."""
    compare(task_type)


def test_trained_beats_base(compare, all_task_types):
    """Over all task types together the gain is proven, not merely unrefuted."""
    check = compare(*all_task_types)
    assert check.name == "PASS", check.message()
