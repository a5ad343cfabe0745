"""Problems × policy -> groups of scored completions."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from statistics import fmean
from types import MappingProxyType
from typing import Any, Self

from grpo_harness.engines.engine import Engine, EngineError, Progress, Request, Sample, sample_seed
from grpo_harness.errors import HarnessError, user_code
from grpo_harness.policy import SYSTEM_MESSAGE, Fingerprint, Policy
from grpo_harness.rewards.functions import Batch, Log, Reward, Rewards, Scores
from grpo_harness.rewards.outcome import OUTCOMES, Outcome, check_answers, outcome, strictly_correct
from grpo_harness.rewards.rule import reward_func
from grpo_harness.rewards.trials import rewards_digest
from grpo_harness.store import Key, Store, StoreError
from grpo_harness.tasks import Problem, Source, check_disjoint
from grpo_harness.text import escape, one_line, shown

_CHUNK = 512
"""Samples between two writes to the store: at most these are lost by an interruption.

An engine that has workers may take more at once (``at_once``).
"""


RULE = Rewards((Reward(reward_func),))
"""The rule reward alone."""


class EvaluationError(HarnessError):
    """An evaluation is not possible. One line: what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The numbers of one problem that a rule compares.

    ``correct``, ``truncated`` and ``unparsable`` are counts among the ``k`` completions, and
    ``lenient`` is that of the correct ones that are not exactly the answer;
    ``mean_log_length`` is the mean natural logarithm of their lengths in tokens. ``total`` has the
    total rewards of those completions that have one, and ``rewards`` those of each function, if
    there are several; all are rounded (`rounded`).
    """

    k: int
    correct: int
    truncated: int
    unparsable: int
    mean_log_length: float
    total: tuple[float, ...] = ()
    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lenient: int = 0


@dataclass(frozen=True)
class Completion:
    """One scored completion.

    ``tokens`` includes the end token. ``strict`` tells whether the text is exactly the required
    answer and nothing else; the reward is more lenient. ``reward`` is the total, and ``rewards``
    has those of the single functions; it is NaN for a draw that failed, and if none applies.
    ``ids`` are the token ids, if the engine told them. ``extra`` and ``metrics`` are what the
    rewards log: values of the completion, and numbers of its batch.
    """

    text: str
    tokens: int
    reward: float
    outcome: Outcome
    strict: bool
    rewards: Scores = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The completions of one problem."""

    problem: Problem
    completions: tuple[Completion, ...]

    def count(self, outcome: Outcome) -> int:
        """Count the completions of one outcome."""
        return sum(completion.outcome == outcome for completion in self.completions)

    @property
    def tally(self) -> Tally:
        """The numbers that rules compare."""
        # A drawn completion has at least one token; a failed draw is an error elsewhere.
        logs = [math.log(max(completion.tokens, 1)) for completion in self.completions]
        scores = self.completions[0].rewards
        names = list(scores) if len(scores) > 1 else []
        return Tally(
            k=len(logs),
            correct=self.count("correct"),
            truncated=self.count("truncated"),
            unparsable=self.count("unparsable"),
            mean_log_length=fmean(logs),
            total=_applied(completion.reward for completion in self.completions),
            rewards={name: _applied(c.rewards[name] for c in self.completions) for name in names},
            lenient=sum(c.outcome == "correct" and not c.strict for c in self.completions),
        )


def rounded(reward: float) -> float:
    """Round a reward to six significant digits: recorded and measured ones are compared."""
    return float(f"{reward:.6g}")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a text or a number as it is, and else its repr."""
    plain = value is None or isinstance(value, str | int)
    return value if plain or (isinstance(value, float) and math.isfinite(value)) else shown(value)


def _applied(rewards: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(rounded(r) for r in rewards if r is not None and not math.isnan(r))


@dataclass(frozen=True)
class Questions:
    """What a policy is asked on a task type, and everything that must be equal for a comparison.

    ``prompts`` are those of ``problems``, as the policy sees them. ``settings`` are the engine's,
    and ``reward`` is a digest of ``rewards``. ``bounds`` are those of the gate, as a baseline
    stores them.
    """

    policy: Policy
    task_type: Source
    settings: Mapping[str, Any]
    reward: str
    problems: tuple[Problem, ...]
    prompts: tuple[str, ...]
    rewards: Rewards = RULE
    bounds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> Fingerprint:
        """The policy's fingerprint."""
        return self.policy.fingerprint

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the problems, in order."""
        return [problem.id for problem in self.problems]

    @property
    def judges_answers(self) -> bool:
        """Tell whether a completion can be correct."""
        return self.rewards.judge_answers(self.task_type)

    def first(self, n: int) -> Self:
        """Return the first ``n`` questions."""
        return self.part(0, n)

    def part(self, start: int, stop: int) -> Self:
        """Return the questions from number ``start``, from 0, to before ``stop``."""
        return replace(self, problems=self.problems[start:stop], prompts=self.prompts[start:stop])

    def content(self, i: int) -> str:
        """Return a digest of what problem ``i`` has beside its prompt, or an empty text."""
        return self.task_type.content(self.problems[i])


@dataclass(frozen=True)
class Evaluation:
    """The results of one run for one policy and task type, in the order of the problems.

    ``groups`` holds the problems that were asked: all that were planned, unless a sequential run
    stopped early. ``engine`` is the identity of the engine. ``drawn`` completions were drawn in
    ``seconds``; all others were stored.
    """

    questions: Questions
    engine: Mapping[str, Any]
    run_seed: int
    k: int
    groups: tuple[Group, ...]
    drawn: int = 0
    seconds: float = 0.0

    @property
    def policy(self) -> str:
        """The policy's name, as the user gave it."""
        return self.questions.policy.name

    @property
    def task(self) -> str:
        """The name of the task type."""
        return self.questions.task_type.name

    @property
    def fingerprint(self) -> Fingerprint:
        """The policy's fingerprint."""
        return self.questions.fingerprint

    @property
    def n(self) -> int:
        """The number of problems that were asked."""
        return len(self.groups)

    @property
    def planned(self) -> int:
        """The number of problems that were planned."""
        return len(self.questions.problems)

    def pooled(self, others: Sequence[Self]) -> Self:
        """Return this evaluation with the completions of ``others``, of the same questions."""
        groups = []
        for i in range(max(evaluation.n for evaluation in (self, *others))):
            of_one = [e.groups[i] for e in (self, *others) if i < e.n]
            together = tuple(c for group in of_one for c in group.completions)
            groups.append(Group(of_one[0].problem, together))
        return replace(self, groups=tuple(groups))

    @property
    def completions(self) -> list[Completion]:
        """All completions, group after group."""
        return [completion for group in self.groups for completion in group.completions]

    def rate(self, outcome: Outcome) -> float:
        """Return the share of one outcome among all completions."""
        return fmean(completion.outcome == outcome for completion in self.completions)

    @property
    def accuracy(self) -> float:
        """The share of correct completions."""
        return self.rate("correct")

    @property
    def strict_accuracy(self) -> float:
        """The share of completions that are exactly the required answer and nothing else."""
        return fmean(completion.strict for completion in self.completions)

    @property
    def mean_reward(self) -> float:
        """The mean reward of all completions."""
        applied = [c.reward for c in self.completions if not math.isnan(c.reward)]
        return fmean(applied) if applied else math.nan

    @property
    def mean_length(self) -> float:
        """The mean length in tokens."""
        return fmean(completion.tokens for completion in self.completions)

    @property
    def metrics(self) -> dict[str, float]:
        """The means of the numbers that the rewards log."""
        names = sorted({name for c in self.completions for name in c.metrics})
        return {n: fmean(c.metrics[n] for c in self.completions if n in c.metrics) for n in names}

    def summary(self) -> dict[str, Any]:
        """Return every figure of the evaluation as plain numbers."""
        return {
            "policy": self.policy,
            "slug": self.questions.policy.slug,
            "fingerprint": str(self.fingerprint),
            "task_type": self.task,
            "n": self.n,
            "planned": self.planned,
            "k": self.k,
            "run_seed": self.run_seed,
            "sampling": dict(self.questions.settings),
            "engine": dict(self.engine),
            "accuracy": self.accuracy if self.questions.judges_answers else None,
            "strict_accuracy": self.strict_accuracy if self.questions.task_type.reads else None,
            "mean_reward": self.mean_reward,
            "mean_length": self.mean_length,
            "metrics": self.metrics,
            "outcomes": {name: self.rate(name) for name in OUTCOMES},
            "slices": [part.figures(of) for of, part in self.slices()],
        }

    def figures(self, of: str) -> dict[str, Any]:
        """Return the figures of a slice."""
        accuracy = self.accuracy if self.questions.judges_answers else None
        return {"of": of, "n": self.n, "accuracy": accuracy, "mean_reward": self.mean_reward}

    def slices(self) -> Iterator[tuple[str, Self]]:
        """Yield the evaluation on the problems of each value of the columns that are slices."""
        for column in self.questions.task_type.slices:
            values = sorted({str(group.problem.task[column]) for group in self.groups})
            for value in values:
                pairs = zip(self.questions.problems, self.questions.prompts, strict=True)
                asked = [pair for pair in pairs if str(pair[0].task[column]) == value]
                problems, prompts = (tuple(part) for part in zip(*asked, strict=True))
                questions = replace(self.questions, problems=problems, prompts=prompts)
                own = tuple(g for g in self.groups if str(g.problem.task[column]) == value)
                yield f"{column}={value}", replace(self, questions=questions, groups=own)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every completion as plain texts and numbers, with its problem."""
        for group, prompt in zip(self.groups, self.questions.prompts, strict=False):
            for number, completion in enumerate(group.completions):
                yield {
                    "policy": self.policy,
                    "task_type": self.task,
                    "problem": group.problem.id,
                    "sample": number,
                    "prompt": prompt,
                    "wanted": self.questions.task_type.wanted(group.problem),
                    "completion": completion.text,
                    "tokens": completion.tokens,
                    "outcome": completion.outcome,
                    "strict": completion.strict,
                    "reward": None if math.isnan(completion.reward) else completion.reward,
                    "rewards": dict(completion.rewards),
                    "logged": {name: _plain(value) for name, value in completion.extra.items()},
                }


def ask(
    policy: Policy,
    task_type: Source,
    n: int,
    *,
    settings: Mapping[str, Any],
    rewards: Rewards = RULE,
    system: str | None = SYSTEM_MESSAGE,
    template: Mapping[str, Any] = MappingProxyType({}),
    bounds: Mapping[str, Any] = MappingProxyType({}),
    digest: Callable[[Rewards, Source], str] = rewards_digest,
) -> Questions:
    """Render the first ``n`` problems of ``task_type`` for ``policy``, and test the scoring.

    Nothing is drawn. ``system`` is the system message, if not empty, ``template`` has further
    variables of the chat template, ``bounds`` are those of the gate, and ``digest`` digests what
    rewards do on a source. Raises ``EvaluationError``
    when there are not ``n`` problems, when the policy's checkpoint says that it was trained on one
    of them, and when a problem's true answer is not read as correct; ``PolicyError`` when the chat
    template cannot be applied, and ``RewardError`` when the reward cannot score completions of this
    type.
    """
    try:
        problems = tuple(task_type.problems(n))
        check_disjoint(policy.checkpoint.trained_on(), (problem.id for problem in problems))
        check_answers(task_type, problems)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    return Questions(
        policy=policy,
        task_type=task_type,
        settings=settings,
        reward=digest(rewards, task_type),
        problems=problems,
        prompts=tuple(_rendered(policy, task_type, p, system, template) for p in problems),
        rewards=rewards,
        bounds=bounds,
    )


def evaluate(
    questions: Questions,
    engine: Engine,
    *,
    k: int,
    run_seed: int,
    store: Store,
    code: str = "",
    until: Callable[[Sequence[Group]], bool] | None = None,
    look: int = 16,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw ``k`` completions of every problem of ``questions``, and score them.

    Stored samples of the same policy, settings, engine, seed, prompt and ``code`` are reused; if
    the store is one that draws none, they are all there is. With ``until``, ``look`` problems are
    asked at a time, until it returns true for the groups so far. Raises ``EvaluationError`` and
    ``RewardError`` when a drawn completion cannot be scored, ``StoreError``, and what the engine
    raises.
    """
    problems, policy = questions.problems, questions.policy
    identity = {
        "policy": str(policy.fingerprint),
        "settings": dict(questions.settings),
        "engine": {"class": _class(engine), **engine.identity()},
        "run_seed": run_seed,
        "code": code,
    }
    planned = [
        (
            Key.of(problem.id, prompt, number),
            Request(prompt, sample_seed(run_seed, problem.id, number)),
        )
        for problem, prompt in zip(problems, questions.prompts, strict=True)
        for number in range(k)
    ]
    groups: list[Group] = []
    count, seconds = 0, 0.0
    step = len(problems) if until is None else look
    with store.open(policy.slug, questions.task_type.name, what=identity) as samples:
        while len(groups) < len(problems) and not (groups and until is not None and until(groups)):
            asked = problems[len(groups) : len(groups) + step]
            part = planned[len(groups) * k : (len(groups) + step) * k]
            missing = [(key, request) for key, request in part if key not in samples]
            if missing and store.draws == "none":
                raise _not_stored(questions, run_seed, len(missing), len(part), store)
            if progress is not None:
                progress(len(part) - len(missing))
            # Many workers need more at once, and draw it in the same time.
            most = getattr(engine, "at_once", _CHUNK)
            for start in range(0, len(missing), most):
                keys, requests = zip(*missing[start : start + most], strict=True)
                began = time.perf_counter()
                try:
                    drawn = engine.sample(requests, progress)
                except EngineError as error:
                    samples.add({keys[number]: of for number, of in error.drawn.items()})
                    raise
                count, seconds = count + len(drawn), seconds + time.perf_counter() - began
                samples.add(dict(zip(keys, drawn, strict=True)))
            groups += scored(questions, asked, [samples[key] for key, _ in part])
    drawn_by = {**engine.identity(), **engine.remarks()}
    return Evaluation(questions, drawn_by, run_seed, k, tuple(groups), count, seconds)


def _class(engine: Engine) -> str:
    return f"{type(engine).__module__}.{type(engine).__qualname__}"


def _not_stored(
    questions: Questions, run_seed: int, missing: int, asked: int, store: Store
) -> StoreError:
    return StoreError(
        f"{escape(questions.policy.name)} on {questions.task_type.name}: {missing} of {asked} "
        f"completions of seed {run_seed} are not in the store {store.file}: run without "
        "--grpo-rescore to draw them, or name the seed of another run by --grpo-seed"
    )


def _rendered(
    policy: Policy,
    source: Source,
    problem: Problem,
    system: str | None,
    template: Mapping[str, Any],
) -> str:
    asked = source.conversation(problem, system)
    return asked if isinstance(asked, str) else policy.render(asked, **template)


def scored(
    questions: Questions, problems: Sequence[Problem], samples: Sequence[Sample]
) -> list[Group]:
    """Score samples, the same number for each problem and in the order of the problems.

    Raises ``EvaluationError`` and ``RewardError``.
    """
    if not problems:
        return []
    k, rewards = len(samples) // len(problems), questions.rewards
    of_sample = [problem for problem in problems for _ in range(k)]
    texts, ids = [sample.text for sample in samples], [sample.ids for sample in samples]
    batch = Batch.of(questions.task_type, of_sample, texts, ids)
    where = f"{escape(questions.policy.name)} on {questions.task_type.name}"
    log = Log()
    scores = rewards.score(batch, where, log)
    judged = map(_completion, repeat(questions), of_sample, samples, scores)
    completions = [
        replace(completion, extra=extra, metrics=metrics)
        for completion, extra, metrics in zip(judged, log.extra, log.metrics, strict=True)
    ]
    return [
        Group(problem, tuple(completions[i * k : (i + 1) * k]))
        for i, problem in enumerate(problems)
    ]


def _completion(
    questions: Questions, problem: Problem, sample: Sample, scores: Scores
) -> Completion:
    source, rewards, failed = questions.task_type, questions.rewards, sample.error is not None
    total = None if failed else rewards.total(scores)
    with user_code(
        lambda error: EvaluationError(
            f"task type {source.name!r}, problem {problem.id}: the completion "
            f"'{escape(sample.text)}' cannot be read ({one_line(error)}): fix the type's read"
        )
    ):
        return Completion(
            text=sample.text,
            tokens=sample.tokens,
            reward=math.nan if total is None else total,
            outcome=outcome(
                source,
                problem,
                None if failed else sample.text,
                truncated=sample.truncated,
                reading=rewards.reading(scores),
            ),
            strict=not failed
            and not sample.truncated
            and strictly_correct(source, problem, sample.text),
            rewards=scores,
            ids=sample.ids,
        )
