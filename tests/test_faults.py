"""Faults planted beneath the recorded settings: the gate has nothing to go by but the samples.

Everything is real: the embedded policies, their stored baselines, the engine, and the shares of the
risk of a false alarm that the checks of a whole run have.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_harness.baselines import file as baseline
from grpo_harness.checks import against_baseline
from grpo_harness.engines.engine import Sampling
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.evaluation import Group, ask, evaluate
from grpo_harness.policy import load
from grpo_harness.rules import RULES, Terms, shares
from grpo_harness.store import Store
from grpo_harness.tasks import task_types

BASELINES = Path(__file__).parent.parent / "baselines"
ASKED = ("accuracy", "length", "truncation", "unparsable")
SHARES = shares([*ASKED * 12, *["no_loss"] * 6, "improvement"])


class Faulty(TransformersEngine):
    """Says that it samples as recorded, and samples as it was told instead."""

    def __init__(self, policy, shift=0, noise=0.0, **told):
        super().__init__(policy, Sampling(**told), device="cpu")
        self._shift = shift
        self._recorded = TransformersEngine(policy, Sampling(), device="cpu").settings()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))

    def settings(self):
        return self._recorded

    def sample(self, requests, progress=None):
        samples = super().sample(requests, progress)
        return samples[self._shift :] + samples[: self._shift]


@pytest.fixture
def verdicts(tmp_path):
    """Judge one task type, sampled with a fault: rule -> verdict."""

    def verdicts(name, policy="nano-trained", rescored=lambda group: group, n=128, **fault):
        asked = load(policy)
        engine = Faulty(asked, **fault)
        questions = ask(asked, task_types()[name], n, settings=engine.settings())
        found = evaluate(questions, engine, k=4, run_seed=1, store=Store(tmp_path / "samples.db"))
        found = replace(found, groups=tuple(map(rescored, found.groups)))
        stored = baseline.load(baseline.path_of(BASELINES, policy, name))
        records = stored.select(questions)
        assert stored.same_policy(questions.fingerprint)
        return {
            rule: against_baseline(
                RULES[rule], [found], policy, records, Terms(SHARES[rule], same_policy=True)
            ).verdict
            for rule in ASKED
        }

    return verdicts


@pytest.mark.parametrize("name", ["gcd", "palindrome", "reverse"])
def test_without_a_fault_nothing_fails(verdicts, name):
    assert not {"FAIL", "ERROR"} & set(verdicts(name).values())


def test_a_higher_temperature(verdicts):
    assert verdicts("reverse", temperature=1.5)["accuracy"] == "FAIL"


def test_a_lower_token_limit(verdicts):
    found = verdicts("sort", max_new_tokens=4)
    assert (found["accuracy"], found["truncation"], found["length"]) == ("FAIL", "FAIL", "FAIL")


@pytest.mark.parametrize("name", ["gcd", "reverse"])
def test_answers_that_belong_to_the_next_problem(verdicts, name):
    assert verdicts(name, shift=4)["accuracy"] == "FAIL"


@pytest.mark.parametrize(("noise", "fails"), [(0.03, False), (0.2, True)])
def test_noise_on_the_weights(verdicts, noise, fails):
    """Noise of 3 % of a tensor's spread costs this policy nothing; 20 % costs it a fifth."""
    assert (verdicts("reverse", noise=noise)["accuracy"] == "FAIL") is fails


class TestBetter:
    """What makes the recorded policy better is a fault as much as what makes it worse."""

    def test_greedy_in_place_of_sampling(self, verdicts):
        assert verdicts("reverse", "nano-base", greedy=True)["accuracy"] == "FAIL"

    def test_a_lower_temperature(self, verdicts):
        assert verdicts("reverse", "nano-base", temperature=0.3)["accuracy"] == "FAIL"

    def test_answers_that_were_cut_off_and_count_as_correct(self, verdicts):
        def lenient(group):
            changed = [
                replace(c, outcome="correct") if c.outcome == "truncated" else c
                for c in group.completions
            ]
            return Group(group.problem, tuple(changed))

        found = verdicts("sort", "nano-base", rescored=lenient, n=256)
        assert "FAIL" in (found["accuracy"], found["truncation"])

    def test_wrong_answers_that_left_the_denominator(self, verdicts):
        def dropped(group):
            kept = [c for c in group.completions if c.outcome == "correct"]
            return Group(group.problem, tuple(kept)) if len(kept) > 1 else group

        assert verdicts("reverse", "nano-base", rescored=dropped)["accuracy"] == "FAIL"
