"""What the tests of one run share: policies, evaluations and baselines, each made once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from harness import baseline
from harness.baseline import Baseline
from harness.checkpoint import slug
from harness.checks import Rules
from harness.evaluation import Evaluation, evaluate
from harness.policy import Policy, load
from harness.sampling import Progress, Request, Sample, Sampler, sample_seed
from harness.settings import Settings
from harness.store import Store
from harness.tasks import TaskType, task_types


@dataclass(eq=False)
class Session:
    """One run: its settings and seed, its store of samples, and how many checks it planned.

    ``progress`` makes a progress display for a title and a number of samples.
    """

    settings: Settings
    run_seed: int
    checks: int
    store: Store
    progress: Callable[[str, int], AbstractContextManager[Progress]]
    _policies: dict[str, Policy] = field(default_factory=dict)
    _evaluations: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    _recorded: dict[tuple[str, str], Path] = field(default_factory=dict)

    @property
    def rules(self) -> Rules:
        """The gate's rules, whose risk of a false alarm all planned checks share."""
        return Rules(checks=self.checks, reward=self.settings.reward)

    @property
    def task_types(self) -> list[TaskType]:
        """The configured task types."""
        return [task_types()[name] for name in self.settings.tasks]

    def policy(self, role: str) -> Policy:
        """Load the policy in a role (``base`` or ``trained``). Raises ``PolicyError``.

        A name that both roles share is loaded once.
        """
        name = self.settings.base if role == "base" else self.settings.trained
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
        """Evaluate a policy on a task type as configured. Raises ``EvaluationError``."""
        key = (policy.name, task_type.name)
        if key not in self._evaluations:
            self._evaluations[key] = self._evaluate(
                policy, task_type, self.settings.samples, self.run_seed
            )
        return self._evaluations[key]

    def baseline(self, role: str, evaluation: Evaluation) -> Baseline:
        """Load the policy's own baseline, or else that of the policy it stands in for.

        Raises ``BaselineError``, also when there is neither.
        """
        folder, task_type = self.settings.baselines, evaluation.task_type.name
        own = baseline.path_of(folder, evaluation.slug, task_type)
        configured = baseline.path_of(folder, slug(self.settings.baseline_of[role]), task_type)
        return baseline.load(configured if configured.exists() and not own.exists() else own)

    def record(self, policy: Policy, task_type: TaskType) -> Path:
        """Record the baseline of a policy on a task type, from fresh samples of several seeds.

        Raises ``BaselineError`` or ``EvaluationError``, and then nothing is written.
        """
        key = (policy.name, task_type.name)
        if key not in self._recorded:
            # The most likely answer is the same whatever the seed: one sample says it all.
            greedy = self.settings.sampling.greedy
            seeds = 1 if greedy else baseline.SEEDS
            samples = 1 if greedy else baseline.SAMPLES
            evaluations = [
                self._evaluate(policy, task_type, samples // seeds, secrets.randbelow(2**31))
                for _ in range(seeds)
            ]
            self._recorded[key] = baseline.record(
                self.settings.baselines,
                policy,
                evaluations,
                reward=self.settings.reward,
                gate=self.rules.bounds(),
            )
        return self._recorded[key]

    def _evaluate(self, policy: Policy, task_type: TaskType, k: int, seed: int) -> Evaluation:
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
                progress=progress,
            )

    def _sampler(self, policy: Policy) -> Sampler:
        # Late, because it loads torch, and a run that only collects needs none.
        from harness.sampling.transformers import TransformersSampler

        return TransformersSampler(policy, self.settings.sampling)
