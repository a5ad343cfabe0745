"""The learning test's runs from nano-base: the real one, and the controls that must fail it."""

import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import torch

from grpo_harness.engines.engine import Sampling
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.evaluation import Group, ask, evaluate
from grpo_harness.learning.judge import Answers, Learning, Limits, Trial, ends, judge_learning
from grpo_harness.policy import load
from grpo_harness.policy.policy import quiet
from grpo_harness.rewards.rule import reward_func
from grpo_harness.store import FILE, Store
from grpo_harness.tasks import MATH, PROGRAMMING, task_types
from grpo_harness.training import Recipe, train
from grpo_harness.training import load as load_recipe

TRIALS = 2
"""Runs of one learning test, each with a seed of its own."""

PROBLEMS = 32
"""Held-out problems of each of the six task types."""

SAMPLES = 2
"""Completions per held-out problem in one trial; the base draws as many as all trials."""

LONG_LISTS = (37501, 57962, 72436)
"""Problem seeds whose three problems are to sort nine numbers. nano-base hardly ever solves one, so
within a group only the length penalty differs.
"""

Signal = Callable[[Random, Sequence[Any], list[float]], list[float]]
"""Changes a step's rewards before the trainer sees them: (luck, prompts, rewards)."""


def shuffled(luck: Random, prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Shuffle within each group: the group keeps its mean and spread, but carries no signal."""
    mixed: list[float] = []
    for _, group in itertools.groupby(zip(prompts, rewards, strict=True), key=itemgetter(0)):
        values = [reward for _, reward in group]
        mixed += luck.sample(values, len(values))
    return mixed


def constant(_luck: Random, _prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Give every completion the same reward."""
    return [1.0] * len(rewards)


def negated(_luck: Random, _prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Negate the rewards, like a sign lost in the reward or in the advantage."""
    return [-reward for reward in rewards]


@dataclass(frozen=True)
class Condition:
    """A recipe, and the signal that its trainer gets instead of the rewards.

    Without ``problem_seeds`` every seed has other problems. ``trials`` is the number of runs that
    show that the learning test fails: one if the weights do not move, or move the wrong way,
    because more runs would not change that.
    """

    recipe: Recipe
    signal: Signal = lambda _luck, _prompts, rewards: rewards
    problem_seeds: tuple[int, ...] = ()
    trials: int = TRIALS

    def of(self, seed: int) -> Recipe:
        """Return the recipe for one seed, which decides problems, their order and samples."""
        seeds = self.problem_seeds
        problem_seed = seeds[seed % len(seeds)] if seeds else seed
        return self.recipe.with_values(seed=seed, problem_seed=problem_seed)


_LEARN = load_recipe("learn")

CONDITIONS = {
    "learn": Condition(_LEARN),
    "rate zero": Condition(_LEARN.with_values(learning_rate=0.0), trials=1),
    "shuffled": Condition(_LEARN, shuffled),
    "constant": Condition(_LEARN, constant, trials=1),
    "negated": Condition(_LEARN, negated, trials=1),
    "collapse": Condition(
        load_recipe("collapse").with_values(
            n_math=0,
            n_prog=3,
            per_device_train_batch_size=24,
            max_steps=12,
            beta=_LEARN.values["beta"],
        ),
        problem_seeds=LONG_LISTS,
        trials=len(LONG_LISTS),
    ),
}
"""The learning test's own runs, and the controls: each of these must fail the same test."""


def trial(condition: str, seed: int, device: str = "auto") -> Trial:
    """Train by a condition's recipe, and test the trained policy on held-out problems.

    The gain is measured by the rule reward, whatever signal the trainer got.
    """
    chosen = CONDITIONS[condition]
    luck = Random(f"{condition} {seed}")
    steps: list[list[tuple[str, float]]] = []

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        rewards = reward_func(prompts, completions)
        steps.append(list(zip(prompts, rewards, strict=True)))
        return chosen.signal(luck, prompts, rewards)

    with tempfile.TemporaryDirectory() as folder, quiet():
        run = train(chosen.of(seed), Path(folder) / "trained", device=device, reward=reward)
        if len(steps) != len(run.log):
            raise ValueError(f"{len(steps)} batches were scored in {len(run.log)} steps")
        first, last = ends(steps)
        answers = held_out(str(run.path), seed, SAMPLES, device)
    return Trial(seed, run.log, tuple(first), tuple(last), answers)


def held_out(policy: str, seed: int, k: int, device: str = "auto") -> Answers:
    """Draw ``k`` completions of every held-out problem, with the sampling of the training."""
    asked = load(policy)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=48)
    with (
        tempfile.TemporaryDirectory() as folder,
        TransformersEngine(asked, sampling, device=device, dtype="float32") as engine,
    ):
        groups: list[Group] = []
        for name in (MATH, *PROGRAMMING):
            questions = ask(asked, task_types()[name], PROBLEMS, settings=engine.settings())
            store = Store(Path(folder) / FILE)
            groups += evaluate(questions, engine, k=k, run_seed=seed, store=store).groups
    return tuple(group.tally for group in groups)


def base_answers(seed: int, device: str = "auto") -> Answers:
    """Return nano-base's results, with as many completions as all trials of a test."""
    # A negative seed, so that no draw is shared with a trial.
    return held_out(_LEARN.policy, -1 - seed, TRIALS * SAMPLES, device)


class Laboratory:
    """Trials of several conditions, started ahead in processes of their own."""

    def __init__(self, pool: ProcessPoolExecutor, conditions: Sequence[str], seeds: Sequence[int]):
        self._before: Future[Answers] = pool.submit(base_answers, seeds[0])
        self._trials = {
            name: [pool.submit(trial, name, seed) for seed in seeds[: CONDITIONS[name].trials]]
            for name in conditions
        }

    def judge(self, condition: str, limits: Limits | None = None) -> Learning:
        """Wait for a condition's trials and judge them. Raises what a trial raised."""
        trials = [future.result() for future in self._trials[condition]]
        return judge_learning(trials, self._before.result(), limits or Limits())


@contextmanager
def laboratory(
    conditions: Sequence[str] = tuple(CONDITIONS),
    seeds: Sequence[int] = tuple(range(len(LONG_LISTS))),
    processes: int = 2,
) -> Iterator[Laboratory]:
    """Start trials, ``processes`` at a time, one thread each; cancel the rest at the end.

    Meanwhile torch leaves them their cores in this process too: with more threads than cores, the
    training suite took 186 s on two cores instead of 110.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - processes))
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )
    try:
        yield Laboratory(pool, conditions, seeds)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
