"""Problems × policy -> groups of scored completions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from grpo_harness.engines.engine import Progress, Request, Sample, Sampler, sample_seed
from grpo_harness.errors import HarnessError
from grpo_harness.policy.checkpoint import digest
from grpo_harness.policy.policy import Fingerprint, Policy
from grpo_harness.rewards.rule import OUTCOMES, Outcome, outcome, reward_func, strictly_correct
from grpo_harness.store import Store
from grpo_harness.tasks import Problem, TaskType, check_disjoint

RewardFunction = Callable[..., Sequence[float | None]]
"""Scores completions pairwise, ``(prompts, completions, **kwargs)``, as TRL calls it."""

_CHUNK = 512
"""Samples between two writes to the store: what an interruption can cost."""

LOOK = 16
"""Problems between two looks of a run that stops at a decision."""


class EvaluationError(HarnessError):
    """An evaluation that cannot be made: one line with what is wrong and what to do."""


@dataclass(frozen=True)
class Completion:
    """One scored completion.

    ``tokens`` counts the end token. ``strict`` tells whether it is the demanded answer and
    nothing else, whatever the reward's lenient rule lets through. ``reward`` is NaN for a draw
    that failed.
    """

    text: str
    tokens: int
    reward: float
    outcome: Outcome
    strict: bool


@dataclass(frozen=True)
class Group:
    """The completions of one problem."""

    problem: Problem
    completions: tuple[Completion, ...]

    def count(self, outcome: Outcome) -> int:
        """Count the completions of one outcome."""
        return sum(completion.outcome == outcome for completion in self.completions)

    @property
    def group_mean(self) -> float:
        """The mean reward."""
        return fmean(completion.reward for completion in self.completions)

    @property
    def length(self) -> float:
        """The mean length in tokens."""
        return fmean(completion.tokens for completion in self.completions)

    @property
    def log_length(self) -> float:
        """The mean natural logarithm of the length in tokens."""
        # Every drawn completion has a token; a failed draw has none and is an error elsewhere.
        return fmean(math.log(max(completion.tokens, 1)) for completion in self.completions)


@dataclass(frozen=True)
class Evaluation:
    """All that one run knows of one policy on one task type, in the order of the problems.

    ``plan`` names all problems that were planned, ``prompts`` are theirs, as the policy sees them,
    and ``groups`` holds those that were asked: all, but for a run that stopped at a decision.
    ``settings`` are the sampler's and ``reward`` is a digest of the reward: they, ``prompts`` and
    ``fingerprint`` decide what the evaluation can be compared with.
    """

    policy: str
    slug: str
    fingerprint: Fingerprint
    task_type: TaskType
    settings: Mapping[str, Any]
    reward: str
    run_seed: int
    k: int
    plan: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def n(self) -> int:
        """The number of problems that were asked."""
        return len(self.groups)

    @property
    def samples(self) -> list[int]:
        """The number of completions, problem by problem."""
        return [len(group.completions) for group in self.groups]

    def pooled(self, others: Sequence[Evaluation]) -> Evaluation:
        """Return this evaluation with the completions of ``others``, which have the same plan."""
        groups = []
        for i in range(max(evaluation.n for evaluation in (self, *others))):
            of_one = [e.groups[i] for e in (self, *others) if i < e.n]
            together = tuple(c for group in of_one for c in group.completions)
            groups.append(Group(of_one[0].problem, together))
        return replace(self, groups=tuple(groups))

    def counts(self, outcome: Outcome) -> list[int]:
        """Count the completions of one outcome, problem by problem."""
        return [group.count(outcome) for group in self.groups]

    def rate(self, outcome: Outcome) -> float:
        """Return the share of one outcome among all completions."""
        return sum(self.counts(outcome)) / sum(self.samples)

    @property
    def accuracy(self) -> float:
        """The share of correct completions."""
        return self.rate("correct")

    @property
    def strict_accuracy(self) -> float:
        """The share of completions that are the demanded answer and nothing else."""
        strict = sum(completion.strict for group in self.groups for completion in group.completions)
        return strict / sum(self.samples)

    @property
    def mean_reward(self) -> float:
        """The mean reward of all completions."""
        return fmean(group.group_mean for group in self.groups)

    @property
    def mean_length(self) -> float:
        """The mean length in tokens."""
        return fmean(group.length for group in self.groups)

    def summary(self) -> dict[str, Any]:
        """Return every figure of the evaluation as plain numbers."""
        return {
            "policy": self.policy,
            "fingerprint": str(self.fingerprint),
            "task_type": self.task_type.name,
            "n": self.n,
            "planned": len(self.plan),
            "k": self.k,
            "run_seed": self.run_seed,
            "sampling": dict(self.settings),
            "accuracy": self.accuracy,
            "strict_accuracy": self.strict_accuracy,
            "mean_reward": self.mean_reward,
            "mean_length": self.mean_length,
            "outcomes": {name: self.rate(name) for name in OUTCOMES},
        }


def evaluate(
    policy: Policy,
    sampler: Sampler,
    task_type: TaskType,
    *,
    n: int,
    k: int,
    run_seed: int,
    store: Store,
    reward: RewardFunction = reward_func,
    code: str = "",
    until: Callable[[Sequence[Group]], bool] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask ``policy`` the first ``n`` problems of ``task_type``, ``k`` times each, and score.

    Samples that the store has of the same policy, settings, seed and ``code`` are not drawn
    again. With ``until`` the problems are asked `LOOK` at a time, until it says so of the groups
    so far. Raises ``EvaluationError`` when the policy's checkpoint says that it was trained on
    one of the problems, when there are not ``n``, and when the reward returns no finite number
    for a drawn completion.
    """
    try:
        problems = task_type.problems(n)
        check_disjoint(policy.checkpoint.trained_on(), (problem.id for problem in problems))
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    prompts = tuple(policy.render(problem.prompt) for problem in problems)
    settings = sampler.settings()
    identity = {
        "policy": str(policy.fingerprint),
        "settings": settings,
        "dtype": str(policy.dtype),
        "run_seed": run_seed,
        "code": code,
    }
    planned = {
        (problem.id, number): Request(prompt, sample_seed(run_seed, problem.id, number))
        for problem, prompt in zip(problems, prompts, strict=True)
        for number in range(k)
    }
    groups: list[Group] = []
    look = n if until is None else LOOK
    with store.open(f"{policy.checkpoint.slug}-{task_type.name}", identity) as samples:
        while len(groups) < n and not (groups and until is not None and until(groups)):
            asked = problems[len(groups) : len(groups) + look]
            keys = [(problem.id, number) for problem in asked for number in range(k)]
            missing = [key for key in keys if key not in samples]
            if progress is not None:
                progress(len(keys) - len(missing))
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                drawn = sampler.sample([planned[key] for key in chunk], progress)
                samples.add(dict(zip(chunk, drawn, strict=True)))
            groups += _scored(asked, [samples[key] for key in keys], reward)
    return Evaluation(
        policy=policy.name,
        slug=policy.checkpoint.slug,
        fingerprint=policy.fingerprint,
        task_type=task_type,
        settings=settings,
        reward=reward_digest(task_type, reward),
        run_seed=run_seed,
        k=k,
        plan=tuple(problem.id for problem in problems),
        prompts=prompts,
        groups=tuple(groups),
    )


def reward_digest(task_type: TaskType, reward: RewardFunction) -> str:
    """Digest what a reward does on a task type: its scores of right and wrong answers.

    The scores are hashed and not the source, so that a reworded comment changes nothing and a
    changed rule does, wherever in the code it hides.
    """
    prompts, completions = [], []
    for problem in task_type.problems(32):
        right = task_type.canonical(problem.task)
        for text in (
            right,
            f"  {right}\n",
            f"```\n{right}\n```",
            f"```python\n{right}\n```",
            f"答案是 {right}。",
            f"{right} {right}",
            f"'{right}'",
            right.lower(),
            right[::-1],
            f"1{right}",
            "",
            "I know",
            "x" * 300,
        ):
            prompts.append(problem.prompt)
            completions.append(text)
    scores = reward(prompts=prompts, completions=completions)
    return digest(json.dumps([None if score is None else float(score) for score in scores]))


def _scored(
    problems: Sequence[Problem], answers: Sequence[Sample], reward: RewardFunction
) -> list[Group]:
    """Score the answers, the same number for each problem and in the order of the problems."""
    k = len(answers) // len(problems)
    name = problems[0].type
    prompts = [problem.prompt for problem in problems for _ in range(k)]
    scores = reward(prompts=prompts, completions=[answer.text for answer in answers])
    if len(scores) != len(prompts):
        raise EvaluationError(
            f"the reward returned {len(scores)} scores for {len(prompts)} completions of "
            f"{name}: it must return one each, in order"
        )
    completions = []
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        if answer.error is None and (score is None or not math.isfinite(score)):
            raise EvaluationError(
                f"the reward returned {score} for a completion of {name}: it must "
                "return a finite number for every text"
            )
        failed = answer.error is not None or score is None
        completions.append(
            Completion(
                text=answer.text,
                tokens=answer.tokens,
                reward=math.nan if failed or score is None else float(score),
                outcome=outcome(
                    prompt, None if failed else answer.text, truncated=answer.truncated
                ),
                strict=not failed
                and not answer.truncated
                and strictly_correct(prompt, answer.text),
            )
        )
    return [
        Group(problem, tuple(completions[i * k : (i + 1) * k]))
        for i, problem in enumerate(problems)
    ]
