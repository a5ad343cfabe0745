"""The learning verdict, on logs and answers made by hand: no model is trained here."""

import dataclasses
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grpo_harness.evaluation import Tally
from grpo_harness.learning import laboratory as learn
from grpo_harness.learning.judge import Limits, Trial, ends, gain, judge_learning, late
from grpo_harness.learning.laboratory import CONDITIONS, LONG_LISTS, constant, negated, shuffled
from tools.nano.learning_table import BASE, Ledger, make_table

GOOD = {
    "reward": 0.2,
    "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.01,
    "kl": 0.3,
    "entropy": 0.6,
    "grad_norm": 0.8,
}
N = 128


def tallies(correct, k, log_length=2.0):
    return tuple(Tally(k, count, 0, 0, log_length) for count in correct)


BEFORE = tallies([1, 2] * (N // 2), 6)


def trial(seed=0, rise=0.6, log=GOOD, correct=1, log_length=1.9, steps=10):
    """A run of 16 problems whose rewards rise by about ``rise``; a third right of two is 1."""
    luck = Random(seed)
    first = tuple(luck.gauss(-0.4, 0.3) for _ in range(16))
    return Trial(
        seed=seed,
        log=tuple({"step": step, **log} for step in range(1, steps + 1)),
        first=first,
        last=tuple(value + rise + luck.gauss(0, 0.2) for value in first),
        answers=tallies([correct] * N, 2, log_length),
    )


def trials(**changes):
    return [trial(seed, **changes) for seed in range(3)]


def test_a_run_that_learns_passes():
    learning = judge_learning(trials(), BEFORE)
    assert learning.verdict == "PASS"
    assert learning.broken == {}
    assert "the reward rose by 0.6" in learning.reason
    assert "from 25.0% to 50.0%" in learning.reason
    assert learning.length == pytest.approx(math.exp(-0.1))


def test_gain_is_a_paired_t_interval():
    three = trials()
    first = [value for t in three for value in t.first]
    last = [value for t in three for value in t.last]
    oracle = stats.ttest_rel(last, first, alternative="greater")
    learning = judge_learning(three, BEFORE)
    assert learning.gain.estimate.mean == pytest.approx(np.mean(last) - np.mean(first))
    assert learning.lower == pytest.approx(oracle.confidence_interval(0.99).low)
    assert (learning.gain.first, learning.gain.last) == pytest.approx(
        (np.mean(first), np.mean(last))
    )


@given(shift=st.floats(-5, 5), seed=st.integers(0, 99))
def test_gain_ignores_the_level_and_knows_its_sign(shift, seed):
    one = trial(seed)
    moved, turned = (
        dataclasses.replace(one, first=tuple(map(f, one.first)), last=tuple(map(f, one.last)))
        for f in (lambda value: value + shift, lambda value: -value)
    )
    assert gain([moved]).estimate.mean == pytest.approx(gain([one]).estimate.mean)
    assert gain([turned]).estimate.mean == pytest.approx(-gain([one]).estimate.mean)


def test_gain_that_is_likely_but_not_certain_fails():
    """The mean is above the limit and its lower bound is not."""
    one = dataclasses.replace(trial(), first=(0.0,) * 8, last=(1.5, -1.0) * 4)
    learning = judge_learning([one], BEFORE)
    assert learning.gain.estimate.mean > Limits().gain > learning.lower
    assert list(learning.broken) == ["gain"]


def test_one_problem_proves_nothing():
    one = dataclasses.replace(trial(), first=(0.0,), last=(2.0,))
    assert list(judge_learning([one], BEFORE).broken) == ["gain"]


@pytest.mark.parametrize(
    ("changes", "criterion", "words"),
    [
        ({"rise": 0.0}, "gain", "more than +0.100 is asked"),
        ({"rise": -0.6}, "gain", "rose by -0.5"),
        ({"correct": 0}, "accuracy", "25.0% of held-out answers were right before and 0.0%"),
        ({"log_length": 1.0}, "length", "0.37 times as long as before, and 0.50 is the least"),
        ({"log": {**GOOD, "frac_reward_zero_std": 1.0}}, "frac_reward_zero_std", "1.000 in"),
        ({"log": {**GOOD, "completions/clipped_ratio": 0.97}}, "completions/clipped_ratio", "0.97"),
        ({"log": {**GOOD, "kl": 9.0}}, "kl", "9.000 in the last fifth"),
        ({"log": {**GOOD, "entropy": 0.01}}, "entropy", "below the limit of"),
        ({"log": {**GOOD, "grad_norm": 0.0}}, "grad_norm", "below the limit of"),
        ({"log": {**GOOD, "grad_norm": 90.0}}, "grad_norm", "above the limit of"),
    ],
)
def test_every_criterion_is_named_when_it_alone_is_broken(changes, criterion, words):
    learning = judge_learning(trials(**changes), BEFORE)
    assert learning.verdict == "FAIL"
    assert list(learning.broken) == [criterion]
    assert words in learning.reason
    assert learning.reason.startswith(f"{criterion}: ")


def test_accuracy_that_only_stays_is_not_learning():
    stays = dataclasses.replace(trial(), answers=tallies([1, 0] * 64, 2))
    assert list(judge_learning([stays], BEFORE).broken) == ["accuracy"]


def test_reward_up_while_answers_go_empty_fails():
    """The collapse, at its clearest: the gain is proven, and answers are gone."""
    learning = judge_learning(trials(correct=0, log_length=0.0), BEFORE)
    assert learning.lower > Limits().gain
    assert list(learning.broken) == ["accuracy", "length"]


def test_one_run_out_of_bounds_is_enough_and_is_named():
    three = [trial(0), trial(1), trial(2, log={**GOOD, "entropy": 0.01})]
    assert "entropy: 0.010 in the last fifth of the steps (seed 2)" in (
        judge_learning(three, BEFORE).reason
    )


def test_only_the_last_fifth_is_held_to_the_limits():
    early = trial()
    early = dataclasses.replace(early, log=({**GOOD, "entropy": 0.0}, *early.log[1:]))
    assert judge_learning([early, *trials()[1:]], BEFORE).verdict == "PASS"
    assert late(dataclasses.replace(early, log=tuple({"kl": i} for i in range(10))), "kl") == 8.5


@pytest.mark.parametrize("name", [name for name, _, _ in Limits().bands()])
def test_a_figure_that_vanishes_is_an_error(name):
    log = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=f"seed 0, step 9: {name} is None"):
        judge_learning(trials(log=log), BEFORE)
    with pytest.raises(ValueError, match=f"seed 0, step 9: {name} is nan"):
        judge_learning(trials(log={**GOOD, name: math.nan}), BEFORE)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([], "no trials"),
        ([trial(7, steps=4)], "seed 7: 4 logged steps"),
        ([dataclasses.replace(trial(7), first=())], "seed 7: 0 problems in the first fifth"),
        ([dataclasses.replace(trial(7), last=(1.0,))], "seed 7: 16 problems .* and 1 in the last"),
        ([dataclasses.replace(trial(7), last=(math.nan,) * 16)], "seed 7: a mean reward"),
        ([dataclasses.replace(trial(7), answers=tallies([1], 2))], "seed 7: 1 problems"),
        ([trial(7, log_length=math.inf)], "seed 7: the log-length"),
        ([trial(7, correct=3)], "has 3 correct, not in 0..2"),
    ],
)
def test_what_cannot_be_judged_is_an_error_that_names_it(broken, words):
    with pytest.raises(ValueError, match=words):
        judge_learning(broken, BEFORE)


def test_ends_are_the_problems_means_in_the_first_and_last_fifth():
    steps = [[("a", i), ("a", i + 1.0), ("b", -i)] for i in range(10)]
    assert ends(steps) == ([1.0, -0.5], [9.0, -8.5])
    assert ends(list(reversed(steps))) == ([9.0, -8.5], [1.0, -0.5])


def test_ends_want_five_steps_every_problem_in_both_and_numbers():
    with pytest.raises(ValueError, match="4 steps have no fifth"):
        ends([[("a", 1.0)]] * 4)
    with pytest.raises(ValueError, match="'b' is not asked in both"):
        ends([[("a", 1.0)]] * 4 + [[("a", 1.0), ("b", 1.0)]])
    with pytest.raises(ValueError, match="step 5: the reward is nan"):
        ends([[("a", 1.0)]] * 4 + [[("a", math.nan)]])


@given(
    groups=st.lists(st.lists(st.floats(-2, 2), min_size=2, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_shuffling_keeps_every_group_its_rewards(groups, seed):
    prompts = [f"problem {i}" for i, group in enumerate(groups) for _ in group]
    rewards = [reward for group in groups for reward in group]
    mixed = shuffled(Random(seed), prompts, rewards)
    assert len(mixed) == len(rewards)
    for i, group in enumerate(groups):
        own = [
            reward for prompt, reward in zip(prompts, mixed, strict=True) if prompt[8:] == str(i)
        ]
        assert sorted(own) == sorted(group)


def test_shuffling_parts_rewards_from_completions():
    rewards = [float(i) for i in range(600)]
    mixed = shuffled(Random(0), ["one"] * 600, rewards)
    assert abs(np.corrcoef(mixed, rewards)[0, 1]) < 0.15


def test_controls_differ_from_the_real_run_in_one_thing():
    luck, real = Random(0), CONDITIONS["learn"]
    assert constant(luck, ["a", "b"], [0.5, -1.0]) == [1.0, 1.0]
    assert negated(luck, ["a", "b"], [0.5, -1.0]) == [-0.5, 1.0]
    for name in ("shuffled", "constant", "negated"):
        assert CONDITIONS[name].recipe == real.recipe
    zero = CONDITIONS["rate zero"].recipe
    rate = real.recipe.values["learning_rate"]
    assert zero.with_values(learning_rate=rate) == real.recipe


def test_the_collapse_is_asked_to_sort_long_lists_only():
    collapse = CONDITIONS["collapse"]
    for seed in range(3):
        recipe = collapse.of(seed)
        assert recipe.block.problem_seed in LONG_LISTS
        assert [(p.type, len(p.task["arr"])) for p in recipe.problems()] == [("sort", 9)] * 3


def test_every_seed_asks_other_problems():
    recipes = [CONDITIONS["learn"].of(seed) for seed in range(60)]
    asked = {tuple(problem.prompt for problem in recipe.problems()) for recipe in recipes}
    assert len(asked) == 60


def test_a_trial_is_measured_by_the_rule_whatever_the_trainer_is_told(monkeypatch):
    """Two prompts and five steps of the real trainer, which is told the negated reward."""
    recipe = CONDITIONS["learn"].recipe.with_values(
        n_math=0, n_prog=2, per_device_train_batch_size=12, max_steps=5
    )
    monkeypatch.setitem(CONDITIONS, "short", learn.Condition(recipe, negated))
    monkeypatch.setattr(learn, "PROBLEMS", 2)
    one = learn.trial("short", 3, "cpu")
    assert one.log[0]["reward"] == pytest.approx(-np.mean(one.first), abs=1e-4)
    assert one.log[-1]["reward"] == pytest.approx(-np.mean(one.last), abs=1e-4)
    assert [late(one, name) for name, _, _ in Limits().bands()]
    assert [tally.k for tally in one.answers] == [2] * 12


def test_the_ledger_keeps_what_is_finished_and_drops_half_a_line(tmp_path):
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path)
    ledger.add(BASE, 0, BEFORE)
    kept = [trial(seed) for seed in range(CONDITIONS["learn"].trials)]
    for one in kept:
        ledger.add("learn", one.seed, one)
    with path.open("a") as file:
        file.write('{"condition": "learn", "se')
    for again in (Ledger(path), Ledger(path)):
        assert again.test("learn", 0) == (kept, BEFORE)
        assert again.test("learn", 1) is None
        assert ("learn", kept[-1].seed) in again
        assert ("learn", len(kept)) not in again
        assert (BASE, 3) not in again
    assert path.read_text().count("\n") == 1 + len(kept)


def test_the_table_counts_every_verdict(tmp_path):
    """All that one test of each condition needs is there, so nothing is run."""
    ledger = Ledger(tmp_path / "trials.jsonl")
    ledger.add(BASE, 0, BEFORE)
    for name, condition in CONDITIONS.items():
        for seed in range(condition.trials):
            ledger.add(name, seed, trial(seed, rise=0.6 if name == "learn" else 0.0))
    make_table(tmp_path, 1, "cpu")
    lines = (tmp_path / "LEARNING.md").read_text().splitlines()
    for name, condition in CONDITIONS.items():
        counted = "1 | 0 | " if name == "learn" else "0 | 1 | gain 1"
        assert f"| {name} | {condition.trials} each | 1 | {counted} |" in lines
        seeds = ", ".join(map(str, range(condition.trials)))
        at = lines.index(f"## {name}")
        assert lines[at + 4].startswith(f"| {seeds} |")
    assert "| entropy | 0.1 to inf |" + " 0.600 to 0.600 |" * len(CONDITIONS) in lines
