"""Faults planted beneath the recorded settings: the gate has nothing to go by but the samples.

Everything is real: the embedded policy, its stored baselines, the engine, and the risk of a false
alarm shared among as many checks as the whole run has.
"""

from pathlib import Path

import pytest
import torch

from grpo_harness.baselines import file as baseline
from grpo_harness.engines.engine import Sampling
from grpo_harness.engines.transformers import TransformersSampler
from grpo_harness.evaluation import evaluate
from grpo_harness.policy.policy import load
from grpo_harness.rules import Rules
from grpo_harness.store import Store
from grpo_harness.tasks import task_types

BASELINES = Path(__file__).parent.parent / "baselines"
RULES = Rules(checks=55)


class Faulty(TransformersSampler):
    """Says that it samples as recorded, and samples as it was told instead."""

    def __init__(self, policy, shift=0, **told):
        super().__init__(policy, Sampling(**told))
        self._shift = shift
        self._recorded = TransformersSampler(policy, Sampling()).settings()

    def settings(self):
        return self._recorded

    def sample(self, requests, progress=None):
        samples = super().sample(requests, progress)
        return samples[self._shift :] + samples[: self._shift]


@pytest.fixture
def policy():
    return load("nano-trained", device="cpu")


@pytest.fixture
def verdicts(policy, tmp_path):
    """Judge one task type, sampled with a fault: question -> verdict."""

    def verdicts(name, run_seed=1, **fault):
        evaluation = evaluate(
            policy,
            Faulty(policy, **fault),
            task_types()[name],
            n=128,
            k=4,
            run_seed=run_seed,
            store=Store(tmp_path),
        )
        stored = baseline.load(baseline.path_of(BASELINES, "nano-trained", name))
        checks = [
            rule(evaluation, stored)
            for rule in (RULES.accuracy, RULES.length, RULES.truncation, RULES.unparsable)
        ]
        return {check.question: check.name for check in checks}

    return verdicts


@pytest.mark.parametrize("name", ["gcd", "palindrome", "reverse"])
def test_without_a_fault_nothing_fails(verdicts, name):
    assert "FAIL" not in verdicts(name).values()
    assert "ERROR" not in verdicts(name).values()


def test_a_higher_temperature(verdicts):
    assert verdicts("reverse", temperature=1.5)["accuracy"] == "FAIL"


def test_a_lower_token_limit(verdicts):
    found = verdicts("sort", max_new_tokens=4)
    assert (found["accuracy"], found["truncation"], found["length"]) == ("FAIL", "FAIL", "FAIL")


@pytest.mark.parametrize("name", ["gcd", "reverse"])
def test_answers_that_belong_to_the_next_problem(verdicts, name):
    assert verdicts(name, shift=4)["accuracy"] == "FAIL"


@pytest.mark.parametrize(("share", "fails"), [(0.03, False), (0.2, True)])
def test_noise_on_the_weights(policy, verdicts, share, fails):
    """Noise of 3 % of a tensor's spread costs this policy nothing; 20 % costs it a fifth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(share * weight.std() * noise)
    assert (verdicts("reverse")["accuracy"] == "FAIL") is fails
