"""Does the trainer compute GRPO exactly, and does it still learn? On a small policy.

With the setting ``recipe`` it is the project's recipes that are asked, a few steps of each, by its
own values. Without it these are runs and recipes of the product:

The contract: tiny runs of the product are watched from outside, and every step is compared with the
formulas in plain torch (`grpo_harness.grpo`) on the raw completions. `CONTRACT` lists the
invariants of `grpo_harness.contract`, each of which names the regressions that it finds.

The learning test: short runs from nano-base are judged by what they gain, never by their loss. The
controls are runs that can learn nothing, or the wrong thing: each must fail the same test, or its
PASS would mean nothing. `grpo_harness/nano/LEARNING.md` shows how often each passes and fails.
"""

import functools
import hashlib
import inspect
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

built_in = pytest.mark.usefixtures("built_in_recipes")

EVERY = [
    "plain",
    "cool",
    "accumulated",
    "anchored",
    "clipped",
    "halves",
    "tuned",
    "masked",
    "unscored",
    "unscaled",
    "batch-scaled",
    "grpo",
    "bnpo",
    "dr-grpo",
    "long",
    "large",
    "two-ended",
]
"""The runs in which every figure is checked; `grpo_harness.contract` has their settings."""

CONTRACT = {
    "settings_are_the_recipes": EVERY,
    "rows_are_complete_and_finite": EVERY,
    "training_starts_from_the_base": EVERY,
    "every_problem_has_its_turn": EVERY,
    "prompts_are_the_templates": EVERY,
    "what_is_drawn_is_scored_and_trained_on": EVERY,
    "rollouts_are_the_current_policys": EVERY,
    "every_draw_has_its_own_random_numbers": EVERY,
    "rewards_are_the_completions": EVERY,
    "advantages_are_group_relative": EVERY,
    "counts_are_those_of_the_completions": EVERY,
    "the_mask_is_the_completions": EVERY,
    "log_probabilities_are_the_policys": EVERY,
    "loss_equals_the_oracles": EVERY,
    "gradient_equals_the_oracles": EVERY,
    "figures_of_the_policy_are_the_oracles": EVERY,
    "on_policy_the_ratio_is_one": [name for name in EVERY if name not in {"clipped", "halves"}],
    "gradients_are_clipped_as_asked": EVERY,
    "every_update_is_adamws": EVERY,
    "only_updates_move_the_weights": EVERY,
    "rates_logged_are_the_schedules": EVERY,
    "what_is_saved_is_what_was_trained": EVERY,
    "the_checkpoint_is_whole": ["plain", "two-ended"],
    "clipping_acts_off_policy": ["clipped"],
    "accumulation_changes_nothing": ["accumulated plain"],
    "constant_reward_changes_nothing": ["constant"],
    "negated_reward_negates_the_gradient": ["negated plain"],
    "the_same_seed_gives_the_same_rows": ["plain again"],
    "another_seed_gives_another_run": ["plain reseeded"],
    "resumed_equals_uninterrupted": ["resumed tuned"],
    "weights_move": ["plain"],
    "a_nan_is_seen": ["poisoned"],
}
"""The runs on which each invariant is checked; two names are two runs that are compared."""


@pytest.fixture(scope="module")
def contract():
    """The contract package: imported late, because collecting must not load torch."""
    import grpo_harness.contract

    return grpo_harness.contract


@pytest.fixture(scope="module")
def oracles(contract):
    """A function that returns the oracle for a start policy, by its name."""
    return functools.cache(contract.Oracle.of_policy)


@pytest.fixture(scope="module")
def watched(contract, tmp_path_factory):
    """A function that returns a run of the contract by its name; each is made once."""
    seen = {}

    def watched(name):
        if name not in seen:
            seen[name] = contract.observe(contract.RUNS[name], tmp_path_factory.mktemp(name))
        return seen[name]

    return watched


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # TRL asks so
def test_recipe(grpo_recipe, small_policy, grpo_session, tmp_path):
    """A few steps of the recipe, from a small policy, compute what GRPO says, by its own values."""
    from grpo_harness.contract import watch
    from grpo_harness.plugin.state import clearly
    from grpo_harness.training.run import build

    small, device = grpo_recipe.small(small_policy), grpo_session.settings.device
    # Before the trainer is there: another config would reset what accelerate keeps for it.
    without = clearly(lambda: grpo_recipe.smoke_without(device=device))
    run = watch(clearly(lambda: build(small, tmp_path / "run", device=device)))
    run.not_looked_at |= without
    run.holds()


@built_in
@pytest.mark.parametrize(
    ("invariant", "names"),
    [
        pytest.param(invariant, names.split(), id=f"{invariant}-{names.replace(' ', '-')}")
        for invariant, runs in CONTRACT.items()
        for names in runs
    ],
)
def test_contract(invariant, names, contract, watched, oracles):
    """Every invariant holds on its runs."""
    check = contract.INVARIANTS[invariant]
    seen = [watched(name) for name in names]
    if "oracle" in inspect.signature(check).parameters:
        seen.append(oracles(seen[0].recipe.policy))
    try:
        check(*seen)
    except contract.BrokenInvariantError as broken:
        pytest.fail(str(broken), pytrace=False)


@built_in
def test_training_set():
    """The training set has all task types, and no problem that an evaluation asks."""
    from grpo_harness.tasks import MATH, PROGRAMMING, make_problems, task_types

    trained = make_problems(200, 1000, seed=11)
    counts = Counter(problem.type for problem in trained)
    assert counts[MATH] == 200, f"{counts[MATH]} of 200 problems are of the type {MATH}"
    for name in PROGRAMMING:  # of 1000, each is drawn with chance 1/5: 200 ± 6 standard deviations
        assert 124 <= counts[name] <= 276, f"of 1000 programming problems {counts[name]} are {name}"
    assert counts.total() == 1200
    prompts = {problem.prompt for problem in trained}
    asked = {p.prompt for name in (MATH, *PROGRAMMING) for p in task_types()[name].problems(256)}
    assert not prompts & asked, f"{len(prompts & asked)} problems are both trained on and evaluated"
    assert len({tuple(p.id for p in make_problems(9, 9, seed)) for seed in range(4)}) == 4, (
        "the seed does not decide which problems are drawn"
    )


@built_in
def test_controls(watched, oracles):
    """The runs are not trivial: rewards differ, a row is truncated, and the policy changes."""
    oracle = oracles("nano-base")
    plain = watched("plain")
    for step in plain.steps:
        cut = [oracle.truncated(ids) for ids in step.batch.completion_ids]
        assert 0 < sum(cut) < len(cut), f"step {step.number}: {sum(cut)} of {len(cut)} are cut off"
        assert len(set(step.batch.rewards)) > 1, f"step {step.number}: all rewards are equal"
    last = plain.steps[-1]
    redrawn = [same for row in oracle.redraw(oracle.base, last.batch, 1.0) for same in row]
    assert sum(redrawn) < 0.95 * len(redrawn), "the base would draw the last completions too"
    dr_grpo = watched("dr-grpo")
    longest = max(len(ids) for step in dr_grpo.steps for ids in step.batch.completion_ids)
    assert longest < dr_grpo.config.max_completion_length, "dr_grpo's limit is a length drawn"
    lengths = [len(ids) for ids in watched("long").steps[0].batch.completion_ids]
    assert max(n for n in lengths if n < 96) > 64, f"no row of {lengths} ends beyond 64 tokens"
    largest = max(
        float(micro_batch.advantages.abs().max())
        for micro_batch in watched("large").steps[0].micro_batches
    )
    assert largest > 10, f"no advantage is larger than {largest}"
    two_ended = watched("two-ended")
    ends = Counter(ids[-1] for ids in two_ended.steps[0].batch.completion_ids)
    assert len(ends.keys() & oracles(two_ended.recipe.policy).ends) == 2, ends
    assert watched("anchored").rows[-1]["kl"] > 1e-3, "the KL term is too small to be seen"
    tuned = watched("tuned")
    for row, step in zip(tuned.rows, tuned.steps, strict=True):
        most = tuned.config.max_grad_norm
        assert row["grad_norm"] > 2 * most, f"step {step.number}: clipping hardly acts"
        redrawn = [s for row in oracle.redraw(step.weights, step.batch, 1.0) for s in row]
        assert sum(redrawn) < 0.95 * len(redrawn), f"step {step.number}: top_p hardly acts"


@built_in
def test_reward_that_raises_ends_the_run(tmp_path):
    """An error in the reward ends the run; it is never a score (verl#5635)."""
    from grpo_harness.training import TrainingError, load, train

    def broken(**_):
        raise ZeroDivisionError("in the reward")

    with pytest.raises(TrainingError, match="in the reward"):
        train(load("smoke"), tmp_path / "out", reward=broken)
    assert not (tmp_path / "out").exists()


READ_AGAIN = """
import json, sys, torch
from grpo_harness.engines.weights import device_of, load_weights
from grpo_harness.policy import load
device = device_of(sys.argv[2])
model = load_weights(load(sys.argv[1]), device, torch.float32)
with torch.inference_mode():
    logits = model(torch.arange(1, 33, device=device)[None]).logits
print(json.dumps(logits.flatten().tolist()))
"""


@built_in
def test_checkpoint_reloads(watched):
    """A new process gets the same logits from the checkpoint as from the model in memory."""
    import torch

    run = watched("plain").run
    device = run.model.device
    command = [sys.executable, "-c", READ_AGAIN, str(run.path), str(device)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with torch.inference_mode():
        logits = run.model(torch.arange(1, 33, device=device)[None]).logits
    again = torch.tensor(json.loads(printed), device=device).view_as(logits)
    torch.testing.assert_close(again, logits)


@pytest.fixture(scope="module", autouse=True)
def base_files():
    """The digests of the base policy's files before anything was trained, by name."""
    return _digests()


@built_in
def test_base_is_unchanged(base_files, watched):
    """Training leaves the files of the base policy as they are."""
    watched("plain")
    assert _digests() == base_files


def _digests():
    from grpo_harness.policy import PolicyName, find

    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(find(PolicyName("nano-base")).path.iterdir())
    }


NEXT = (
    "See first whether the contract above holds (-k 'not learns and not control_fails'), then the "
    "curves of one run: grpo-harness train learn --out /tmp/learn"
)


@pytest.fixture(scope="module")
def judge():
    """Run all trials, two at a time; a test waits only for those that it judges."""
    from grpo_harness.learning.laboratory import laboratory

    with laboratory() as trials:
        yield trials.judge


@pytest.fixture(scope="module", autouse=True)
def started_ahead(request):
    """Start the trials with the first test, so that they run beside the contract."""
    if any("judge" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("judge")


@built_in
def test_grpo_learns(judge):
    """The reward and held-out accuracy rise, and every figure stays in bounds."""
    learning = judge("learn")
    assert learning.verdict == "PASS", f"GRPO does not learn. {learning.reason}. {NEXT}"


@built_in
@pytest.mark.parametrize(
    ("control", "criteria"),
    [
        ("rate zero", {"gain", "accuracy"}),
        ("shuffled", {"gain", "accuracy"}),
        ("constant", {"gain", "accuracy", "grad_norm"}),
        ("negated", {"gain", "accuracy"}),
    ],
)
def test_control_fails(judge, control, criteria):
    """A run that cannot learn fails the learning test, by the expected criteria."""
    learning = judge(control)
    missing = criteria - learning.broken.keys()
    assert not missing, (
        f"the control {control!r} should break {sorted(criteria)}, and {sorted(missing)} hold "
        f"({learning.verdict}: {learning.reason}): the learning test no longer tells learning from "
        "chance. Compare with harness/grpo_harness/nano/LEARNING.md"
    )


@built_in
def test_collapse_is_no_learning(judge):
    """A reward that rises because completions become empty is a failure, whatever the gain."""
    from grpo_harness.learning.judge import Limits

    learning = judge("collapse", replace(Limits(), gain=0.0))
    assert learning.lower > 0.0, f"this collapse earned nothing: {learning.reason}"
    missing = {"accuracy", "length"} - learning.broken.keys()
    assert not missing, (
        f"the reward rose by {learning.gain.estimate.mean:.3f} while answers shrank to "
        f"{learning.length:.2f} of their length, held-out accuracy went from "
        f"{learning.accuracy.then:.1%} to {learning.accuracy.now:.1%}, and {sorted(missing)} "
        "does not object"
    )
