"""A changed reward is named by what it does to recorded completions, before anything is drawn."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from grpo_harness.baselines import file as baseline
from grpo_harness.baselines.examples import (
    LONGEST,
    MOST,
    MOST_BYTES,
    Example,
    _chosen,
    _line,
    examples_of,
    read,
)
from grpo_harness.baselines.file import BaselineError, load
from grpo_harness.baselines.pruning import check_restorable, prune, stale
from grpo_harness.baselines.recording import record
from grpo_harness.engines.engine import Sample
from grpo_harness.evaluation import RULE, ask, evaluate
from grpo_harness.report.problems import _kept
from grpo_harness.rewards.functions import Correct, Reward, Rewards
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import task_types

GCD = task_types()["gcd"]


def accuracy(completions, task, **_):
    """1 for the right answer and nothing else."""
    return [float(text.strip() == right(t)) for text, t in zip(completions, task, strict=True)]


def tagged(completions, task, **_):
    """The right answer in tags counts too: none of the texts that rewards are tried on has them."""
    wanted = [(right(t), f"<answer>{right(t)}</answer>") for t in task]
    return [float(text.strip() in two) for text, two in zip(completions, wanted, strict=True)]


def brief(completion_ids, **_):
    return [-len(ids) / 8 for ids in completion_ids]


def right(task):
    return str(math.gcd(task["a"], task["b"]))


def named(name, function):
    def reward(**columns):
        return function(**columns)

    reward.__name__ = name
    return reward


WRONG = ("0", "I know", "", "12 12", "\x1b[2J::error::")


class Drawn:
    """An engine whose answers are right, in tags, or one of ``WRONG``, by the seed."""

    def __init__(self, policy, text=None):
        self.right = {policy.render(p.prompt): right(p.task) for p in GCD.problems(80)}
        self.text = text

    def settings(self):
        return {"temperature": 0.8}

    def remarks(self):
        return {}

    def identity(self):
        return {"engine": "drawn"}

    def sample(self, requests, progress=None):
        return [self._sample(self.right[r.prompt], r.seed) for r in requests]

    def _sample(self, answer, seed):
        text = (answer, f"<answer>{answer}</answer>", *WRONG)[seed % 7]
        if self.text is not None:
            text = self.text(answer, seed)
        tokens = 1 + seed % 5
        return Sample(text, tokens, seed % 11 == 0, ids=tuple(range(tokens)))


TWO = Rewards((Reward(accuracy), Reward(brief, 0.25)), Correct("accuracy", 1.0))


@pytest.fixture
def recorded(tiny_policy, tmp_path):
    """A function that records 80 problems by some rewards: ``recorded(rewards, text=None)``."""

    def recorded(rewards=TWO, text=None, n=80):
        engine = Drawn(tiny_policy, text)
        questions = ask(tiny_policy, GCD, n, settings=engine.settings(), rewards=rewards)
        store, code = Store(tmp_path / FILE), str(text)
        evaluations = [
            evaluate(questions, engine, k=4, run_seed=s, store=store, code=code) for s in (1, 2)
        ]
        return load(record(tmp_path / "b", evaluations, root=tmp_path, reason="a test").path)

    return recorded


@pytest.fixture
def asked(tiny_policy):
    """A function that asks, and draws nothing: ``asked(rewards)``."""
    return lambda rewards=TWO, n=80: ask(
        tiny_policy, GCD, n, settings={"temperature": 0.8}, rewards=rewards
    )


def refused(stored, questions):
    with pytest.raises(BaselineError, match="not comparable") as error:
        stored.select(questions)
    message = str(error.value)
    assert "--grpo-record" in message
    assert "\n" not in message
    assert "reward was" not in message
    return message


def lines(stored):
    return [json.loads(line) for line in examples_of(stored.path).read_text().splitlines()]


def drawn(stored):
    return [line for line in lines(stored)[1:] if "trial" not in line]


def test_the_same_rewards_can_be_compared(recorded, asked):
    stored = recorded()
    assert len(stored.select(asked())) == 80
    assert len(stored.select(asked(n=70))) == 70


def test_what_is_kept_covers_scores_outcomes_and_common_texts(recorded):
    stored = recorded()
    head, *rows = lines(stored)
    assert head["correct"] == "accuracy >= 1"
    assert head["weights"] == {"accuracy": 1.0, "brief": 0.25}
    kept = drawn(stored)
    assert {row["scores"]["accuracy"] for row in kept} == {0.0, 1.0}
    assert {row["scores"]["brief"] for row in kept} == {-n / 8 for n in range(1, 6)}
    assert {row["outcome"] for row in kept} == {"correct", "wrong", "truncated"}
    assert {*WRONG} <= {row["text"] for row in kept}
    assert all(len(row["ids"]) == -8 * row["scores"]["brief"] for row in kept)
    assert all(row["total"] == row["scores"]["accuracy"] - len(row["ids"]) / 32 for row in kept)
    assert len(kept) <= MOST
    assert {"1" + right(p.task) for p in GCD.problems(32)} <= {
        row["text"] for row in rows if row.get("trial")
    }
    assert examples_of(stored.path).read_bytes().isascii()
    problems = [row["problem"] for row in rows]
    assert problems == sorted(problems)


def test_the_commonest_completions_of_a_problem_come_first(tiny_policy, tmp_path):
    """A report shows them as what the policy wrote when it was recorded."""

    def text(answer, seed):
        return ("z", "z", *"abc", answer, answer, f" {answer}")[seed // 7 % 8]

    engine = Drawn(tiny_policy, text)
    questions = ask(tiny_policy, GCD, 80, settings=engine.settings(), rewards=TWO)
    store = Store(tmp_path / FILE)
    evaluations = [evaluate(questions, engine, k=8, run_seed=s, store=store) for s in (1, 2)]
    record(tmp_path / "b", evaluations, root=tmp_path, reason="a test")
    path = next(tmp_path.glob("b/*/gcd.json"))
    for _ in range(2):
        kept, first = _kept(load(path)), 0
        for groups in zip(*(e.groups for e in evaluations), strict=True):
            drawn = [c for group in groups for c in group.completions]
            of = {k.outcome == "correct": k.text for k in kept[groups[0].problem.id]}
            for right in {c.outcome == "correct" for c in drawn}:
                times = Counter(c.text for c in drawn if (c.outcome == "correct") == right)
                assert times[of[right]] == max(times.values())
                first += min(times) == of[right]
        assert first < 140, "the order is not that of the alphabet"
        # Recorded again with fewer problems, those that are not asked keep theirs.
        fewer = [replace(e, groups=e.groups[:70], questions=questions.first(70))
                 for e in evaluations]  # fmt: skip
        record(tmp_path / "b", fewer, root=tmp_path, reason="a test")


def test_the_choice_is_the_same_each_time(recorded):
    stored = recorded()
    before = examples_of(stored.path).read_bytes()
    assert examples_of(recorded().path).read_bytes() == before


def test_a_reward_that_became_lenient_is_named_with_completions_and_both_scores(recorded, asked):
    one = Rewards((Reward(accuracy),))
    lenient = Rewards((Reward(named("accuracy", tagged)),))
    stored, questions = recorded(one), asked(lenient)
    assert questions.reward == asked(one).reward, "its digest does not tell"
    message = refused(stored, questions)
    texts = [row["text"] for row in drawn(stored) if row["text"].startswith("<answer>")]
    told = "the reward accuracy changed: '<answer>1</answer>' was 0 and is 1, '<answer>"
    assert told in message
    assert f"({len(texts)} of {len(drawn(stored))} recorded completions)" in message


def test_a_reward_is_scored_once_a_run(recorded, asked):
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return accuracy(completions, **_)

    stored, questions = recorded(), asked(Rewards((Reward(named("accuracy", counted)),)))
    calls.clear()
    messages = {refused(stored, questions) for _ in range(3)}
    assert len(messages) == 1
    assert sum(calls) <= len(lines(stored))


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (
            replace(TWO, functions=(Reward(accuracy), Reward(brief, 0.5))),
            "the weight of brief was 0.25 and is 0.5.",
        ),
        (
            replace(TWO, correct=Correct("accuracy", 0.5)),
            "correct was accuracy >= 1 and is accuracy >= 0.5.",
        ),
        (replace(TWO, correct=None), "correct was accuracy >= 1 and is not set."),
        (
            replace(TWO, functions=(Reward(accuracy), Reward(named("short", brief), 0.25))),
            "the reward brief is called short now.",
        ),
        (replace(TWO, functions=(Reward(accuracy),)), "the reward brief was removed."),
        (replace(TWO, functions=(*TWO.functions, Reward(tagged))), "the reward tagged was added."),
        (
            replace(TWO, functions=(Reward(accuracy), Reward(tagged, 0.25))),
            "the reward brief was removed; the reward tagged was added.",
        ),
    ],
)
def test_what_else_changed_is_named_alone(recorded, asked, rewards, says):
    assert f"/tiny: {says} If that is meant" in refused(recorded(), asked(rewards))


def test_the_order_of_the_functions_is_no_change(recorded, asked):
    other = replace(TWO, functions=TWO.functions[::-1])
    assert len(recorded().select(asked(other))) == 80


def test_a_reward_that_no_longer_applies_is_named(recorded, asked):
    def silent(completions, **_):
        scores = accuracy(completions, **_)
        return [None if "answer" in c else s for c, s in zip(completions, scores, strict=True)]

    other = replace(TWO, functions=(Reward(named("accuracy", silent)), TWO.functions[1]))
    assert "'<answer>1</answer>' was 0 and is none" in refused(recorded(), asked(other))


def test_a_reward_that_raises_now_is_named(recorded, asked):
    def broken(completions, **_):
        return [1 / ("<answer>" not in text) for text in completions]

    one = Rewards((Reward(named("accuracy", broken)),))
    message = refused(recorded(Rewards((Reward(accuracy),))), asked(one))
    assert "the reward accuracy (problem gcd-" in message
    assert "raised ZeroDivisionError" in message


def test_a_change_on_the_true_answers_alone_is_named_by_them(recorded, asked):
    stricter = Rewards((Reward(named("accuracy", lambda completions, task, **_: [
        float(text == right(t)) for text, t in zip(completions, task, strict=True)
    ])),))  # fmt: skip
    message = refused(recorded(Rewards((Reward(accuracy),))), asked(stricter))
    assert r"the reward accuracy changed: '  1\n' was 1 and is 0" in message
    assert "trial texts)" in message


def test_texts_are_escaped_and_long_ones_show_their_end(recorded, asked):
    def lenient(completions, **_):
        return [float("error" in text or text.endswith("END")) for text in completions]

    def text(answer, seed):
        return WRONG[-1] if seed % 2 else f"{'x' * 300} END"

    stored = recorded(Rewards((Reward(accuracy),)), text)
    message = refused(stored, asked(Rewards((Reward(named("accuracy", lenient)),))))
    assert "\x1b" not in message
    assert "::error" not in message
    assert f"'…{'x' * 56} END' was 0 and is 1" in message


def test_a_changed_reading_of_a_task_type_is_named(recorded, asked, monkeypatch):
    stored = recorded(Rewards((Reward(brief),)))
    read_then = type(GCD).read
    monkeypatch.setattr(
        type(GCD),
        "read",
        lambda self, task, text: "wrong" if "<" in text else read_then(self, task, text),
    )
    message = refused(stored, asked(Rewards((Reward(brief),))))
    assert "outcomes changed: '<answer>1</answer>' was correct and is wrong" in message


def last_digits(name, function, by):
    """A reward that is a network: its last digits depend on the machine."""
    return named(name, lambda **given: [s if s is None else s + by for s in function(**given)])


def test_the_last_digits_of_a_network_are_no_change(recorded, asked):
    def like(by):
        return Rewards((Reward(accuracy), Reward(last_digits("near", brief, by), 0.25)))

    stored = recorded(like(0.1))
    assert asked(like(0.1 + 1e-9)).reward != asked(like(0.1)).reward
    assert len(stored.select(asked(like(0.1 + 1e-9)))) == 80
    assert "the reward near changed: '" in refused(stored, asked(like(0.1 + 1e-4)))
    renamed = Rewards((Reward(accuracy), Reward(last_digits("far", brief, 0.1 + 1e-9), 0.25)))
    assert "the reward near is called far now." in refused(stored, asked(renamed))


def test_a_changed_reward_that_looks_at_its_batch_is_told_by_its_digest(recorded, asked):
    def crowd(by):
        return named("crowd", lambda completions, **_: [
            completions.count(text) + by for text in completions
        ])  # fmt: skip

    stored = recorded(replace(TWO, functions=(*TWO.functions, Reward(crowd(0.0)))))
    with pytest.raises(BaselineError, match="reward was"):
        stored.select(asked(replace(TWO, functions=(*TWO.functions, Reward(crowd(1.0))))))


def test_the_rule_reward_is_what_it_was(recorded, asked):
    assert len(recorded(RULE).select(asked(RULE))) == 80


def test_a_reward_that_looks_at_its_batch_is_left_to_its_digest(recorded, asked, tmp_path):
    def crowd(completions, **_):
        return [float(completions.count(text)) for text in completions]

    rewards = replace(TWO, functions=(*TWO.functions, Reward(crowd)))
    stored = recorded(rewards)
    assert all(set(row["scores"]) == {"accuracy", "brief"} for row in drawn(stored))
    assert len(stored.select(asked(rewards, n=70))) == 70
    lenient = (Reward(named("accuracy", tagged)), *rewards.functions[1:])
    assert "accuracy changed" in refused(stored, asked(replace(rewards, functions=lenient)))


class TestFile:
    def test_long_completions_fit(self, recorded):
        size = {0: LONGEST, 1: LONGEST + 1, 2: LONGEST - 1}

        def text(answer, seed):
            return f"{seed:020}".ljust(size[seed % 3], "x")

        stored = recorded(text=text)
        kept = drawn(stored)
        assert examples_of(stored.path).stat().st_size <= MOST_BYTES
        assert len(kept) > 20
        assert max(len(row["text"]) for row in kept) <= LONGEST
        assert {row["outcome"] for row in kept} == {"wrong", "truncated"}

    def test_every_distinct_score_is_kept_also_if_there_are_many(self, recorded):
        one = Rewards((Reward(lambda completions, **_: [len(c) / 7 for c in completions]),))
        stored = recorded(one, lambda answer, seed: "x" * (seed % 900))
        scores = {s for row in drawn(stored) for s in row["scores"].values()}
        values = {v for r in stored.records.values() for v, _ in r.total}
        assert {float(f"{s:.6g}") for s in scores} == values

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.unlink(),
            lambda path: path.write_text(""),
            lambda path: path.write_bytes(path.read_bytes()[:-20]),
            lambda path: path.write_bytes(b"\xff\xfe"),
            lambda path: path.write_text(path.read_text().replace('"text": "0"', '"text": "1"')),
            lambda path: path.write_text("[" * 100_000),
        ],
    )
    def test_one_that_is_not_what_was_recorded_is_named(self, recorded, asked, damage):
        stored = recorded()
        path = examples_of(stored.path)
        damage(path)
        message = refused(load(stored.path), asked())
        assert f"the examples {path} are not those that were recorded: restore them" in message
        assert len(recorded().select(asked())) == 80, "it is recorded anew"

    def test_line_ends_of_another_system_are_no_change(self, recorded, asked):
        stored = recorded()
        path = examples_of(stored.path)
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert len(load(stored.path).select(asked())) == 80

    def test_a_baseline_without_examples_is_compared_by_its_digest(self, recorded, asked):
        stored = recorded()
        examples_of(stored.path).unlink()
        content = json.loads(stored.path.read_text())
        del content["examples"]
        stored.path.write_text(json.dumps({**content, "schema": 3}))
        older = load(stored.path)
        assert len(older.select(asked())) == 80
        other = replace(TWO, correct=None)
        with pytest.raises(BaselineError, match=r"reward was [0-9a-f]{12}… and is "):
            older.select(asked(other))

    def test_a_crash_between_the_two_writes_is_named(self, recorded, asked, monkeypatch):
        stored = recorded()
        replaced = baseline.Path.replace

        def crash(half, path):
            if path == stored.path:
                raise KeyboardInterrupt
            return replaced(half, path)

        monkeypatch.setattr(baseline.Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            recorded(text=lambda answer, seed: answer)
        assert load(stored.path).digest == stored.digest
        assert "are not those that were recorded" in refused(load(stored.path), asked())
        assert len(list(stored.path.parent.iterdir())) == 2

    def test_examples_of_problems_that_are_kept_stay(self, recorded, asked):
        before = {row["problem"] for row in drawn(recorded(n=80))}
        stored = recorded(n=64)
        assert {row["problem"] for row in drawn(stored)} == before
        assert len(before) == 80
        assert len(stored.select(asked())) == 80


class TestStale:
    def test_examples_go_with_their_baseline(self, recorded, tmp_path):
        stored = recorded()
        (entry,) = stale(tmp_path / "b", {"other"}, {"gcd": GCD}, 80)
        with pytest.raises(BaselineError, match="could not restore"):
            check_restorable([entry])
        assert entry.paths == [stored.path, examples_of(stored.path)]
        prune([entry])
        assert not list(stored.path.parent.iterdir())

    def test_examples_without_a_baseline_are_stale(self, recorded, tmp_path):
        stored = recorded()
        assert stale(tmp_path / "b", {"tiny"}, {"gcd": GCD}, 80) == []
        stored.path.unlink()
        (entry,) = stale(tmp_path / "b", {"tiny"}, {"gcd": GCD}, 80)
        assert "there is no baseline" in str(entry)
        prune([entry])
        assert not list(stored.path.parent.iterdir())

    def test_examples_stay_when_problems_go(self, recorded, asked, tmp_path, monkeypatch):
        stored = recorded()
        problems = GCD.problems(82)
        monkeypatch.setattr(type(GCD), "problems", lambda self, n: problems[2 : n + 2])
        prune(stale(tmp_path / "b", {"tiny"}, {"gcd": GCD}, 80))
        left = load(stored.path)
        assert len(left.records) == 78
        assert read(left.path, left.header.examples) is not None
        assert len(left.select(asked(n=70))) == 70


def test_where_few_fit_they_are_the_commonest_text_of_every_outcome():
    def example(outcome, text, problem):
        return Example(problem=problem, text=text, outcome=outcome, scores={"a": 0.0}, total=0.0)

    outcomes = ("correct", "wrong", "unparsable", "truncated")
    often = [example(o, f"often {o}", f"p{i}") for o in outcomes for i in range(3)]
    rare = [example(o, f"a {i}", f"q{i}") for o in outcomes for i in range(20)]
    line = max(len(_line(e)) + 1 for e in (*often, *rare))
    kept = _chosen([*rare, *often], 5 * line)
    assert {e.text for e in kept} >= {f"often {o}" for o in outcomes}
