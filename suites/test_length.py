"""Do the completions of each policy still have the length and form of its baseline?

Separate from accuracy and reward: a policy that learns to write less to save the length penalty
shows here first.
"""

import pytest


@pytest.mark.grpo("length")
def test_length(evaluation, baseline, gate):
    """Completions have become neither longer nor shorter."""
    gate.length(evaluation, baseline)


@pytest.mark.grpo("truncation")
def test_truncation(evaluation, baseline, gate):
    """The share of completions that the token limit cuts off has not risen."""
    gate.truncation(evaluation, baseline)


@pytest.mark.grpo("unparsable")
def test_unparsable(evaluation, baseline, gate):
    """The share of completions without a readable answer has not risen."""
    gate.unparsable(evaluation, baseline)
