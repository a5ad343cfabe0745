"""Is each policy still as accurate as its baseline?"""

import pytest


@pytest.mark.grpo("accuracy")
def test_accuracy(evaluation, baseline, gate):
    """The share of correct completions has not dropped."""
    gate.accuracy(evaluation, baseline)


@pytest.mark.grpo("slices")
def test_accuracy_of_slices(evaluation, baseline, gate):
    """Where slices are judged, the share of correct completions has dropped on none of them."""
    gate.slices(evaluation, baseline)


@pytest.mark.grpo("total")
def test_accuracy_of_all_tasks(evaluations, baselines, gate):
    """It has not dropped over all tasks together: a small loss everywhere shows only here."""
    gate.total(evaluations, baselines)
