"""What the tests of one run share: policies, evaluations and baselines, each made once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from grpo_harness.baselines import file as baseline
from grpo_harness.baselines import recording
from grpo_harness.baselines.file import Baseline, BaselineError
from grpo_harness.baselines.pruning import Stale, stale
from grpo_harness.baselines.recording import Recording
from grpo_harness.engines.engine import Progress, Request, Sample, Sampler, sample_seed
from grpo_harness.evaluation import Evaluation, Group, evaluate
from grpo_harness.gate.verdicts import MINIMUM_PROBLEMS, Plan
from grpo_harness.policy.checkpoint import digest, slug
from grpo_harness.policy.policy import Policy, load
from grpo_harness.reruns import MOST_ATTEMPTS, POOLED, Attempt, Attempts
from grpo_harness.rules import Check, Rules
from grpo_harness.settings import ROLES, Settings
from grpo_harness.store import Store
from grpo_harness.tasks import TaskType, task_types

Until = Callable[[Sequence[Group]], bool]
"""Tells of the groups so far whether a run may stop."""


def plan(settings: Settings, checks: int, role: str, task_type: str) -> Plan | str:
    """Predict what the accuracy check of a role can find, from its baseline alone.

    Where it will be an ERROR, say why in a few words instead: the run says it in full.
    """
    path = _path(settings, role, slug(settings.policy(role)), task_type)
    if settings.problems < MINIMUM_PROBLEMS:
        return f"fewer than {MINIMUM_PROBLEMS} problems"
    if not path.exists():
        return "no baseline"
    try:
        ids = [problem.id for problem in task_types()[task_type].problems(settings.problems)]
        stored = baseline.load(path)
    except (BaselineError, ValueError):
        return "a damaged baseline, or not so many problems"
    found = Rules(checks=checks).plan(stored, ids, settings.samples)
    return found or f"problems that were not recorded (of {len(stored.records)} that were)"


def stale_entries(settings: Settings) -> list[Stale]:
    """List what is recorded below the baselines' folder and no run asks for any more."""
    names = {*settings.baseline_of.values(), *(settings.policy(role) for role in ROLES)}
    types = {name: task_types()[name] for name in settings.tasks}
    slugs = {slug(name) for name in names}
    return stale(settings.baselines, slugs, types, settings.problems)


def _path(settings: Settings, role: str, own: str, task_type: str) -> Path:
    """Return the policy's own baseline, or else that of the policy it stands in for."""
    folder = settings.baselines
    path = baseline.path_of(folder, own, task_type)
    configured = baseline.path_of(folder, slug(settings.baseline_of[role]), task_type)
    return configured if configured.exists() and not path.exists() else path


@dataclass(eq=False)
class Session:
    """One run: its settings and seed, its store of samples, and how many checks it planned.

    ``code`` digests the code that samples and judges: samples and attempts of other code are
    another run's. ``progress`` makes a progress display for a title and a number of samples.
    """

    settings: Settings
    run_seed: int
    checks: int
    code: str
    store: Store
    attempts: Attempts
    progress: Callable[[str, int], AbstractContextManager[Progress]]
    _policies: dict[str, Policy] = field(default_factory=dict)
    _evaluations: dict[tuple[str, ...], Evaluation] = field(default_factory=dict)
    _recorded: dict[tuple[str, str], Recording] = field(default_factory=dict)

    @property
    def rules(self) -> Rules:
        """The gate's rules, whose risk of a false alarm all planned checks share."""
        return Rules(checks=self.checks, sequential=self.settings.sequential)

    @property
    def task_types(self) -> list[TaskType]:
        """The configured task types."""
        return [task_types()[name] for name in self.settings.tasks]

    def policy(self, role: str) -> Policy:
        """Load the policy in a role (``base`` or ``trained``). Raises ``PolicyError``.

        A name that both roles share is loaded once.
        """
        name = self.settings.policy(role)
        if name not in self._policies:
            self._policies[name] = load(
                name, device=self.settings.device, dtype=self.settings.dtype
            )
        return self._policies[name]

    def sample(self, policy: Policy, prompts: Sequence[str], *, seed: int = 0) -> list[Sample]:
        """Answer each user prompt once, as configured; the same seed gives the same answers."""
        requests = [
            Request(policy.render(prompt), sample_seed(seed, prompt, number))
            for number, prompt in enumerate(prompts)
        ]
        return self._sampler(policy).sample(requests, None)

    def evaluation(self, policy: Policy, task_type: TaskType) -> Evaluation:
        """Evaluate a policy on a task type as configured. Raises ``EvaluationError``.

        A sequential run stops where the accuracy check has its decision, whichever checks are
        asked, if the policy is the recorded one; any other is asked the whole plan.
        """
        key = (policy.name, str(policy.fingerprint), task_type.name)
        self._policies.setdefault(str(policy.fingerprint), policy)
        if key not in self._evaluations:
            self._evaluations[key] = self._evaluate(
                policy,
                task_type,
                self.settings.samples,
                self.run_seed,
                self._until_decided(policy, task_type) if self.settings.sequential else None,
            )
        return self._evaluations[key]

    def baseline(self, role: str, evaluation: Evaluation) -> Baseline:
        """Load the policy's own baseline, or else that of the policy it stands in for.

        Raises ``BaselineError``, also when there is neither.
        """
        return baseline.load(_path(self.settings, role, evaluation.slug, evaluation.task_type.name))

    def judge(
        self,
        question: str,
        evaluations: Sequence[Evaluation],
        reference: str,
        rule: Callable[[Rules, Sequence[Evaluation]], Check],
        again: int = 0,
    ) -> Check:
        """Put a question to ``evaluations``, pooled with those of earlier runs that did not pass.

        A run that repeats another's seed is judged as that was, as one of as many checks, also
        where it is asked alone.

        ``reference`` is a digest of what they are compared with, ``rule`` judges them, and
        ``again`` counts the questions that the same test has put before: one is what it planned,
        so each further one must do with a small part of the risk.
        """
        check = self._check(question, evaluations, reference)
        before = self._before(check, evaluations)
        asked = max(evaluation.n for evaluation in evaluations)
        then = self.attempts.same(check, self.run_seed, asked)
        planned = self.checks if then is None else then.checks
        if before:
            # Where to stop was decided by this run's samples alone, and the pool is another one.
            evaluations = [self._whole(evaluation) for evaluation in evaluations]
        earlier = [
            [self._again(evaluation, attempt) for attempt in before[-POOLED:]]
            for evaluation in evaluations
        ]
        pooled = [e.pooled(others) for e, others in zip(evaluations, earlier, strict=True)]
        checks = planned if again == 0 else planned * 32 * 2**again
        rules = replace(self.rules, checks=checks, attempt=min(len(before), MOST_ATTEMPTS))
        result = rule(rules, pooled)
        if result.verdict is not None and result.name != "ERROR":
            self.attempts.add(check, Attempt(self.run_seed, asked, result.name, planned))
        return result

    def record(
        self, role: str, policy: Policy, task_type: TaskType, reason: str | None
    ) -> Recording:
        """Record the baseline of a policy on a task type, from fresh samples of several seeds.

        Raises ``BaselineError`` or ``EvaluationError``, and then nothing is written.
        """
        key = (policy.name, task_type.name)
        if key not in self._recorded:
            # The most likely answer is the same whatever the seed: one sample says it all.
            greedy = self.settings.sampling.greedy
            seeds = 1 if greedy else recording.SEEDS
            samples = 1 if greedy else recording.SAMPLES
            evaluations = [
                self._evaluate(policy, task_type, samples // seeds, secrets.randbelow(2**31))
                for _ in range(seeds)
            ]
            self._recorded[key] = recording.record(
                self.settings.baselines,
                policy,
                evaluations,
                root=self.settings.root,
                before=_path(self.settings, role, policy.checkpoint.slug, task_type.name),
                bounds=self.rules.bounds(),
                checks=self.checks,
                reason=reason,
            )
        return self._recorded[key]

    def _check(self, question: str, evaluations: Sequence[Evaluation], reference: str) -> str:
        """Name what makes two runs of a check attempts at the same thing."""
        same = [[str(e.fingerprint), e.task_type.name, dict(e.settings)] for e in evaluations]
        return digest(json.dumps([question, self.code, reference, same], sort_keys=True))[:16]

    def _before(self, check: str, evaluations: Sequence[Evaluation]) -> list[Attempt]:
        # The most likely answers of a rerun are the same ones, not further evidence; and what a
        # suite evaluated by itself, this session cannot evaluate again.
        own = all(any(e is mine for mine in self._evaluations.values()) for e in evaluations)
        if self.settings.sampling.greedy or not own:
            return []
        return self.attempts.before(check, self.run_seed)

    def _whole(self, evaluation: Evaluation) -> Evaluation:
        """Return the evaluation of this run with the whole plan asked."""
        if evaluation.n == len(evaluation.plan):
            return evaluation
        policy = self._policies[str(evaluation.fingerprint)]
        return self._evaluate(policy, evaluation.task_type, evaluation.k, evaluation.run_seed)

    def _again(self, evaluation: Evaluation, attempt: Attempt) -> Evaluation:
        """Return the evaluation of an earlier attempt; what the store has lost is drawn again."""
        return self._evaluate(
            self._policies[str(evaluation.fingerprint)],
            evaluation.task_type,
            evaluation.k,
            attempt.seed,
            lambda groups: len(groups) >= attempt.n,
        )

    def _until_decided(self, policy: Policy, task_type: TaskType) -> Until | None:
        """Tell when the accuracy check of a recorded policy has its decision."""
        stored = self._recorded_of(policy, task_type)
        if stored is None:
            return None
        plan = [problem.id for problem in task_type.problems(self.settings.problems)]
        if not all(problem in stored.records for problem in plan):
            return None
        records = [stored.records[problem] for problem in plan]
        return lambda groups: self.rules.decided(groups, records)

    def _recorded_of(self, policy: Policy, task_type: TaskType) -> Baseline | None:
        """Return the baseline that was recorded of this very policy, if there is one."""
        for role in ROLES:
            if self.settings.policy(role) != policy.name:
                continue
            path = _path(self.settings, role, policy.checkpoint.slug, task_type.name)
            try:
                stored = baseline.load(path)
            except BaselineError:
                continue
            if stored.header["fingerprint"] == asdict(policy.fingerprint):
                return stored
        return None

    def _evaluate(
        self, policy: Policy, task_type: TaskType, k: int, seed: int, until: Until | None = None
    ) -> Evaluation:
        n = self.settings.problems
        with self.progress(f"{policy.name} {task_type.name}", n * k) as progress:
            return evaluate(
                policy,
                self._sampler(policy),
                task_type,
                n=n,
                k=k,
                run_seed=seed,
                store=self.store,
                reward=self.settings.reward,
                code=self.code,
                until=until,
                progress=progress,
            )

    def _sampler(self, policy: Policy) -> Sampler:
        # Late, because it loads torch, and a run that only collects needs none.
        from grpo_harness.engines.transformers import TransformersSampler

        return TransformersSampler(policy, self.settings.sampling)
