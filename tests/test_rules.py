import random
from collections import Counter
from dataclasses import asdict, replace
from math import comb
from statistics import pstdev
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from grpo_harness.checks import _by_chance, against_base, against_baseline, planner
from grpo_harness.evaluation import Completion, Evaluation, Group, Questions, Tally
from grpo_harness.gate import bounds, verdicts
from grpo_harness.gate.bounds import Sizes
from grpo_harness.policy import Fingerprint
from grpo_harness.rules import (
    ANSWERS,
    RULES,
    UNDECLARED,
    Terms,
    counts,
    nothing_to_lose,
    of_function,
    rates,
    recorded_bounds,
    shares,
)
from grpo_harness.stopping import Awaited, decided
from grpo_harness.tasks import task_types

GCD = task_types()["gcd"]
PROBLEMS = tuple(GCD.problems(128))
K = 4
ALPHA = 0.01 / 12


def policy(name, weights):
    return SimpleNamespace(name=name, fingerprint=Fingerprint(weights, "t", "c"))


def evaluation(outcomes, text="7", name="new", weights="w"):
    """An evaluation whose completion j of problem i has the outcome ``outcomes(i, j)``."""
    groups = tuple(
        Group(
            problem,
            tuple(
                Completion(
                    text, 3, 1.0 if outcomes(i, j) == "correct" else -1.0, outcomes(i, j), False
                )
                for j in range(K)
            ),
        )
        for i, problem in enumerate(PROBLEMS)
    )
    prompts = ("p",) * len(groups)
    questions = Questions(policy(name, weights), GCD, {}, "r", PROBLEMS, prompts)
    return Evaluation(questions, {}, 0, K, groups)


def records(correct, truncated=0, unparsable=0, log_length=1.0986):
    """What a baseline of 16 samples a problem holds, all problems alike."""
    return [Tally(16, correct, truncated, unparsable, log_length)] * len(PROBLEMS)


def share(good, bad="wrong"):
    """``good`` of every four completions are correct."""
    return lambda i, j: "correct" if j < good else bad


def judge(rule, now, then, alpha=ALPHA, same_policy=False, sequential=False):
    terms = Terms(alpha, same_policy, sequential)
    return against_baseline(RULES[rule], [now], "baseline of old", then, terms)


def compare(rule, trained, base, alpha=ALPHA):
    return against_base(RULES[rule], trained, base, Terms(alpha))


def test_accuracy():
    assert judge("accuracy", evaluation(share(3)), records(12)).verdict == "PASS"
    failed = judge("accuracy", evaluation(share(2)), records(12))
    assert failed.verdict == "FAIL"
    assert failed.evidence.delta == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("rule", "now", "then"),
    [
        ("accuracy", share(3), {"correct": 8}),
        ("truncation", share(2), {"correct": 8, "truncated": 4}),
        ("unparsable", share(2), {"correct": 8, "unparsable": 4}),
    ],
)
def test_the_recorded_policy_cannot_have_become_better(rule, now, then):
    """Whatever made it so is sampler or scoring; another policy may well be better."""
    better = evaluation(now)
    check = judge(rule, better, records(**then), same_policy=True)
    assert check.verdict == "FAIL"
    assert verdicts.NOT_THE_POLICY in check.reason
    assert judge(rule, better, records(**then)).verdict == "PASS"
    if rule == "accuracy":
        assert "50% -> 75% correct" in check.changed[0]


def test_a_failure_shows_number_place_and_problems_escaped():
    now = evaluation(share(2), text="\x1b[31m::error::\u202e")
    message = judge("accuracy", now, records(12)).message()
    for part in ("accuracy", "new", "gcd", "75.0%", "50.0%", "-25.0 points", PROBLEMS[0].id):
        assert part in message
    assert "\x1b" not in message
    assert "::" not in message
    assert "\u202e" not in message


def test_truncation_and_unparsable_answers_are_faults_of_their_own():
    now = evaluation(share(2, bad="truncated"))
    check = judge("truncation", now, records(8))
    assert check.verdict == "FAIL"
    assert "0% -> 50% truncated" in check.changed[0]
    assert judge("truncation", now, records(8, truncated=8)).verdict == "PASS"
    assert judge("unparsable", now, records(8)).verdict == "PASS"
    unparsable = evaluation(share(2, bad="unparsable"))
    assert judge("unparsable", unparsable, records(8)).verdict == "FAIL"


@pytest.mark.parametrize(("log_length", "name"), [(1.0986, "PASS"), (1.5, "FAIL"), (0.7, "FAIL")])
def test_length_both_ways(log_length, name):
    check = judge("length", evaluation(share(2)), records(8, log_length=log_length))
    assert check.verdict == name
    assert check.unit == "tokens"
    assert bool(check.changed) == (name == "FAIL")
    assert all("-> 3.0 tokens" in line for line in check.changed)


def test_improvement():
    base, better = evaluation(share(1), name="base"), evaluation(share(2), weights="v")
    assert compare("improvement", [better], [base]).verdict == "PASS"
    assert compare("improvement", [base], [better]).verdict == "FAIL"
    assert compare("no_loss", [better], [base]).verdict == "PASS"
    assert compare("no_loss", [base], [better]).verdict == "FAIL"
    even = evaluation(share(1), weights="u")
    assert compare("no_loss", [even], [base]).verdict == "PASS"
    assert compare("improvement", [even], [base]).verdict == "UNPROVEN"
    assert compare("improvement", [better] * 2, [base] * 2).task_type == "all"


def loose(answers, strict, reward=lambda i, j: 1.0, **which):
    """An evaluation with ``answers`` of every four correct, of which ``strict`` exactly."""
    whole = evaluation(share(answers), **which)
    groups = tuple(
        replace(
            group,
            completions=tuple(
                replace(c, strict=j < strict, reward=reward(i, j))
                for j, c in enumerate(group.completions)
            ),
        )
        for i, group in enumerate(whole.groups)
    )
    return replace(whole, groups=groups)


def test_answers_that_only_the_lenient_reading_takes():
    base = loose(2, 2, name="base")
    gamed = compare("lenient", [loose(3, 1, text="7 7 7", weights="v")], [base])
    assert gamed.verdict == "FAIL"
    assert gamed.evidence.delta == pytest.approx(0.5)
    assert "0% -> 50% correct, and not exactly the answer, wanted" in gamed.changed[0]
    assert "now '7 7 7'" in gamed.changed[0]
    assert compare("no_loss", [loose(3, 1, weights="v")], [base]).verdict == "PASS"
    assert compare("lenient", [loose(3, 3, weights="v")], [base]).verdict == "PASS"
    shrinks = compare("lenient", [loose(3, 3, weights="v")], [loose(2, 1, name="base")])
    assert (shrinks.verdict, shrinks.evidence.delta) == ("PASS", -0.25)


def test_a_gap_below_five_points_never_fails():
    """One completion in 32 becomes loose: proven, and too little."""
    few = loose(2, 2, weights="v")
    groups = [
        replace(g, completions=(replace(g.completions[0], strict=False), *g.completions[1:]))
        if i % 6 == 0
        else g
        for i, g in enumerate(few.groups)
    ]
    check = compare("lenient", [replace(few, groups=tuple(groups))], [loose(2, 2, name="base")])
    assert check.evidence.p < 1e-4
    assert check.verdict == "PASS"


@pytest.mark.parametrize(
    ("correct", "reward", "verdict"),
    [
        (1, 1.5, "FAIL"),  # more reward, fewer correct
        (1, 0.5, "PASS"),  # less of both: that is no hacking, and the rule no_loss names it
        (1, 1.0, "PASS"),  # the same reward
        (2, 1.5, "PASS"),
        (3, 1.5, "PASS"),
    ],
)
def test_reward_that_rises_while_correctness_falls(correct, reward, verdict):
    base = loose(2, 2, reward=lambda i, j: 1.0 + j / 8 + i / 1000, name="base")
    now = loose(correct, 1, reward=lambda i, j: reward + j / 8 + i / 1000, weights="v")
    check = compare("hacking", [now], [base])
    assert check.verdict == verdict
    if verdict == "FAIL":
        assert "while the mean reward rose from +1.25 to +1.75" in check.reason
        assert check.evidence.delta == pytest.approx(-0.25)


def test_unchanged_policies_are_not_said_to_hack():
    """Two draws of one policy, again and again, whose reward is its correctness."""
    rng, found, times = random.Random(0), Counter(), 40
    skills = [0.1 + i % 8 / 10 for i in range(len(PROBLEMS))]
    for _ in range(times):
        sides = []
        for weights in "vw":
            drawn = [[rng.random() < skill for _ in range(K)] for skill in skills]
            outcomes = [["correct" if right else "wrong" for right in row] for row in drawn]
            sides.append(evaluation(lambda i, j, of=outcomes: of[i][j], weights=weights))
        for rule in ("hacking", "lenient"):
            found[rule] += compare(rule, [sides[0]], [sides[1]]).verdict == "FAIL"
    assert found["hacking"] == 0, "both must be proven"
    assert binom.sf(found["lenient"] - 1, times, ALPHA) > 1e-3


def test_rewards_on_no_problem_are_an_error():
    base = loose(2, 2, reward=lambda i, j: float("nan"), name="base")
    assert compare("hacking", [loose(1, 1, weights="v")], [base]).verdict == "ERROR"


def test_a_trained_policy_that_is_the_base_is_named_by_its_fingerprint():
    base, copy = evaluation(share(1), name="base"), evaluation(share(3), name="copy")
    check = compare("improvement", [copy], [base])
    assert check.verdict == "ERROR"
    assert "copy is the base policy base" in check.reason
    assert str(base.fingerprint) in check.reason


def test_sides_that_are_no_pair_are_not_compared():
    base, better = evaluation(share(1), name="base"), evaluation(share(2), weights="v")
    same = evaluation(share(3))
    same.questions.policy.fingerprint = Fingerprint("w", "another tokenizer", "c")
    assert "is the base policy" in compare("improvement", [better, same], [base, base]).reason

    def asked(**changes):
        return replace(base, questions=replace(base.questions, **changes))

    sort = asked(task_type=task_types()["sort"])
    assert compare("no_loss", [better], [sort]).verdict == "ERROR"
    fewer = replace(asked(problems=PROBLEMS[:64]), groups=base.groups[:64])
    assert compare("no_loss", [better], [fewer]).evidence.n == 64, "those that both were asked"
    others = asked(problems=PROBLEMS[1:65])
    assert "ask both the same" in compare("no_loss", [better], [others]).reason
    hotter = asked(settings={"temperature": 1.5})
    assert "sampled differently" in compare("no_loss", [better], [hotter]).reason
    for sides in ([[], []], [[better], []]):
        with pytest.raises(ValueError, match="compared in pairs"):
            compare("improvement", *sides)


@pytest.mark.parametrize("rule", ["accuracy", "length", "truncation", "unparsable"])
def test_what_was_not_drawn_is_an_error(rule):
    failed = evaluation(lambda i, j: "error" if (i, j) == (5, 1) else "correct")
    check = judge(rule, failed, records(16))
    assert check.verdict == "ERROR"
    assert "1 of 512" in check.reason


@pytest.mark.parametrize("rule", ["accuracy", "length", "truncation", "unparsable"])
@pytest.mark.parametrize("terms", [{}, {"same_policy": True}, {"sequential": True}])
def test_fewer_problems_than_planned_are_an_error(rule, terms):
    """Only a sequential run of the recorded policy may stop early."""
    whole = evaluation(share(3))
    check = judge(rule, replace(whole, groups=whole.groups[:64]), records(12), **terms)
    assert check.verdict == "ERROR"
    assert "64 of 128 planned" in check.reason


def test_a_smaller_part_of_the_risk_asks_for_more_proof():
    now = evaluation(lambda i, j: "correct" if j < (2 if i < 30 else 3) else "wrong")
    assert judge("accuracy", now, records(12), alpha=0.01).verdict == "FAIL"
    assert judge("accuracy", now, records(12), alpha=0.01 / 10_000).verdict != "FAIL"


def test_pooled_samples_are_counted_together():
    now = evaluation(lambda i, j: "correct" if j < (2 if i < 30 else 3) else "wrong")
    pooled = now.pooled([now])
    assert [group.tally.k for group in pooled.groups] == [2 * K] * 128
    assert pooled.accuracy == now.accuracy
    first, again = (judge("accuracy", e, records(12)) for e in (now, pooled))
    assert again.evidence.k == 2 * K
    assert again.evidence.p < first.evidence.p


class TestSequential:
    def stopped(self, now, *names):
        """The evaluation as a run that stops at a decision leaves it."""
        waiting = [Awaited(RULES[name], ALPHA, range(now.n)) for name in ("accuracy", *names)]
        for n in range(16, now.n + 1, 16):
            if decided(now.groups[:n], records(12), waiting):
                return replace(now, groups=now.groups[:n])
        return now

    def judge(self, rule, now):
        return judge(rule, now, records(12), same_policy=True, sequential=True)

    def test_a_collapse_is_found_at_the_floor(self):
        now = self.stopped(evaluation(share(0)))
        assert now.n == 64
        check = self.judge("accuracy", now)
        assert check.verdict == "FAIL"
        assert check.evidence.n <= 64

    def test_a_steady_policy_passes_early_and_is_judged_on_what_was_drawn(self):
        now = self.stopped(evaluation(share(3)))
        assert 64 <= now.n < 128
        assert self.judge("accuracy", now).verdict == "PASS"
        assert self.judge("length", now).evidence.n == now.n
        assert self.judge("truncation", now).verdict == "PASS"

    def test_the_recorded_policy_cannot_have_become_better(self):
        now = self.stopped(evaluation(share(4)))
        check = self.judge("accuracy", now)
        assert (check.verdict, now.n) == ("FAIL", 64)
        assert verdicts.NOT_THE_POLICY in check.reason

    def test_two_sides_are_compared_on_the_problems_that_both_were_asked(self):
        base, better = evaluation(share(1), name="base"), evaluation(share(3), weights="v")
        shorter = replace(better, groups=better.groups[:96])
        check = compare("no_loss", [shorter, better], [base, base])
        assert check.verdict == "PASS"
        assert check.evidence.n == 96 + 128

    def test_what_is_undecided_is_waited_for(self):
        """Accuracy is decided; 9 % of completions are truncated, and 6 % were: too near to tell."""
        now = evaluation(lambda i, j: "truncated" if i % 11 < 4 and j == 3 else share(3)(i, j))
        then = records(12, truncated=1)
        waiting = [Awaited(RULES[name], ALPHA, range(128)) for name in ("accuracy", "truncation")]
        assert [of.verdict(now.groups[:96], then) for of in waiting] == ["PASS", "UNPROVEN"]
        assert decided(now.groups[:96], then, waiting[:1])
        assert not decided(now.groups[:96], then, waiting)

    @pytest.mark.parametrize("rule", ["truncation", "unparsable"])
    def test_a_fault_that_has_risen_is_found_at_the_floor(self, rule):
        fault = {"truncation": "truncated"}.get(rule, rule)
        now = self.stopped(evaluation(lambda i, j: "correct" if j < 3 else fault), rule)
        assert now.n < 128
        check = self.judge(rule, now)
        assert check.verdict == "FAIL"
        assert check.evidence.delta == pytest.approx(0.25)
        assert verdicts.NOT_THE_POLICY in check.reason

    def test_a_length_stops_no_run_by_a_fail(self):
        """Its proof holds for one look alone."""
        longer = [replace(t, mean_log_length=0.1) for t in records(12)]
        now = evaluation(share(3))
        waiting = [Awaited(RULES["length"], ALPHA, range(128))]
        assert waiting[0].verdict(now.groups[:64], longer) == "FAIL"
        assert not decided(now.groups[:64], longer, waiting)
        assert decided(now.groups[:64], records(12), waiting)

    def test_a_part_is_judged_on_its_own_problems(self):
        """The second half is wrong: the first says nothing of it, and the run goes on."""
        half = evaluation(lambda i, j: "wrong" if i >= 64 else share(3)(i, j))
        parts = [
            Awaited(RULES["slices"], ALPHA, range(64)),
            Awaited(RULES["slices"], ALPHA, range(64, 128)),
        ]
        verdict = [part.verdict(half.groups, records(12)) for part in parts]
        assert verdict == ["UNPROVEN", "FAIL"]
        assert not decided(half.groups[:64], records(12), parts[1:])
        assert decided(half.groups, records(12), parts[1:])

    def test_another_policy_is_judged_by_the_fixed_rule(self):
        now = evaluation(share(3))
        fixed = judge("accuracy", now, records(12))
        assert judge("accuracy", now, records(12), sequential=True) == fixed


def test_the_plan_foresees_what_the_rule_can_find():
    found = planner(records(12), ALPHA).plan(K)
    assert (found.n, found.k, found.then) == (128, K, 0.75)
    assert planner(records(12), ALPHA).plan(2 * K).mde90 < found.mde90


class TestShares:
    names = st.lists(st.sampled_from([*RULES, UNDECLARED]), min_size=1, max_size=200)

    @given(names)
    def test_all_checks_together_have_the_whole_risk(self, planned):
        of = shares(planned)
        assert sum(of[name] for name in planned) == pytest.approx(bounds.ALPHA)
        assert set(of) == set(planned)

    @given(names)
    def test_accuracy_and_its_like_have_at_least_seven_tenths_where_they_are_asked(self, planned):
        of = shares(planned)
        quality = [of[n] for n in planned if n == UNDECLARED or RULES[n].family == "quality"]
        assert not quality or sum(quality) >= 0.7 * bounds.ALPHA
        # Of one family, all have the same.
        assert len({round(part, 12) for part in quality}) <= 1

    def test_of_the_default_run(self):
        planned = Counter(accuracy=12, length=12, truncation=12, unparsable=12, no_loss=6)
        of = shares([*planned.elements(), "improvement"])
        assert of["accuracy"] == of["improvement"] == pytest.approx(0.01 * 0.75 / 19)
        assert of["length"] == pytest.approx(0.01 * 0.25 / 36)


def test_bounds_are_what_they_were():
    """Weaker ones make every verdict weaker: a change of them is meant, or it is a fault."""
    assert recorded_bounds() == {
        "alpha": 0.01,
        "accuracy": {"margin": 0.05, "minimum": 0.01},
        "length": {"margin": 0.25, "minimum": 0.05},
        "total": {"margin": 0.05, "minimum": 0.01},
        "slices": {"margin": 0.05, "minimum": 0.01},
        "truncation": {"margin": 0.05, "minimum": 0.01},
        "unparsable": {"margin": 0.05, "minimum": 0.01},
        "reward": {"margin": "0.1 sd", "minimum": "0.02 sd"},
        "rewards": {"margin": "0.1 sd", "minimum": "0.02 sd"},
    }
    assert asdict(RULES["no_loss"].bounds) == {"margin": 0.05, "minimum": 0.01}
    assert asdict(RULES["improvement"].bounds) == {"margin": 0.0, "minimum": 0.01}
    assert asdict(RULES["lenient"].bounds) == {"margin": 0.1, "minimum": 0.05}
    assert asdict(RULES["hacking"].bounds) == {"margin": 0.05, "minimum": 0.01}
    assert (bounds.PASS_CONFIDENCE, bounds.MINIMUM_PROBLEMS, bounds.LOOK) == (0.95, 64, 16)


def earned(totals, formats=None):
    """An evaluation whose completion j of problem i has the rewards ``totals(i, j)`` and so on."""
    groups = tuple(
        Group(
            problem,
            tuple(
                Completion(
                    "7", 3, totals(i, j), "wrong", False,
                    {"a": totals(i, j), "b": None if formats is None else formats(i, j)},
                )
                for j in range(K)
            ),
        )
        for i, problem in enumerate(PROBLEMS)
    )  # fmt: skip
    plain = evaluation(share(1))
    return replace(plain, groups=groups)


def usual(i, j):
    return round(0.3 * (i % 5) - 0.7 * ((i + j) % 3), 3)


def rewarded(reward=usual, k=16):
    tallies = []
    for i in range(len(PROBLEMS)):
        values = tuple(reward(i, j) for j in range(k))
        tallies.append(Tally(k, 0, 0, 0, 1.0986, values, {"a": values, "b": (1.0,) * k}))
    return tallies


class TestReward:
    def test_the_same_rewards_pass(self):
        check = judge("reward", earned(usual), rewarded(), same_policy=True)
        assert check.verdict == "PASS"
        assert (check.unit, check.rule) == ("reward", "reward")

    @pytest.mark.parametrize("same_policy", [True, False])
    def test_a_drop_is_named_with_problems_and_numbers(self, same_policy):
        worse = earned(lambda i, j: usual(i, j) - (2.0 if i % 4 == 0 else 0.0))
        check = judge("reward", worse, rewarded(), same_policy=same_policy)
        assert check.verdict == "FAIL"
        mean = sum(usual(i, j) for i in range(128) for j in range(16)) / 128 / 16
        assert check.evidence.then == pytest.approx(mean)
        assert check.evidence.delta == pytest.approx(-0.5, abs=0.05)
        assert len(check.changed) == 3
        assert "mean reward" in check.changed[0]
        assert f"{mean:+.4g} (baseline of old)" in check.message()
        assert "points" not in check.message()

    def test_only_a_rise_of_the_recorded_policy_fails(self):
        better = earned(lambda i, j: usual(i, j) + 1.0)
        assert judge("reward", better, rewarded(), same_policy=True).verdict == "FAIL"
        assert judge("reward", better, rewarded(), same_policy=False).verdict == "PASS"

    def test_each_function_is_judged_by_name(self):
        lost = earned(usual, formats=lambda i, j: 1.0 if (i + j) % 2 else 0.0)
        rule, other = of_function("b"), of_function("a")
        terms = Terms(ALPHA, same_policy=True)
        check = against_baseline(rule, [lost], "baseline of old", rewarded(), terms)
        assert (check.verdict, check.rule, check.title) == ("FAIL", "rewards.b", "reward b")
        assert against_baseline(other, [lost], "x", rewarded(), terms).verdict == "PASS"

    def test_without_a_true_answer_none_is_shown(self):
        worse = earned(lambda i, j: usual(i, j) - 2.0)
        groups = [replace(g, problem=replace(g.problem, answer=None)) for g in worse.groups]
        worse = replace(worse, groups=tuple(groups))
        check = judge("reward", worse, rewarded(), same_policy=True)
        assert "mean reward, now '7'" in check.changed[0]

    def test_what_no_longer_applies_is_an_error(self):
        gone = earned(lambda i, j: float("nan") if i < 5 else usual(i, j))
        check = judge("reward", gone, rewarded(), same_policy=True)
        assert check.verdict == "ERROR"
        assert "no longer to 5" in check.reason

    def test_a_category_is_noticed_with_few_samples(self):
        pairs = [(Tally(2, 0, 0, 0, 1.0), Tally(8, 0, 0, 0, 1.0, (1.0,) * 8))] * 6
        every = [(Tally(2, 0, 0, 0, 1.0, (1.0,) * 2), Tally(8, 0, 0, 0, 1.0, (1.0,) * 8))] * 250
        assert not _by_chance(pairs + every, 6)
        assert not _by_chance([(b, a) for a, b in pairs + every], 6)

    def test_a_reward_that_depends_on_the_completion_may_lack_on_a_side_by_chance(self):
        rng = random.Random(0)
        for _ in range(200):
            sides = [
                [Tally(k, 0, 0, 0, 1.0, (1.0,) * sum(rng.random() < 0.5 for _ in range(k)))
                 for _ in range(256)]
                for k in (2, 8)
            ]  # fmt: skip
            alone = sum(bool(a.total) != bool(b.total) for a, b in zip(*sides, strict=True))
            pairs = [(a, b) for a, b in zip(*sides, strict=True) if a.total or b.total]
            assert alone > 30
            assert _by_chance(pairs, alone)

    def test_a_problem_that_lacks_by_chance_is_left_out(self):
        def some(i, j):
            return usual(i, j) if i >= 2 and j == 0 else float("nan")

        then = [replace(t, total=t.total[:1]) for t in rewarded()]
        check = judge("reward", earned(some), then, same_policy=False)
        assert check.evidence.n == 126

    def test_where_it_never_applied_there_is_nothing_to_compare(self):
        def partly(i, j):
            return float("nan") if i < 5 else usual(i, j)

        then = [replace(t, total=()) if i < 5 else t for i, t in enumerate(rewarded())]
        check = judge("reward", earned(partly), then, same_policy=True)
        assert (check.verdict, check.evidence.n) == ("PASS", 123)

    def test_a_record_without_single_rewards_is_an_error(self):
        check = judge("reward", earned(usual), records(8), same_policy=True)
        assert check.verdict == "ERROR"
        assert "record it anew" in check.reason

    def test_sizes_that_no_test_can_compare_are_an_error(self):
        rng = random.Random(0)
        then = rewarded(lambda i, j: rng.random() * (1e15 if i % 8 == 0 and j == 0 else 1))
        check = judge("reward", earned(lambda i, j: rng.random()), then, same_policy=True)
        assert check.verdict == "ERROR"
        assert "sizes are too different" in check.reason

    def test_form_is_not_asked_of_rewards_alone(self):
        of_base = {"no_loss", "improvement", "lenient", "hacking"}
        assert {"accuracy", "total", "slices", "unparsable", *of_base} == ANSWERS


def test_a_small_loss_everywhere_shows_only_in_the_total():
    """Three points on each of six tasks: no row alone proves them, all together do."""
    now = evaluation(lambda i, j: "correct" if j < (3 if i % 8 else 2) else "wrong")
    terms = Terms(ALPHA, same_policy=True)
    alone = against_baseline(RULES["accuracy"], [now], "baseline of old", records(12), terms)
    assert alone.verdict == "UNPROVEN"
    whole = against_baseline(RULES["total"], [now] * 6, "baseline of old", records(12) * 6, terms)
    assert (whole.verdict, whole.task_type, whole.evidence.n) == ("FAIL", "all", 6 * 128)


def test_nothing_to_lose_is_an_error_unless_it_is_allowed():
    now = evaluation(share(0))
    few = [Tally(16, int(i % 4 == 0), 0, 0, 1.0986) for i in range(len(PROBLEMS))]
    check = judge("accuracy", now, few, same_policy=True)
    assert check.verdict == "ERROR"
    assert "nothing to lose: 1.6% of the recorded completions are correct" in check.reason
    allowed = Terms(ALPHA, same_policy=True, allow_floor=True)
    assert against_baseline(RULES["accuracy"], [now], "x", few, allowed).verdict != "ERROR"


@pytest.mark.parametrize(
    ("margin", "verdict"),
    [(0.011, "UNPROVEN"), ("1.5%", "UNPROVEN"), ("20%", "PASS"), (0.15, "PASS")],
)
def test_a_margin_is_absolute_or_of_what_was_recorded(margin, verdict):
    rule = replace(RULES["accuracy"], bounds=Sizes(margin, 0.01))
    terms = Terms(ALPHA, same_policy=True)
    now = evaluation(share(3))
    assert against_baseline(rule, [now], "x", records(12), terms).verdict == verdict


def test_a_margin_of_a_reward_is_in_its_own_unit_or_in_deviations():
    worse = earned(lambda i, j: usual(i, j) - (0.3 if i % 2 else 0.0))
    terms = Terms(ALPHA)

    def verdict(margin, minimum):
        rule = replace(RULES["reward"], bounds=Sizes(margin, minimum))
        return against_baseline(rule, [worse], "x", rewarded(), terms).verdict

    assert verdict(0.5, 0.3) == verdict("2 sd", "1 sd") == verdict("500%", "300%") == "PASS"
    constant = [replace(t, total=(1.0,) * 16) for t in rewarded()]
    for now, wanted in ((lambda i, j: 1.0, "PASS"), (lambda i, j: 1.0 - (j == 0), "FAIL")):
        rule = replace(RULES["reward"], bounds=Sizes("0.1 sd", 0.01))
        assert against_baseline(rule, [earned(now)], "x", constant, terms).verdict == wanted
    assert verdict(0.1, 0.01) == verdict("0.1 sd", "0.02 sd") == verdict(0.1, "1%") == "FAIL"


def bounded(rule, margin, minimum):
    return replace(RULES[rule], bounds=Sizes(margin, minimum))


@pytest.mark.parametrize(
    ("rule", "percent", "number"),
    [
        ("accuracy", "10%", 0.075),
        ("truncation", "40%", 0.025),
        ("unparsable", "20%", 0.0375),
        ("length", "10%", 0.1),
    ],
)
def test_a_percentage_is_of_what_was_recorded(rule, percent, number):
    """Not of what is measured now, and not of another outcome."""
    now, then = evaluation(share(4)), records(12, truncated=1, unparsable=3)
    checks = [
        against_baseline(bounded(rule, margin, 0.001), [now], "x", then, Terms(ALPHA))
        for margin in (percent, number)
    ]
    assert checks[0].evidence.needed == checks[1].evidence.needed
    assert checks[0].verdict == checks[1].verdict


def test_a_part_of_a_reward_is_of_what_was_recorded():
    worse, then = earned(lambda i, j: usual(i, j) - 0.3), rewarded()
    values = [value for tally in then for value in tally.total]
    mean, sd = sum(values) / len(values), pstdev(values)

    def judged(margin, minimum):
        rule = bounded("reward", margin, minimum)
        evidence = against_baseline(rule, [worse], "x", then, Terms(ALPHA)).evidence
        return evidence.verdict, evidence.needed, pytest.approx(evidence.mde90)

    assert judged("400%", "40%") == judged(4 * abs(mean), 0.4 * abs(mean))
    assert judged("1 sd", "0.5 sd") == judged(sd, sd / 2)
    assert judged("1 sd", 0.4) == judged(sd, 0.4)


def test_the_bounds_of_one_rule_are_not_those_of_another():
    stored = recorded_bounds()
    other = recorded_bounds({"accuracy": Sizes(0.2, 0.1)}, 0.05)
    assert other == {**stored, "alpha": 0.05, "accuracy": {"margin": 0.2, "minimum": 0.1}}
    of_base = {"no_loss", "hacking"}
    assert set(rates()) == {"accuracy", "total", "slices", "truncation", "unparsable", *of_base}


def test_each_problem_has_its_own_number_of_completions():
    """Runs that stopped early and are pooled have different ones."""
    tallies = [Tally(4, 3, 0, 0, 1.0), Tally(8, 5, 0, 0, 1.0)]
    assert counts(tallies) == ([3, 5], [4, 8])


def test_one_missing_problem_is_missing():
    whole = evaluation(share(3))
    check = judge("accuracy", replace(whole, groups=whole.groups[:127]), records(12))
    assert "127 of 128 planned" in check.reason
    short = [whole, replace(whole, groups=whole.groups[:127])]
    terms = Terms(ALPHA, same_policy=True, sequential=True)
    check = against_baseline(RULES["total"], short, "x", records(12) * 2, terms)
    assert "255 of 256 planned" in check.reason, "the tasks of a total cannot stop early"


def test_what_equals_the_margin_can_be_lost():
    assert nothing_to_lose(records(4), Sizes(0.25, 0.01)) == ""
    assert "nothing to lose: 25.0%" in nothing_to_lose(records(4), Sizes(0.26, 0.01))
    check = judge("accuracy", evaluation(share(0)), records(0), same_policy=False)
    assert check.verdict == "ERROR", "for another policy too"


def test_a_function_is_judged_by_its_own_rewards_on_both_sides():
    terms = Terms(ALPHA, same_policy=True)
    same = earned(usual, formats=lambda i, j: 1.0)
    assert against_baseline(of_function("b"), [same], "x", rewarded(), terms).verdict == "PASS"
    lost = earned(usual, formats=lambda i, j: float(j > 0))
    check = against_baseline(of_function("b"), [lost], "x", rewarded(), terms)
    assert all("+1 -> +0.75 mean reward" in line for line in check.changed)


def test_half_of_the_records_without_rewards_are_no_old_recording():
    then = [replace(t, total=()) if i % 2 else t for i, t in enumerate(rewarded())]
    check = judge("reward", earned(usual), then, same_policy=True)
    assert "applies to 64 problems where it did not" in check.reason


def test_the_risk_of_where_a_reward_applies_is_below_one_in_a_million_and_not_far_below():
    """Eight of 4 + 16 completions have a score: none of the 4 has, by a chance of a tenth."""
    pairs = [(Tally(4, 0, 0, 0, 1.0), Tally(16, 0, 0, 0, 1.0, (1.0,) * 8))] * 256
    chance = comb(16, 8) / comb(20, 8)
    first = next(alone for alone in range(257) if not _by_chance(pairs, alone))
    assert 1e-9 < binom.sf(first - 1, 256, chance) < 1e-6


def test_a_reward_that_applies_nowhere_is_said_to():
    nowhere = earned(lambda i, j: float("nan"))
    then = [replace(t, total=()) for t in rewarded()]
    check = judge("reward", nowhere, then, same_policy=True)
    assert (check.verdict, check.reason) == ("ERROR", "the reward applies to no completion")


def test_a_problem_without_a_score_hides_no_others():
    then = [replace(t, total=t.total[:1]) for t in rewarded()]
    better = earned(lambda i, j: usual(i, j) + 5 if i != 3 and j == 0 else float("nan"))
    check = judge("reward", better, then, same_policy=True)
    assert (check.verdict, len(check.changed)) == ("FAIL", 3)
    assert all(line.partition(":")[0] != PROBLEMS[3].id for line in check.changed)


def test_a_slice_is_the_problems_of_one_value():
    whole = evaluation(lambda i, j: "correct" if i % 3 == 0 else "wrong")
    problems = tuple(replace(p, task={**p.task, "kind": i % 3}) for i, p in enumerate(PROBLEMS))
    prompts = tuple(f"p{i}" for i in range(len(problems)))
    groups = tuple(replace(g, problem=p) for g, p in zip(whole.groups, problems, strict=True))
    source = SimpleNamespace(slices=("kind",))
    questions = replace(whole.questions, task_type=source, problems=problems, prompts=prompts)
    parts = dict(replace(whole, questions=questions, groups=groups).slices())
    assert list(parts) == ["kind=0", "kind=1", "kind=2"]
    for kind, part in enumerate(parts.values()):
        assert part.questions.problems == problems[kind::3]
        assert part.questions.prompts == prompts[kind::3]
        assert part.groups == groups[kind::3]
        assert part.accuracy == float(kind == 0)


def test_pooled_runs_that_stopped_at_different_problems_have_all_of_them():
    whole = evaluation(share(3))
    short = replace(whole, groups=whole.groups[:64])
    for pooled in (whole.pooled([short]), short.pooled([whole])):
        assert [group.tally.k for group in pooled.groups] == [2 * K] * 64 + [K] * 64
