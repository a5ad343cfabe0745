"""Is each policy still as accurate as its baseline?"""

import pytest


@pytest.mark.grpo("accuracy")
def test_accuracy(evaluation, baseline, gate):
    """The share of correct completions has not dropped."""
    gate.accuracy(evaluation, baseline)
