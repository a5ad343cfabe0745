"""Does GRPO still train? A few real steps of TRL's GRPOTrainer on the smallest policy."""

import math

import pytest

from harness.recipes import RECIPES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train by the smoke recipe, once for all the questions below."""
    from harness.training import train

    return train(RECIPES["smoke"], tmp_path_factory.mktemp("smoke") / "trained")


def test_every_step_is_finite(run):
    """Loss, gradient and reward of every step are numbers."""
    assert len(run.log) == RECIPES["smoke"].steps
    for row in run.log:
        for name in ("loss", "grad_norm", "reward"):
            assert math.isfinite(row[name]), f"step {row['step']}: {name} is {row[name]}"


def test_weights_move(run):
    """At least half the elements of every trainable tensor have changed."""
    assert run.weights_moved >= 0.5, (
        f"in one tensor only {run.weights_moved:.1%} of the elements changed: the learning rate "
        "is lost in the weights' precision, or their gradient is"
    )


def test_checkpoint_reloads(run):
    """What is on disk answers like what was in memory."""
    import torch

    from harness.policy import load

    policy = load(str(run.path), device=str(run.model.device), dtype="float32")
    ids = torch.arange(1, 33, device=policy.device)[None]
    with torch.inference_mode():
        torch.testing.assert_close(policy.model(ids).logits, run.model(ids).logits)
