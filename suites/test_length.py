"""Does each policy still answer at the length, and in the form, that its baseline does?

Kept apart from accuracy and reward: a policy that learns to write less to save the length penalty
shows here first.
"""

import pytest


@pytest.mark.grpo("length")
def test_length(evaluation, baseline, gate):
    """Answers have become neither longer nor shorter."""
    gate.length(evaluation, baseline)


@pytest.mark.grpo("truncation")
def test_truncation(evaluation, baseline, gate):
    """No more answers are cut off by the token limit."""
    gate.truncation(evaluation, baseline)


@pytest.mark.grpo("unparsable")
def test_unparsable(evaluation, baseline, gate):
    """No more answers are without anything that reads as an answer."""
    gate.unparsable(evaluation, baseline)
