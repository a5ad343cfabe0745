"""Does each policy still answer as well as its baseline?"""

import pytest


@pytest.mark.grpo("accuracy")
def test_accuracy(evaluation, baseline, gate):
    """The share of correct answers has not dropped."""
    gate.accuracy(evaluation, baseline)
