"""Does the engine draw correctly: each row from its own seed, and from nothing else?

In other suites, a fault in the draws would look like a policy that changed.
"""

import json
import random
from itertools import combinations

import pytest

from grpo_harness.engines.engine import Request, Sampling, sample_seed
from grpo_harness.rewards.functions import Batch
from grpo_harness.tasks import task_types

AGAIN = 16
"""Problems that are drawn once more with another run's seed."""

RESCORED = 64
"""Completions that are scored once more, each by itself."""


def test_the_seed_is_the_runs(grpo_session, pytestconfig):
    """The run's seed is the one that it was started with, in every worker of pytest-xdist."""
    given = getattr(pytestconfig, "workerinput", {}).get("grpo-harness")
    asked = pytestconfig.getoption("grpo_seed") if given is None else given
    assert asked in (None, grpo_session.run_seed), (
        f"the run was started with seed {asked} and draws with {grpo_session.run_seed}"
    )


def test_every_sample_has_a_seed_of_its_own(task_type):
    """Seeds differ by run, problem and number, and are the same every time."""
    problems = [problem.id for problem in task_type.problems(64)]
    parts = [(run, problem, k) for run in (0, 1, 2) for problem in problems for k in range(4)]
    seeds = [sample_seed(*part) for part in parts]
    for part, name in enumerate(("run's seed", "problem", "number of the sample")):
        without = {key[:part] + key[part + 1 :] for key in parts}
        assert len(set(seeds)) > len(without), (
            f"{len(parts)} samples have {len(set(seeds))} seeds: the {name} does not decide them"
        )
    assert len(set(seeds)) == len(seeds), "two samples share a seed"
    assert seeds == [sample_seed(*part) for part in parts], "a seed is another one each time"


def test_another_run_draws_others(evaluation, grpo_session):
    """With another run's seed the same problems get other completions: a rerun is new evidence.

    This includes the store, which must not give one run's samples to another.
    """
    if grpo_session.settings.sampling.greedy:
        pytest.skip("greedy decoding has one answer, whatever the seed")
    again = grpo_session.again(evaluation, evaluation.run_seed + 1, AGAIN)
    pairs = [
        (a.text, b.text)
        for ours, theirs in zip(evaluation.groups, again.groups, strict=False)
        for a, b in zip(ours.completions, theirs.completions, strict=False)
    ]
    varied = any(len({c.text for c in group.completions}) > 1 for group in evaluation.groups)
    # A policy that draws the same completion each time would do so for every seed.
    assert not varied or any(a != b for a, b in pairs), (
        f"{len(pairs)} completions of {AGAIN} problems are the same with seed "
        f"{evaluation.run_seed} and with {again.run_seed}: the run's seed does not reach the "
        "draws, or the store gives one run's samples to another"
    )


def test_the_samples_of_a_problem_differ(evaluation, baseline):
    """Samples differ on problems where only some of the baseline's completions were correct."""
    records = [baseline.records[group.problem.id] for group in evaluation.groups]
    rates = [record.correct / record.k for record in records]
    # The expected number of problems with one of two samples correct and the other wrong. If it
    # is 20, no such problem is found once in 5e8 runs.
    expected = sum(2 * rate * (1 - rate) for rate in rates)
    for one, two in combinations(range(evaluation.k), 2):
        pairs = [(group.completions[one], group.completions[two]) for group in evaluation.groups]
        same = sum(a.text == b.text for a, b in pairs)
        assert expected < 20 or any(a.outcome != b.outcome for a, b in pairs), (
            f"samples {one} and {two} have the same outcome in all of {len(pairs)} problems "
            f"({same} times the same text), and by the baseline they should differ in some "
            f"{expected:.0f}: they are drawn with one seed, or greedily"
        )


def test_an_answer_does_not_depend_on_its_batch(engine, policy):
    """A request gets the same completion alone, in any batch and in another order.

    In full precision, except for numerical ties. In half precision the numbers of a batch do depend
    on its shape, and one token in some tens differs: there only the first character is compared.
    """
    problems = [p for name in task_types() for p in task_types()[name].problems(4)]
    requests = [
        Request(policy.render(problem.prompt), sample_seed(7, problem.id, number))
        for problem in problems
        for number in range(2)
    ]
    alone = [engine.sample([request], None)[0] for request in requests]
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = engine.sample([requests[i] for i in order], None)
    others = {
        "together": engine.sample(requests, None),
        "in another order": [shuffled[order.index(i)] for i in range(len(requests))],
        "seven at a time": [
            sample
            for start in range(0, len(requests), 7)
            for sample in engine.sample(requests[start : start + 7], None)
        ],
    }
    full = engine.identity().get("dtype", "float32") == "float32"
    least = 0.97 if full else 0.85
    for how, samples in others.items():
        same = [
            a == b if full else a.text[:1] == b.text[:1]
            for a, b in zip(alone, samples, strict=True)
        ]
        assert sum(same) >= least * len(same), (
            f"{policy.name}: of {len(same)} requests {len(same) - sum(same)} have another answer "
            f"{how} than alone, such as {alone[same.index(False)].text[:40]!r} and "
            f"{samples[same.index(False)].text[:40]!r}: an answer depends on its batch (padding "
            "side, attention mask or positions)"
        )


def test_rewards_belong_to_their_completions(evaluation):
    """Some completions, each scored again by itself, get the rewards that they had."""
    questions = evaluation.questions
    scored = [(g.problem, c) for g in evaluation.groups for c in g.completions]
    chosen = random.Random(evaluation.run_seed).sample(scored, min(RESCORED, len(scored)))
    for problem, completion in chosen:
        batch = Batch.of(questions.task_type, [problem], [completion.text], [completion.ids])
        (again,) = questions.rewards.score(batch, problem.id)
        assert again == completion.rewards, (
            f"{problem.id}: the completion {completion.text[:80]!r} has rewards "
            f"{completion.rewards}, and scored by itself {again}: rewards are given to other "
            "completions than they belong to, or depend on the company"
        )


@pytest.fixture(scope="module")
def two_ended(tmp_path_factory):
    """A policy with a second end token, whose tokenizer adds a begin token to every text."""
    from grpo_harness.contract.policies import two_ended
    from grpo_harness.policy import load

    return load(two_ended(tmp_path_factory.mktemp("policies") / "two-ended"))


def test_a_prompt_begins_once_and_any_end_token_ends_it(two_ended, grpo_session):
    """The model reads exactly what the chat template wrote, and any end token ends a completion."""
    import torch

    prompts = [p.prompt for p in task_types()["math"].problems(32)]
    rendered = [two_ended.render(prompt) for prompt in prompts]
    engine, weights = grpo_session.engine(two_ended), grpo_session.local(two_ended)
    greedy = engine.drawing(Sampling(greedy=True, max_new_tokens=8))
    with weights, torch.inference_mode():
        samples = grpo_session.sample(two_ended, prompts)
        drawn = greedy.sample([Request(text, 0) for text in rendered], None)
        likeliest, whole = [], two_ended.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        for ids, sample in zip(whole, drawn, strict=True):
            read = torch.tensor([[*ids, *sample.ids]], device=weights.model.device)
            logits = weights.model(read).logits[0, len(ids) - 1 : -1]
            likeliest.append(logits.argmax(-1).tolist())
    same = sum(list(s.ids) == tokens for s, tokens in zip(drawn, likeliest, strict=True))
    least = 0.97 if engine.identity().get("dtype", "float32") == "float32" else 0.85
    assert same >= least * len(drawn), (
        "the model reads another prompt than the chat template wrote: of "
        f"{len(drawn)} greedy completions only {same} are its likeliest tokens"
    )
    generation = json.loads((two_ended.checkpoint.path / "generation_config.json").read_text())
    for end in generation["eos_token_id"]:
        text = two_ended.tokenizer.decode([end])
        assert not any(text in sample.text for sample in samples), (
            f"an answer goes on behind {text!r}, which is an end token of the policy"
        )
    assert any(not sample.truncated for sample in samples)
