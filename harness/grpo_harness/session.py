"""What the tests of one run share: policies, engines, evaluations, baselines, each made once."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness import checks, rules, stopping
from grpo_harness.asked import Task
from grpo_harness.baselines import file as baselines
from grpo_harness.baselines import recording
from grpo_harness.baselines.file import Baseline, BaselineError
from grpo_harness.baselines.provenance import drawing_digest
from grpo_harness.baselines.pruning import Stale, stale
from grpo_harness.baselines.recording import Recording
from grpo_harness.checks import Check
from grpo_harness.engines.engine import Engine, Progress, Request, Sample, sample_seed
from grpo_harness.engines.residency import Residents
from grpo_harness.evaluation import Evaluation, Group, Questions, Tally, ask, evaluate
from grpo_harness.gate.bounds import LOOK, Sizes
from grpo_harness.policy import Policy, PolicyError, PolicyName, load
from grpo_harness.reruns import Attempt, Reruns
from grpo_harness.rewards.functions import Rewards
from grpo_harness.rewards.trials import rewards_digest
from grpo_harness.rules import RULES, Rule, Terms, bounded
from grpo_harness.settings import Settings
from grpo_harness.sizing import Size, Sizing, baseline_of, to_record
from grpo_harness.store import Store
from grpo_harness.tasks import Source
from grpo_harness.text import digest, escape

if TYPE_CHECKING:
    from grpo_harness.engines.ray_cluster import Cluster
    from grpo_harness.engines.transformers import TransformersEngine

Until = Callable[[Sequence[Group]], bool]
"""Tells whether a run may stop after the groups so far."""


@contextmanager
def progress_bar(title: str, samples: int) -> Iterator[Progress]:
    """Show a progress bar on a terminal only."""
    from tqdm import tqdm

    with tqdm(
        total=samples, desc=escape(title, 60), unit=" samples", leave=False, disable=None
    ) as bar:
        yield bar.update


def stale_entries(settings: Settings) -> list[Stale]:
    """List the stale baselines below the baselines folder."""
    configured = (name for names in settings.configured.values() for name in names)
    types = {name: task.source for name, task in settings.tasks.items()}
    slugs = {name.slug for name in (*configured, *(own for *_, own in settings.policies()))}
    asked = settings.problems if isinstance(settings.problems, int) else 1
    return stale(settings.baselines, slugs, types, asked)


@dataclass(eq=False)
class Session:
    """One run: its settings and seed, its store of samples, its shares of the risk.

    ``sizing`` has the sizes of its rows, and ``shares`` the part of the false-alarm risk that a
    check of each rule has. ``code`` digests
    the code that samples and judges: attempts of other code are not used. ``progress``
    makes a progress display for a title and a number of samples, and ``evaluated`` is called once
    with every evaluation of the run.
    """

    settings: Settings
    sizing: Sizing
    run_seed: int
    shares: Mapping[str, float]
    code: str
    store: Store
    reruns: Reruns
    progress: Callable[[str, int], AbstractContextManager[Progress]]
    evaluated: Callable[[Evaluation], None] = lambda _: None
    _policies: dict[PolicyName, Policy | PolicyError] = field(default_factory=dict)
    _residents: Residents = field(init=False)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _local: dict[str, "TransformersEngine"] = field(default_factory=dict)
    _cluster: "Cluster | None" = None
    _questions: dict[tuple[str, ...], Questions] = field(default_factory=dict)
    _digests: dict[str, tuple[Rewards, Source, str]] = field(default_factory=dict)
    _evaluations: dict[tuple[str, ...], Evaluation] = field(default_factory=dict)
    _baselines: dict[Path, Baseline] = field(default_factory=dict)
    _recorded: dict[tuple[str, str], Recording] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rescores = self.store.draws == "none"
        self._residents = Residents("none" if rescores else self.settings.resident)

    def close(self) -> None:
        """Release all weights, and end the workers of a cluster."""
        self._residents.close()
        if self._cluster is not None:
            self._cluster.close()

    @property
    def task_types(self) -> list[Source]:
        """The configured task types."""
        return [task.source for task in self.settings.tasks.values()]

    def policy(self, role: str, candidate: int = 0) -> Policy:
        """Return the base policy or a numbered candidate (``trained``). Raises ``PolicyError``.

        A name is loaded once, even if both roles have it or it cannot be loaded.
        """
        name = self.settings.policy(role, candidate)
        if name not in self._policies:
            try:
                self._policies[name] = load(name)
            except PolicyError as error:
                self._policies[name] = error
        policy = self._policies[name]
        if isinstance(policy, PolicyError):
            raise policy
        return policy

    def engine(self, policy: Policy) -> Engine:
        """Return the configured engine of a policy: of its servers, a cluster or its weights."""
        endpoint = self.settings.served.get(policy.checkpoint.name)
        if endpoint is None:
            return self._on_ray(policy) if self.settings.engine == "ray" else self.local(policy)
        key = f"{policy.fingerprint} {endpoint}"
        if key not in self._engines:
            from grpo_harness.engines.server import ServerEngine

            self._engines[key] = ServerEngine(policy, self.settings.sampling, endpoint)
        return self._engines[key]

    def _on_ray(self, policy: Policy) -> Engine:
        key = f"{policy.fingerprint} ray"
        if key not in self._engines:
            from grpo_harness.engines.ray import RayEngine
            from grpo_harness.engines.ray_cluster import Cluster

            if self._cluster is None:
                self._cluster = Cluster(
                    device=self.settings.device,
                    dtype=self.settings.dtype,
                    resident=self.settings.resident,
                    code=drawing_digest,
                )
            self._engines[key] = RayEngine(
                policy, self.settings.sampling, self._cluster, self._residents
            )
        return self._engines[key]

    def local(self, policy: Policy, *, coarse: bool = False) -> "TransformersEngine":
        """Return the engine of a policy's weights. It loads them when it draws.

        With ``coarse`` they are in bfloat16, or in float32 if that is what they are in otherwise.
        """
        key = f"{policy.fingerprint}{' coarse' if coarse else ''}"
        if key not in self._local:
            # Imported late: it loads torch, which a run that only collects does not need.
            from grpo_harness.engines.transformers import TransformersEngine

            dtype = self.settings.dtype
            if coarse:
                usual = self.local(policy).identity()["dtype"]
                dtype = "float32" if usual == "bfloat16" else "bfloat16"
            self._local[key] = TransformersEngine(
                policy,
                self.settings.sampling,
                device=self.settings.device,
                dtype=dtype,
                residents=None if coarse else self._residents,
            )
        return self._local[key]

    def _engine_of(self, policy: Policy, source: Source) -> Engine:
        """Return the policy's engine, which draws as the task says."""
        engine, sampling = self.engine(policy), self.settings.task(source).sampling
        return engine if sampling == self.settings.sampling else engine.drawing(sampling)

    def sample(self, policy: Policy, prompts: Sequence[str], *, seed: int = 0) -> list[Sample]:
        """Draw one completion per user prompt, as configured; the same seed draws the same ones."""
        requests = [
            Request(policy.render(prompt), sample_seed(seed, prompt, number))
            for number, prompt in enumerate(prompts)
        ]
        return self.engine(policy).sample(requests, None)

    def size(self, policy: Policy, task_type: Source) -> Size:
        """Return how many problems of a task type a policy is asked, and how often each."""
        name = policy.checkpoint.name
        roles = (role for role, _, own in self.settings.policies() if own == name)
        return self.sizing.size(next(roles, ""), name, task_type)

    def questions(
        self, policy: Policy, task_type: Source, problems: int | None = None
    ) -> Questions:
        """Return what a policy is asked on a task type; nothing is drawn. Raises as ``ask``.

        Without ``problems`` they are as many as the run asks.
        """
        n = self.size(policy, task_type).n if problems is None else problems
        key = (policy.name, str(policy.fingerprint), task_type.name, str(n))
        if key not in self._questions:
            task = self.settings.task(task_type)
            self._questions[key] = ask(
                policy,
                task_type,
                n,
                settings=self._engine_of(policy, task_type).settings(),
                rewards=task.rewards,
                system=task.system,
                template=task.template,
                bounds=rules.recorded_bounds(task.bounds, self.settings.table.gate.alpha),
                digest=self._digest,
            )
        return self._questions[key]

    def _digest(self, rewards: Rewards, source: Source) -> str:
        """Digest what rewards do on a source: once, and not for each policy."""
        before = self._digests.get(source.name)
        if before is None or before[0] is not rewards or before[1] is not source:
            before = rewards, source, rewards_digest(rewards, source)
            self._digests[source.name] = before
        return before[2]

    def evaluation(self, policy: Policy, task_type: Source) -> Evaluation:
        """Evaluate a policy on a task type as configured. Raises ``HarnessError``.

        A sequential run of the recorded policy stops when its checks are decided; any other policy
        is asked all planned problems.
        """
        key = (policy.name, str(policy.fingerprint), task_type.name)
        if key not in self._evaluations:
            questions = self.questions(policy, task_type)
            until = self._until_decided(questions) if self.settings.sequential else None
            self._evaluations[key] = self._draw(
                questions, self.size(policy, task_type).k, self.run_seed, until
            )
            self.evaluated(self._evaluations[key])
        return self._evaluations[key]

    def ask(self, questions: Questions, k: int) -> Evaluation:
        """Ask some questions ``k`` times each, however many the run plans."""
        return self._draw(questions, k, self.run_seed)

    def again(self, evaluation: Evaluation, run_seed: int, problems: int) -> Evaluation:
        """Ask the first ``problems`` of an evaluation's questions with another run's seed."""
        return self._draw(evaluation.questions.first(problems), evaluation.k, run_seed)

    def baseline(self, role: str, policy: Policy, task_type: str) -> Baseline:
        """Load the policy's own baseline, or else its role's. Raises ``BaselineError``."""
        path = baseline_of(self.settings, role, policy.checkpoint.name, task_type)
        # One object for all tests: it scores its examples once.
        if path not in self._baselines:
            self._baselines[path] = baselines.load(path)
        return self._baselines[path]

    def against_baseline(
        self,
        rule: Rule,
        evaluations: Sequence[Evaluation],
        stored: Sequence[Baseline],
        alpha: float,
    ) -> Check:
        """Judge evaluations of a policy against a baseline each, all together.

        ``alpha`` is the check's part of the run's risk.
        """
        reference = f"baseline of {stored[0].policy}"
        records: list[Tally] = []
        for evaluation, baseline in zip(evaluations, stored, strict=True):
            try:
                records += baseline.select(evaluation.questions)
            except BaselineError as error:
                return checks.opened(
                    rule, evaluation.task, evaluation.policy, reference, str(error)
                )
        same = all(
            baseline.same_policy(evaluation.fingerprint)
            for evaluation, baseline in zip(evaluations, stored, strict=True)
        )
        task = self._task(evaluations[0])
        rule = bounded(rule, self._bounds(evaluations))

        def judge(pooled: Sequence[Evaluation], alpha: float) -> Check:
            terms = Terms(alpha, same, self.settings.sequential, task.allow_floor)
            return checks.against_baseline(rule, pooled, reference, records, terms)

        together = " ".join(baseline.digest for baseline in stored)
        return self._judged(rule, evaluations, together, alpha, judge)

    def nothing_to_lose(
        self, questions: Questions, baseline: Baseline, declared: Sequence[str]
    ) -> str:
        """Return why a test that asks for accuracy alone cannot find a loss, or an empty text."""
        task = self.settings.task(questions.task_type)
        if task.allow_floor or set(declared) != {"accuracy"} or not questions.judges_answers:
            return ""
        rule = bounded(RULES["accuracy"], task.bounds)
        return rules.nothing_to_lose(baseline.select(questions), rule.bounds)

    def against_base(
        self, rule: Rule, trained: Sequence[Evaluation], base: Sequence[Evaluation], alpha: float
    ) -> Check:
        """Judge a trained policy against its base; ``alpha`` is its part of the run's risk."""
        rule = bounded(rule, self._bounds(trained))

        def judge(evaluations: Sequence[Evaluation], alpha: float) -> Check:
            sides = evaluations[: len(trained)], evaluations[len(trained) :]
            return checks.against_base(rule, *sides, Terms(alpha))

        return self._judged(rule, [*trained, *base], "base", alpha, judge)

    def _bounds(self, evaluations: Sequence[Evaluation]) -> Mapping[str, Sizes]:
        """Return the bounds of a task, or those of the project if several are judged together."""
        if len(evaluations) == 1:
            return self._task(evaluations[0]).bounds
        return self.settings.bounds

    def record(
        self, role: str, policy: Policy, task_type: Source, files: int, reason: str | None
    ) -> Recording:
        """Record the baseline of a policy on a task type, from fresh samples of several seeds.

        They have the seeds of an earlier recording of the same policy, so that its numbers stay
        where nothing has changed, and nobody records until chance is kind. If nothing is drawn,
        they are the samples of that recording. It is one of ``files`` that the run records. Raises
        ``HarnessError``; then nothing is written.
        """
        key = (policy.name, task_type.name)
        if key not in self._recorded:
            # Greedy decoding draws the same completion with any seed: one sample is enough.
            greedy = self.settings.task(task_type).sampling.greedy
            seeds = [secrets.randbelow(2**31) for _ in range(1 if greedy else recording.SEEDS)]
            samples = 1 if greedy else recording.SAMPLES
            problems = to_record(self.settings, task_type)
            before = self._recorded_before(role, policy, task_type)
            if before is not None and before.same_policy(policy.fingerprint):
                seeds = before.header.seeds[: len(seeds)]
            if self.store.draws == "none":
                before = before or self.baseline(role, policy, task_type.name)
                seeds, problems = before.header.seeds, min(problems, before.header.planned)
                samples = max(record.k for record in before.records.values())
            questions = self.questions(policy, task_type, problems)
            # Stored samples of these seeds may come from code that no digest knows.
            evaluations = [
                self._draw(questions, samples // len(seeds), seed, store=self.store.anew())
                for seed in seeds
            ]
            self._recorded[key] = recording.record(
                self.settings.baselines,
                evaluations,
                root=self.settings.root,
                before=baseline_of(self.settings, role, policy.checkpoint.name, task_type.name),
                files=files,
                reason=reason,
            )
        return self._recorded[key]

    def _recorded_before(self, role: str, policy: Policy, task_type: Source) -> Baseline | None:
        try:
            return self.baseline(role, policy, task_type.name)
        except BaselineError:
            return None

    def notices(self) -> list[str]:
        """Return the new notices about the caches."""
        said = [*self.store.notices, *self.reruns.notices]
        self.store.notices.clear()
        self.reruns.notices.clear()
        return said

    def _judged(
        self,
        rule: Rule,
        evaluations: Sequence[Evaluation],
        reference: str,
        alpha: float,
        judge: Callable[[Sequence[Evaluation], float], Check],
    ) -> Check:
        """Judge evaluations, pooled with those of earlier runs that did not pass."""
        # The same for all attempts of one check.
        same = [[str(e.fingerprint), e.task, dict(e.questions.settings)] for e in evaluations]
        attempt = [rule.name, self.code, reference, same]
        key = digest(json.dumps(attempt, sort_keys=True))[:16]
        asked = max(evaluation.n for evaluation in evaluations)
        # Greedy completions of a rerun are the same ones, not new evidence. Evaluations that a
        # suite made itself cannot be repeated by this session.
        own = all(any(e is mine for mine in self._evaluations.values()) for e in evaluations)
        greedy = any(self._task(e).sampling.greedy for e in evaluations)
        series = self.reruns.series(key, self.run_seed, asked, alpha, pools=own and not greedy)
        if series.attempts:
            # This run may have stopped early on its own samples alone; the pool needs all problems.
            evaluations = [
                e if e.n == e.planned else self._draw(e.questions, e.k, e.run_seed)
                for e in evaluations
            ]
        pooled = [
            evaluation.pooled([self._of(evaluation, attempt) for attempt in series.earlier])
            for evaluation in evaluations
        ]
        check = judge(pooled, series.alpha)
        if check.evidence is not None and check.verdict != "ERROR":
            self.reruns.add(key, Attempt(self.run_seed, asked, check.verdict, series.risk))
        return replace(check, reason=f"{check.reason}{series}")

    def _task(self, evaluation: Evaluation) -> Task:
        return self.settings.task(evaluation.questions.task_type)

    def _of(self, evaluation: Evaluation, attempt: Attempt) -> Evaluation:
        """Return the evaluation of an earlier attempt; samples not in the store are drawn again."""
        return self._draw(
            evaluation.questions,
            evaluation.k,
            attempt.seed,
            lambda groups: len(groups) >= attempt.n,
        )

    def _until_decided(self, questions: Questions) -> Until | None:
        """Return a function that tells when a recorded policy's checks are decided."""
        stored = self._recorded_of(questions)
        if stored is None or not all(problem in stored.records for problem in questions.ids):
            return None
        records = [stored.records[problem].tally for problem in questions.ids]
        task = self.settings.task(questions.task_type)
        waiting = stopping.awaited(task, questions, self.shares)
        return lambda groups: stopping.decided(groups, records, waiting)

    def _recorded_of(self, questions: Questions) -> Baseline | None:
        """Return the baseline that was recorded from this policy, if there is one."""
        for role, _, name in self.settings.policies():
            if name != questions.policy.checkpoint.name:
                continue
            try:
                stored = self.baseline(role, questions.policy, questions.task_type.name)
            except BaselineError:
                continue
            if stored.same_policy(questions.fingerprint):
                return stored
        return None

    def _draw(
        self,
        questions: Questions,
        k: int,
        seed: int,
        until: Until | None = None,
        store: Store | None = None,
    ) -> Evaluation:
        title = f"{questions.policy.name} {questions.task_type.name}"
        with self.progress(title, len(questions.problems) * k) as progress:
            return evaluate(
                questions,
                self._engine_of(questions.policy, questions.task_type),
                k=k,
                run_seed=seed,
                store=store or self.store,
                code=drawing_digest(),
                until=until,
                look=LOOK,
                progress=progress,
            )
