"""The learning test's runs from nano-base: the real one, and the controls that must fail it.

``python -m harness.nano.learn --tests 20 --out FOLDER`` puts the test itself to the test: it runs
it and each control for as many seeds and writes ``LEARNING.md``. What is finished is kept in
``trials.jsonl``, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import torch

from harness.evaluation import evaluate
from harness.learning import Answers, Learning, Limits, Trial, ends, judge_learning, late
from harness.policy import load, quiet
from harness.recipes import RECIPES, Recipe
from harness.reward import reward_func
from harness.sampling import Sampling
from harness.sampling.transformers import TransformersSampler
from harness.store import Store
from harness.tasks import MATH, PROGRAMMING, task_types
from harness.training import train

TRIALS = 3
"""Runs that one learning test rests on."""

PROBLEMS = 32
"""Held-out problems of each of the six task types."""

SAMPLES = 2
"""Completions of each held-out problem in one trial; the base answers as often as all trials."""

LONG_LISTS = (37501, 57962, 72436)
"""Problem seeds whose three problems are lists of nine numbers to sort: nano-base hardly ever
gets one right, so within a group only the length penalty differs.
"""

Signal = Callable[[Random, Sequence[Any], list[float]], list[float]]
"""What becomes of a step's rewards before the trainer sees them: (luck, prompts, rewards)."""


def as_it_is(_luck: Random, _prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Leave the rewards alone."""
    return rewards


def shuffled(luck: Random, prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Shuffle within each group: every group keeps its mean and spread, and nothing else."""
    mixed: list[float] = []
    for _, group in itertools.groupby(zip(prompts, rewards, strict=True), key=itemgetter(0)):
        values = [reward for _, reward in group]
        mixed += luck.sample(values, len(values))
    return mixed


def constant(_luck: Random, _prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Give every completion the same."""
    return [1.0] * len(rewards)


def negated(_luck: Random, _prompts: Sequence[Any], rewards: list[float]) -> list[float]:
    """Reward what is wrong: a sign lost in the reward or in the advantage."""
    return [-reward for reward in rewards]


@dataclass(frozen=True)
class Condition:
    """A recipe and what its trainer is told. Without ``problem_seeds`` every seed asks others."""

    recipe: Recipe
    signal: Signal = as_it_is
    problem_seeds: tuple[int, ...] = ()

    def of(self, seed: int) -> Recipe:
        """Return the recipe of one seed: its problems, their order and its samples."""
        seeds = self.problem_seeds
        problem_seed = seeds[seed % len(seeds)] if seeds else seed
        return dataclasses.replace(self.recipe, seed=seed, problem_seed=problem_seed)


_LEARN = RECIPES["learn"]

CONDITIONS = {
    "learn": Condition(_LEARN),
    "rate zero": Condition(dataclasses.replace(_LEARN, learning_rate=0.0)),
    "shuffled": Condition(_LEARN, shuffled),
    "constant": Condition(_LEARN, constant),
    "negated": Condition(_LEARN, negated),
    "collapse": Condition(
        dataclasses.replace(
            RECIPES["collapse"], n_math=0, n_prog=3, prompts_per_step=3, steps=12, beta=_LEARN.beta
        ),
        problem_seeds=LONG_LISTS,
    ),
}
"""The learning test's own runs, and the controls: each of these must fail the same test."""


def trial(condition: str, seed: int, device: str = "auto") -> Trial:
    """Train by a condition's recipe, and let the policy that comes out answer held-out problems.

    The gain is measured by the rule reward, whatever the trainer was told.
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
    """Let a policy answer the held-out problems ``k`` times each, as sampled in training."""
    loaded = load(policy, device=device, dtype="float32")
    sampler = TransformersSampler(loaded, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=48))
    with tempfile.TemporaryDirectory() as folder:
        groups = [
            group
            for name in (MATH, *PROGRAMMING)
            for group in evaluate(
                loaded,
                sampler,
                task_types()[name],
                n=PROBLEMS,
                k=k,
                run_seed=seed,
                store=Store(Path(folder)),
            ).groups
        ]
    correct = tuple(group.count("correct") for group in groups)
    return Answers(correct, tuple(group.log_length for group in groups), k)


def base_answers(seed: int, device: str = "auto") -> Answers:
    """What nano-base answers, as often as all trials of a test together."""
    # Minus: no draw is shared with a trial's.
    return held_out(_LEARN.policy, -1 - seed, TRIALS * SAMPLES, device)


class Laboratory:
    """Trials of several conditions, run ahead of the questions in processes of their own."""

    def __init__(self, pool: ProcessPoolExecutor, conditions: Sequence[str], seeds: Sequence[int]):
        self._before: Future[Answers] = pool.submit(base_answers, seeds[0])
        self._trials = {
            name: [pool.submit(trial, name, seed) for seed in seeds] for name in conditions
        }

    def judge(self, condition: str, limits: Limits | None = None) -> Learning:
        """Wait for a condition's trials and judge them. Raises what a trial raised."""
        trials = [future.result() for future in self._trials[condition]]
        return judge_learning(trials, self._before.result(), limits or Limits())


@contextmanager
def laboratory(
    conditions: Sequence[str] = tuple(CONDITIONS),
    seeds: Sequence[int] = tuple(range(TRIALS)),
    processes: int = 2,
) -> Iterator[Laboratory]:
    """Start trials, ``processes`` at a time, each on one thread; stop what nobody waited for.

    The matrices are so small that two processes are nearly twice as fast as two threads.
    """
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )
    try:
        yield Laboratory(pool, conditions, seeds)
    finally:
        pool.shutdown(cancel_futures=True)


class Ledger:
    """Trials and the base's answers, in a JSON Lines file that only grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trials: dict[tuple[str, int], Trial] = {}
        self._before: dict[int, Answers] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            self._read(json.loads(line))

    def _read(self, entry: dict[str, Any]) -> None:
        value = entry["value"]
        if entry["condition"] == "base":
            self._before[entry["seed"]] = _answers(value)
        else:
            self._trials[entry["condition"], entry["seed"]] = Trial(
                value["seed"],
                tuple(value["log"]),
                tuple(value["first"]),
                tuple(value["last"]),
                _answers(value["answers"]),
            )

    def make(self, condition: str, seed: int, device: str) -> bool:
        """Run one trial, or let the base answer (``base``), unless that was done already."""
        if (condition, seed) in self._trials or (condition == "base" and seed in self._before):
            return False
        found = (
            base_answers(seed, device) if condition == "base" else trial(condition, seed, device)
        )
        entry = {"condition": condition, "seed": seed, "value": dataclasses.asdict(found)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._read(json.loads(json.dumps(entry)))
        return True

    def trials(self, condition: str) -> list[Trial]:
        """Return a condition's finished trials."""
        return [trial for (name, _), trial in self._trials.items() if name == condition]

    def test(self, condition: str, number: int) -> tuple[list[Trial], Answers] | None:
        """Return what one learning test is judged by, or ``None`` if it is not finished."""
        seeds = _seeds(number)
        if seeds[0] not in self._before or any((condition, s) not in self._trials for s in seeds):
            return None
        return [self._trials[condition, seed] for seed in seeds], self._before[seeds[0]]


def _seeds(number: int) -> range:
    """The seeds of a learning test: no two tests share one."""
    return range(number * TRIALS, (number + 1) * TRIALS)


def _answers(value: dict[str, Any]) -> Answers:
    return Answers(tuple(value["correct"]), tuple(value["log_length"]), value["k"])


def make_table(out: Path, tests: int, device: str) -> None:
    """Run what is missing of ``tests`` learning tests of every condition, and write the table."""
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out / "trials.jsonl")
    # Test by test, so that every condition has as many whenever it is stopped.
    for number, name in itertools.product(range(tests), CONDITIONS):
        first, *_ = seeds = _seeds(number)
        made = [ledger.make("base", first, device), *(ledger.make(name, s, device) for s in seeds)]
        if any(made) and (found := ledger.test(name, number)):
            verdict = judge_learning(*found)
            _say(f"{name}, test {number}: {verdict.name}: {verdict.reason}")
            write_table(ledger, tests, out / "LEARNING.md")
    write_table(ledger, tests, out / "LEARNING.md")


_HEAD = """\
# The learning test, tested

{tests} learning tests of each condition, each of {trials} runs with seeds of their own (so each on
problems of its own), judged by `harness.learning.judge_learning`: `learn` must pass, every control
must fail. Made by `python -m harness.nano.learn --tests {tests} --out FOLDER`, which also goes on
where it was stopped.

Gain: mean reward of the last fifth of the steps less that of the first, by the rule reward,
whatever the trainer was told; its lower bound is at {confidence:.0%} and must exceed {gain}.
Accuracy: of held-out answers, before and after, in points; it must be proven better. Length: the
ratio of geometric mean lengths in tokens, after over before; at least {length}.
"""


def write_table(ledger: Ledger, tests: int, path: Path) -> None:
    """Write what the tests that are finished have found, by the limits of today."""
    limits = Limits()
    parts = [
        _HEAD.format(
            tests=tests,
            trials=TRIALS,
            confidence=limits.confidence,
            gain=limits.gain,
            length=limits.length,
        )
    ]
    found = {
        name: {n: judge_learning(*test) for n in range(tests) if (test := ledger.test(name, n))}
        for name in CONDITIONS
    }
    parts.append("| condition | tests | passed | failed | criteria broken |\n|---|---|---|---|---|")
    for name, learnings in found.items():
        broken = Counter(criterion for x in learnings.values() for criterion in x.broken)
        failed = sum(x.name == "FAIL" for x in learnings.values())
        parts.append(
            f"| {name} | {len(learnings)} | {len(learnings) - failed} | {failed} "
            f"| {', '.join(f'{key} {times}' for key, times in broken.most_common())} |"
        )
    parts.append("\n## Figures\n\nLeast and greatest of the means over the last fifth of a run.\n")
    parts.append("| figure | limits | " + " | ".join(CONDITIONS) + " |")
    parts.append("|---" * (2 + len(CONDITIONS)) + "|")
    for figure, least, most in limits.bands():
        cells = []
        for name in CONDITIONS:
            values = [late(trial, figure) for trial in ledger.trials(name)]
            cells.append(f"{min(values):.3f} to {max(values):.3f}" if values else "")
        parts.append(f"| {figure} | {least:g} to {most:g} | {' | '.join(cells)} |")
    for name, learnings in found.items():
        parts.append(
            f"\n## {name}\n\n| seeds | gain | at least | accuracy | Δ | length | verdict | broken |"
            "\n|---|---|---|---|---|---|---|---|"
        )
        for number, x in learnings.items():
            seeds = _seeds(number)
            parts.append(
                f"| {seeds[0]}–{seeds[-1]} | {x.gain.estimate.mean:+.3f} | {x.lower:+.3f} "
                f"| {x.accuracy.then:.1%} → {x.accuracy.now:.1%} | {100 * x.accuracy.delta:+.1f} "
                f"| {x.length:.2f} | {x.name} | {', '.join(x.broken)} |"
            )
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and make the table."""
    parser = argparse.ArgumentParser(prog="python -m harness.nano.learn", description=__doc__)
    parser.add_argument("--tests", type=int, default=20, help="learning tests of each condition")
    parser.add_argument("--out", type=Path, required=True, help="where to, or where to go on")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    make_table(arguments.out, arguments.tests, arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
