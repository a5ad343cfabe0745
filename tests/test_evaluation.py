import json
import math
import re

import pytest

from grpo_harness.engines.engine import Sample, sample_seed
from grpo_harness.evaluation import EvaluationError, ask, evaluate, rounded
from grpo_harness.policy import load
from grpo_harness.rewards.calls import RewardError
from grpo_harness.rewards.functions import Reward, Rewards
from grpo_harness.rewards.outcome import OUTCOMES
from grpo_harness.rewards.rule import reward_func, rule_reward
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import load_task_type, task_types

GCD = task_types()["gcd"]


class Scripted:
    """An engine whose answers are written down: what the evaluation makes of them is exact."""

    def __init__(self, answer):
        self._answer = answer
        self.requests = []

    def settings(self):
        return {"scripted": True}

    def remarks(self):
        return {}

    def identity(self):
        return {"engine": "scripted"}

    def sample(self, requests, progress=None):
        first = len(self.requests) + 1
        self.requests += requests
        return [self._answer(request, number) for number, request in enumerate(requests, first)]


def right(request, _):
    problem = next(p for p in GCD.problems(64) if p.prompt in request.prompt)
    return Sample(str(problem.answer), 3, truncated=False)


def run(policy, engine, tmp_path, n=6, k=2, reward=reward_func, **options):
    questions = ask(policy, GCD, n, settings=engine.settings(), rewards=Rewards((Reward(reward),)))
    store = Store(tmp_path / FILE)
    return evaluate(questions, engine, k=k, run_seed=1, store=store, **options)


@pytest.mark.parametrize(
    ("sample", "outcome"),
    [
        (Sample("0", 2, truncated=False), "wrong"),
        (Sample("I know", 2, truncated=False), "unparsable"),
        (Sample("", 1, truncated=False), "unparsable"),
        (Sample("1 2 3", 64, truncated=True), "truncated"),
        (Sample("", 0, truncated=False, error="no memory"), "error"),
    ],
)
def test_outcomes(tiny_policy, tmp_path, sample, outcome):
    evaluation = run(tiny_policy, Scripted(lambda *_: sample), tmp_path)
    assert evaluation.rate(outcome) == 1
    assert sum(evaluation.rate(name) for name in OUTCOMES) == 1
    assert evaluation.accuracy == evaluation.strict_accuracy == 0


def test_right_answers_are_correct_and_strictly_so(tiny_policy, tmp_path):
    evaluation = run(tiny_policy, Scripted(right), tmp_path)
    assert evaluation.accuracy == evaluation.strict_accuracy == 1
    assert [group.tally.correct for group in evaluation.groups] == [2] * 6
    assert (evaluation.n, evaluation.k) == (6, 2)


def test_a_right_answer_in_words_is_correct_and_not_strictly(tiny_policy, tmp_path):
    def chatty(request, number):
        sample = right(request, number)
        return Sample(f"It is {sample.text}.", 9, truncated=False)

    evaluation = run(tiny_policy, Scripted(chatty), tmp_path)
    assert (evaluation.accuracy, evaluation.strict_accuracy) == (1, 0)


def test_figures_against_the_plain_formulas(tiny_policy, tmp_path):
    def mixed(request, number):
        return Sample("x" * (number % 5) or "1", number, truncated=number % 4 == 0)

    evaluation = run(tiny_policy, Scripted(mixed), tmp_path)
    completions = [c for group in evaluation.groups for c in group.completions]
    prompts = [g.problem.prompt for g in evaluation.groups for _ in range(2)]
    rewards = [rule_reward(p, c.text) for p, c in zip(prompts, completions, strict=True)]
    assert [c.reward for c in completions] == rewards
    assert evaluation.mean_reward == pytest.approx(sum(rewards) / 12)
    assert evaluation.mean_length == pytest.approx(sum(range(1, 13)) / 12)
    logs = [(math.log(2 * i + 1) + math.log(2 * i + 2)) / 2 for i in range(6)]
    assert [g.tally.mean_log_length for g in evaluation.groups] == pytest.approx(logs)
    assert evaluation.rate("truncated") == 3 / 12


def test_what_is_stored_is_not_drawn_again(tiny_policy, tmp_path):
    first = Scripted(right)
    whole = run(tiny_policy, first, tmp_path, n=4)
    assert len(first.requests) == 8
    more = Scripted(right)
    grown = run(tiny_policy, more, tmp_path, n=6, k=3)
    assert len(more.requests) == 6 * 3 - 8
    assert grown.groups[0].completions[:2] == whole.groups[0].completions


def test_an_interruption_costs_a_chunk_and_not_the_rest(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_harness.evaluation._CHUNK", 4)

    def dies(request, number):
        if number > 8:
            raise KeyboardInterrupt
        return right(request, number)

    with pytest.raises(KeyboardInterrupt):
        run(tiny_policy, Scripted(dies), tmp_path)
    rest = Scripted(right)
    assert run(tiny_policy, rest, tmp_path).accuracy == 1
    assert len(rest.requests) == 4


def test_every_sample_has_its_own_seed(tiny_policy, tmp_path):
    sampler = Scripted(right)
    run(tiny_policy, sampler, tmp_path)
    assert len({request.seed for request in sampler.requests}) == 12


@pytest.mark.parametrize("score", [math.nan, math.inf, "1", [1.0]])
def test_a_reward_without_a_number_is_an_error_and_never_a_zero(tiny_policy, tmp_path, score):
    def reward(completions, **_):
        return [1.0] * (len(completions) - 1) + [score]

    with pytest.raises((EvaluationError, RewardError), match="must return a"):
        run(tiny_policy, Scripted(right), tmp_path, reward=reward)


def test_a_reward_that_raises_ends_it_before_anything_is_drawn(tiny_policy, tmp_path):
    engine = Scripted(right)
    with pytest.raises(RewardError, match=r"gcd: the reward <lambda> .* raised ZeroDivisionError"):
        run(tiny_policy, engine, tmp_path, reward=lambda **_: 1 / 0)
    assert engine.requests == []


@pytest.mark.parametrize("changed", ["prompts", "completions"])
def test_a_reward_that_changes_what_it_is_given_is_named(tiny_policy, tmp_path, changed):
    def greedy(**given):
        scores = reward_func(**given)
        given[changed][:] = ["1"] * len(given[changed])
        return scores

    with pytest.raises(RewardError, match=rf"the reward greedy .* changes the {changed}"):
        run(tiny_policy, Scripted(right), tmp_path, reward=greedy)


def test_what_rewards_log_is_in_the_rows_and_the_summary(tiny_policy, tmp_path):
    def logs(completions, log_extra, log_metric, **_):
        log_extra("read", [{("a", 1): c} if i else c for i, c in enumerate(completions)])
        log_metric("size", len(completions))
        return [1.0] * len(completions)

    evaluation = run(tiny_policy, Scripted(right), tmp_path, reward=logs)
    first, second, *_ = evaluation.rows()
    assert first["logged"] == {"read": first["completion"]}
    assert second["logged"]["read"].startswith("{('a', 1): ")
    n = len(evaluation.completions)
    assert evaluation.summary()["metrics"] == {"size": n}
    json.dumps([first, second, evaluation.summary()])


def own_type(tmp_path, body):
    """A task type of a file of its own, whose methods are those of gcd but for ``body``."""
    path = tmp_path / "own.py"
    path.write_text(
        "from grpo_harness.tasks import TaskType, int_field, read_text\n\n"
        "class Own(TaskType):\n"
        "    name = 'own'\n"
        "    def draw(self, rng): return {'x': rng.randint(1, 9999)}\n"
        "    def statement(self, task): return str(task['x'])\n"
        "    def requirement(self, task): return 'The number.'\n"
        "    def answer(self, task): return str(task['x'])\n"
        "    def read(self, task, text): return read_text(text, self.answer(task))\n" + body
    )
    return load_task_type(str(path))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    def read(self, task, text): return 'wrong'", "is read as wrong"),
        ("    def read(self, task, text): return 1 / 0", "cannot be read (ZeroDivisionError"),
        (
            "    def read(self, task, text): __import__('pytest').skip('x')",
            "cannot be read (Skipped: x)",
        ),
        ("    def canonical(self, task): return 'x' + self.answer(task)", "is read as wrong"),
    ],
)
def test_a_type_whose_own_answer_is_not_correct_is_refused(tiny_policy, tmp_path, body, says):
    with pytest.raises(EvaluationError, match=re.escape(says)):
        ask(tiny_policy, own_type(tmp_path, body), 3, settings={})


@pytest.mark.parametrize(
    "body",
    [
        "    def draw(self, rng): return {'x': '}' + str(rng.random())}",
        "    def draw(self, rng): return {'x': {'y': rng.random()}}\n"
        "    def answer(self, task): return str(task['x']['y'])",
        "    def draw(self, rng): return {'x': rng.random()}\n"
        '    def statement(self, task): return f\'TASK={{"type":"own","x":0}} {task}\'',
        "    def read(self, task, text):\n"
        "        line = text.split('\\n')[-1]\n"
        "        return 'correct' if line == str(task['x']) else 'wrong'",
    ],
)
def test_a_problem_is_read_by_itself_and_a_completion_whole(tiny_policy, tmp_path, body):
    """No task is parsed back out of the prompt, and a type reads more than the first line."""
    own = own_type(tmp_path, body)
    questions = ask(tiny_policy, own, 3, settings={})
    wanted = {p: own.wanted(q) for p, q in zip(questions.prompts, questions.problems, strict=True)}
    lines = "" if "split" not in body else "Let me think.\n"
    engine = Scripted(lambda request, _: Sample(lines + wanted[request.prompt], 2, truncated=False))
    found = evaluate(questions, engine, k=1, run_seed=1, store=Store(tmp_path / FILE))
    assert found.accuracy == 1
    assert all(completion.reward > 0 for completion in found.completions)


def test_a_read_that_raises_on_a_completion_is_named(tiny_policy, tmp_path):
    body = (
        "    def read(self, task, text):\n"
        "        return 'correct' if int(text) == task['x'] else 'wrong'"
    )
    questions = ask(tiny_policy, own_type(tmp_path, body), 3, settings={})
    engine = Scripted(lambda *_: Sample("twelve\n\x1b", 2, truncated=False))
    with pytest.raises(EvaluationError, match=r"'twelve\\n\\x1b' cannot be read \(ValueError"):
        evaluate(questions, engine, k=1, run_seed=1, store=Store(tmp_path / FILE))


@pytest.mark.parametrize("twice", ["", ".2"])
def test_asking_what_was_trained_on_is_an_error(copy, tmp_path, twice):
    leaked = GCD.problems(3)[2].id
    (copy / "problems.txt").write_text(f"gcd-000000000000\n{leaked}{twice}\n")
    policy = load(str(copy))
    with pytest.raises(EvaluationError, match=f"trained on, the first of them '{leaked}'"):
        run(policy, Scripted(right), tmp_path)


def test_a_completion_has_its_number_within_its_problem(measure):
    """Reports and reruns name a sample by it."""
    now = measure(run_seed=3, n=4, k=3)
    for group in now.groups:
        seeds = [sample_seed(3, group.problem.id, number) for number in range(3)]
        assert [c.tokens for c in group.completions] == [1 + seed % 7 for seed in seeds]


def test_a_completion_to_which_no_reward_applies_is_in_no_mean(measure):
    def some(completions, **_):
        return [None if text == "0" else 2.0 for text in completions]

    now = measure(n=8, k=4, reward=some)
    rewards = [c.reward for c in now.completions]
    assert any(map(math.isnan, rewards))
    assert now.mean_reward == 2.0
    for group in now.groups:
        assert group.tally.total == tuple(2.0 for c in group.completions if c.text != "0")


def test_rewards_are_compared_by_six_digits():
    assert [rounded(x) for x in (1 / 3, -12345678.9, 1e-9 / 3)] == [
        0.333333,
        -12345700,
        3.33333e-10,
    ]
