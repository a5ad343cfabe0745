"""The engine's suite names what a dependency or an edit does to the draws themselves."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PATCHES = {
    "run_seed_ignored": (
        """
        from grpo_harness import evaluation
        own = evaluation.sample_seed
        evaluation.sample_seed = lambda run, problem, sample: own(0, problem, sample)
        """,
        "test_another_run_draws_others",
        "the run's seed does not reach the draws, or the store gives",
    ),
    "one_store_for_two_runs": (
        """
        from grpo_harness.store import Store
        own = Store.open
        Store.open = lambda self, *name, what: own(self, *name, what={**what, "run_seed": 0})
        """,
        "test_another_run_draws_others",
        "the run's seed does not reach the draws, or the store gives",
    ),
    "one_seed_for_a_problem": (
        """
        from grpo_harness import evaluation
        own = evaluation.sample_seed
        evaluation.sample_seed = lambda run, problem, sample: own(run, problem, 0)
        """,
        "test_the_samples_of_a_problem_differ",
        "samples 0 and 1 have the same outcome in all of 64 problems",
    ),
    "one_seed_for_two_samples": (
        """
        from grpo_harness import evaluation
        own = evaluation.sample_seed
        evaluation.sample_seed = lambda run, problem, sample: own(run, problem, sample % 3)
        """,
        "test_the_samples_of_a_problem_differ",
        "samples 0 and 3 have the same outcome",
    ),
    "seeds_that_collide": (
        """
        from grpo_harness.engines import engine
        own = engine.sample_seed
        engine.sample_seed = lambda run, problem, sample: own(run, problem, sample) % 1000
        """,
        "test_every_sample_has_a_seed_of_its_own",
        "two samples share a seed",
    ),
    "rewards_of_the_next": (
        """
        from grpo_harness.rewards.functions import Rewards
        own = Rewards.score
        def score(*args):
            scores = own(*args)
            return scores[1:] + scores[:1]
        Rewards.score = score
        """,
        "test_rewards_belong_to_their_completions",
        "rewards are given to other completions",
    ),
    "rewards_past_a_batch": (
        """
        from grpo_harness.rewards.functions import Rewards
        own = Rewards.score
        def score(*args):
            scores = own(*args)
            return scores[:128] + scores[:len(scores) - 128]
        Rewards.score = score
        """,
        "test_rewards_belong_to_their_completions",
        "rewards are given to other completions",
    ),
    "positions_of_another_row": (
        """
        from contextlib import contextmanager
        from grpo_harness.engines.shared import SharedCache
        own = SharedCache.drawing
        @contextmanager
        def drawing(self):
            with own(self) as positions:
                yield positions * 0 + positions.max()
        SharedCache.drawing = drawing
        """,
        "test_an_answer_does_not_depend_on_its_batch",
        "an answer depends on its batch",
    ),
    "no_mask": (
        """
        from grpo_harness.engines.shared import _Rows
        own = _Rows.__init__
        def init(self, slots, drawn, seen, *more):
            own(self, slots, drawn, seen | True, *more)
        _Rows.__init__ = init
        """,
        "test_an_answer_does_not_depend_on_its_batch",
        "an answer depends on its batch",
    ),
    "odd_batches_are_shifted": (
        """
        from grpo_harness.engines.transformers import TransformersEngine
        own = TransformersEngine.sample
        def sample(self, requests, progress=None):
            drawn = own(self, requests, progress)
            return drawn[1:] + drawn[:1] if len(requests) % 2 else drawn
        TransformersEngine.sample = sample
        """,
        "test_an_answer_does_not_depend_on_its_batch",
        "seven at a time than alone",
    ),
    "beginning_twice": (
        """
        from grpo_harness.engines.transformers import TransformersEngine
        TransformersEngine.tokens = lambda self, prompts: (
            self.policy.tokenizer(list(prompts))["input_ids"]
        )
        """,
        "test_a_prompt_begins_once_and_any_end_token_ends_it",
        "the model reads another prompt than the chat template wrote",
    ),
    "second_end_ignored": (
        """
        from grpo_harness.policy import policy
        policy._named_ends = lambda checkpoint: []
        """,
        "test_a_prompt_begins_once_and_any_end_token_ends_it",
        "an answer goes on behind '1'",
    ),
}


@pytest.fixture
def project(pytester):
    """A repository of its own that judges the embedded pair by this one's baselines."""
    pytester.makepyprojecttoml(
        f"""
        [tool.grpo-harness]
        tasks = ["palindrome"]
        problems = 64
        device = "cpu"
        baselines = "{ROOT / "baselines"}"
        """
    )
    shutil.copy(ROOT / "suites" / "test_engine.py", pytester.path)
    return pytester


def test_without_a_patch_it_is_green(project):
    result = project.runpytest_subprocess("-p", "no:xdist", "-p", "no:benchmark")
    result.assert_outcomes(passed=11)


@pytest.mark.heavy
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_is_named(project, patch):
    code, test, says = PATCHES[patch]
    project.makepyfile(planted=code)
    # In a process of its own: a patch stays for as long as the process does.
    result = project.runpytest_subprocess(
        *("-p", "planted", "-p", "no:xdist", "-p", "no:benchmark", "-k", test)
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert f"FAILED test_engine.py::{test}" in result.stdout.str()
    assert says in result.stdout.str()


def test_a_worker_with_a_seed_of_its_own_is_named(project):
    pytest.importorskip("xdist")
    project.makeconftest(
        """
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_configure(config):
            if hasattr(config, "workerinput"):
                config.workerinput["grpo-harness"] += 1
        """
    )
    project.makepyfile(test_own="def test_own(evaluation): pass")
    result = project.runpytest_subprocess(
        *("-n", "1", "-p", "no:benchmark", "test_own.py", "--grpo-report", "out")
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "another seed than the run's" in (project.path / "out" / "report.md").read_text()
