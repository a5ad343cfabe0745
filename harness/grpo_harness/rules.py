"""Evaluations -> checks: each rule of the gate put to the samples of one question.

A check says what was asked of which policy, what the gate concluded and, when that is bad, what
a person needs next: the numbers, the problems that changed most, and the command that shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from grpo_harness.baselines.file import Baseline, BaselineError, Record
from grpo_harness.evaluation import LOOK, Evaluation, Group
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.verdicts import Verdict
from grpo_harness.measures import ACCURACY, FAULTS, LENGTH, Measure, Unit, worst
from grpo_harness.reruns import POOLED

AGAINST_BASE = ("not worse than base", "better than base")
"""The questions that compare the trained policy with its base instead of with a baseline."""


@dataclass(frozen=True)
class Check:
    """One judged question about one policy and task type.

    ``verdict`` is ``None`` when the two sides could not be compared at all; ``reason`` says why.
    ``unit`` is that of the two sides: ``%`` of completions, or ``tokens``. ``changed`` shows the
    problems that got worse.
    """

    question: str
    task_type: str
    policy: str
    reference: str
    reason: str = ""
    verdict: Verdict | None = None
    changed: tuple[str, ...] = ()
    unit: Unit = "%"

    @property
    def name(self) -> gate.Name:
        """PASS, FAIL, UNPROVEN or ERROR."""
        return self.verdict.name if self.verdict else "ERROR"

    def message(self) -> str:
        """Say what was found, in a few lines for a person."""
        lines = [f"{self.name}: {self.question} of {self.policy} on {self.task_type}"]
        if self.verdict:
            v = self.verdict
            tokens = self.unit == "tokens"
            now, then = (f"{x:.1f} tokens" if tokens else f"{x:.1%}" for x in (v.now, v.then))
            unit = "%" if tokens else " points"
            lines.append(
                f"  {then} ({self.reference}) -> {now}: {100 * v.delta:+.1f}{unit}, "
                f"90 % interval {100 * v.lower:+.1f} to {100 * v.upper:+.1f}, p = {v.p:.2g}, "
                f"n = {v.n} problems x {v.k} samples"
            )
        lines.append(f"  {self.reason}")
        lines += [f"  {line}" for line in self.changed]
        if self.name == "FAIL" and self.question not in AGAINST_BASE:
            why = " --grpo-accept-regression 'why'" if self.question == "accuracy" else ""
            lines.append(f"  if it is meant: --grpo-record{why}")
        return "\n".join(lines)

    def asdict(self) -> dict[str, Any]:
        """Return the check as plain numbers and texts."""
        return {**asdict(self), "name": self.name}


@dataclass(frozen=True)
class Rules:
    """The gate's settings, and how many checks the run planned that share its ``alpha``.

    ``margin`` and ``minimum`` are shares of completions; see the gate. ``attempt``
    counts the runs before this one whose samples are pooled with its own: each halves ``alpha``.
    With ``sequential``, accuracy is judged at every look until there is a decision.
    """

    checks: int
    margin: float = 0.05
    minimum: float = 0.01
    alpha: float = 0.01
    attempt: int = 0
    sequential: bool = False

    def bounds(self) -> dict[str, float]:
        """Return the settings that a baseline keeps."""
        return {"margin": self.margin, "minimum": self.minimum, "alpha": self.alpha}

    @property
    def _alpha(self) -> float:
        return self.alpha * 0.5**self.attempt

    def _settings(self) -> dict[str, Any]:
        return {**self.bounds(), "alpha": self._alpha, "checks": self.checks}

    def plan(self, baseline: Baseline, problems: Sequence[str], k: int) -> gate.Plan | None:
        """Predict what ``accuracy`` can find, or nothing where problems were not recorded."""
        if not all(problem in baseline.records for problem in problems):
            return None
        records = [baseline.records[problem] for problem in problems]
        return gate.plan(*_correct(records), k, **self._settings())

    def decided(self, groups: Sequence[Group], records: Sequence[Record]) -> bool:
        """Tell whether a sequential run may stop after ``groups`` of the planned ``records``."""
        return self._sequential(groups, records).name in ("PASS", "FAIL")

    def _sequential(self, groups: Sequence[Group], records: Sequence[Record]) -> Verdict:
        return gate.judge_sequential(
            [group.count("correct") for group in groups],
            [len(group.completions) for group in groups],
            *_correct(records),
            look=LOOK,
            **self._settings(),
        )

    def accuracy(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Has the share of correct completions dropped below the baseline's?"""

        def judge(records: Sequence[Record]) -> Verdict:
            same = baseline.same_policy(evaluation)
            # A likelihood ratio of one common drop takes the differences between two policies
            # for evidence, so another policy is always judged on the whole plan.
            if self.sequential and same:
                return self._sequential(evaluation.groups, records)
            return gate.judge(
                evaluation.counts("correct"),
                evaluation.samples,
                *_correct(records[: evaluation.n]),
                same_policy=same,
                **self._settings(),
            )

        return self._against("accuracy", evaluation, baseline, judge, ACCURACY)

    def truncation(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Has the share of completions that the token limit cut off risen?"""
        return self._fault("truncation", "truncated", evaluation, baseline)

    def unparsable(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Has the share of completions without a readable answer risen?"""
        return self._fault("unparsable answers", "unparsable", evaluation, baseline)

    def length(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Have completions become longer or shorter, in tokens?"""

        def judge(records: Sequence[Record]) -> Verdict:
            return gate.judge_length(
                [group.log_length for group in evaluation.groups],
                evaluation.samples,
                [record.mean_log_length for record in records[: evaluation.n]],
                alpha=self._alpha,
                checks=self.checks,
            )

        return self._against("length", evaluation, baseline, judge, LENGTH)

    def improvement(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Is the trained policy better than its base, over all problems of these evaluations?"""

        def judge(*counts: list[int]) -> Verdict:
            return gate.judge_improvement(*counts, alpha=self._alpha, checks=self.checks)

        return self._between("better than base", trained, base, judge)

    def no_loss(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Is the trained policy at least no worse than its base on these evaluations?"""

        def judge(*counts: list[int]) -> Verdict:
            return gate.judge(*counts, same_policy=False, **self._settings())

        return self._between("not worse than base", trained, base, judge)

    def _between(
        self,
        question: str,
        trained: Sequence[Evaluation],
        base: Sequence[Evaluation],
        judge: Callable[..., Verdict],
    ) -> Check:
        if not trained or len(trained) != len(base):
            raise ValueError(
                f"{len(trained)} evaluations of the trained policy and {len(base)} of the base: "
                "they are compared in pairs, and there must be one"
            )
        name = trained[0].task_type.name if len(trained) == 1 else "all"
        check = Check(question, name, trained[0].policy, base[0].policy)
        if reason := _no_pairs(trained, base) or _unscored([*trained, *base]):
            return replace(check, reason=reason)
        # Where runs stop at a decision, one side may have been asked more problems than the other.
        pairs = [
            pair
            for ours, theirs in zip(trained, base, strict=True)
            for pair in zip(ours.groups, theirs.groups, strict=False)
        ]
        now, then = [group for group, _ in pairs], [group for _, group in pairs]
        verdict = judge(*_counts(now), *_counts(then))
        before = [ACCURACY.now(group) for group in then]
        return self._judged(check, verdict, now, before, ACCURACY)

    def _fault(
        self,
        question: str,
        outcome: Literal["truncated", "unparsable"],
        evaluation: Evaluation,
        baseline: Baseline,
    ) -> Check:
        def judge(records: Sequence[Record]) -> Verdict:
            return gate.judge_rate(
                evaluation.counts(outcome),
                evaluation.samples,
                [getattr(record, outcome) for record in records[: evaluation.n]],
                [record.k for record in records[: evaluation.n]],
                **self._settings(),
            )

        return self._against(question, evaluation, baseline, judge, FAULTS[outcome])

    def _against(
        self,
        question: str,
        evaluation: Evaluation,
        baseline: Baseline,
        judge: Callable[[Sequence[Record]], Verdict],
        measure: Measure,
    ) -> Check:
        reference = f"baseline of {baseline.policy}"
        name, unit = evaluation.task_type.name, measure.unit
        check = Check(question, name, evaluation.policy, reference, unit=unit)
        try:
            records = baseline.select(evaluation)
        except BaselineError as error:
            return replace(check, reason=str(error))
        if reason := _unscored([evaluation]):
            return replace(check, reason=reason)
        verdict = judge(records)
        before = [measure.then(record) for record in records]
        return self._judged(check, verdict, evaluation.groups, before, measure)

    def _judged(
        self,
        check: Check,
        verdict: Verdict,
        now: Sequence[Group],
        then: Sequence[float],
        measure: Measure,
    ) -> Check:
        reason = verdict.reason
        if self.attempt:
            runs = f"{self.attempt} earlier run{'s' if self.attempt > 1 else ''}"
            some = f"the last {POOLED} of " if self.attempt > POOLED else ""
            reason += f"; pooled with the samples of {some}{runs} of the same that did not pass"
        changed = worst(now, then, measure) if verdict.name == "FAIL" else ()
        return replace(check, reason=reason, verdict=verdict, changed=changed)


def _correct(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    return [record.correct for record in records], [record.k for record in records]


def _counts(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    return [group.count("correct") for group in groups], [len(g.completions) for g in groups]


def _no_pairs(trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> str:
    """Say why evaluations of trained and base cannot be compared with each other, if so."""
    for ours, theirs in zip(trained, base, strict=True):
        if ours.fingerprint.weights == theirs.fingerprint.weights:
            return (
                f"the trained policy {ours.policy} is the base policy {theirs.policy}: both have "
                f"the same weights (fingerprints {ours.fingerprint} and {theirs.fingerprint}). "
                "Point --grpo-trained at what was trained"
            )
        if (ours.task_type.name, ours.plan) != (theirs.task_type.name, theirs.plan):
            return (
                f"not comparable: {len(ours.plan)} problems of {ours.task_type.name} were asked "
                f"of {ours.policy}, and {len(theirs.plan)} of {theirs.task_type.name} of "
                f"{theirs.policy}: ask both the same"
            )
        # Which tokens end an answer is the policy's own.
        sampling = [{**e.settings, "eos_token_ids": None} for e in (ours, theirs)]
        if sampling[0] != sampling[1]:
            return f"not comparable: {ours.policy} and {theirs.policy} were sampled differently"
    return ""


def _unscored(evaluations: Sequence[Evaluation]) -> str:
    failed = [
        f"{sum(counts)} of {sum(evaluation.samples)} ({evaluation.policy} on "
        f"{evaluation.task_type.name})"
        for evaluation in evaluations
        if sum(counts := evaluation.counts("error"))
    ]
    if not failed:
        return ""
    return (
        f"completions could not be drawn: {', '.join(failed)}. Nothing is judged with answers "
        "missing: see the samples' errors, make room (--grpo-device, fewer samples), run again"
    )
