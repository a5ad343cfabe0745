"""The gate's rules as a suite asserts them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from grpo_harness.plugin.state import carry_check, carry_notices, clearly

if TYPE_CHECKING:
    from grpo_harness.baselines.file import Baseline
    from grpo_harness.checks import Check
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.gate.verdicts import Verdict
    from grpo_harness.rules import Rule
    from grpo_harness.session import Session


def conclude(
    node: pytest.Item,
    title: str,
    policy: str,
    reference: str,
    verdict: Verdict,
    said: str,
    *,
    task: str = "training",
) -> None:
    """Count a verdict on a training, or on the ``task`` that is named.

    FAIL fails the test, UNPROVEN too under ``--grpo-strict``.
    """
    from grpo_harness.checks import Check
    from grpo_harness.text import plain

    reason = said.removeprefix(f"{verdict}: ")
    check = Check(title, title, task, policy, reference, reason=reason)
    carry_check(node, {**check.asdict(), "verdict": verdict})
    failing = ("FAIL", "ERROR", *(["UNPROVEN"] if node.config.getoption("grpo_strict") else []))
    if verdict in failing:
        pytest.fail(plain(said), pytrace=False)


class Gate:
    """The rules as assertions, one method per rule: each judges, and fails the test on harm.

    ``gate.accuracy(evaluation, baseline)`` and similar rules judge against a baseline;
    ``gate.total(evaluations, baselines)`` takes those of all tasks. ``gate.no_loss(trained, base)``
    and the other rules about the base take lists of evaluations. They return the check;
    ``gate.rewards`` returns one for each of several reward functions, ``gate.slices`` one for each
    slice. FAIL and ERROR fail the test. UNPROVEN is counted beside passed and failed; it fails the
    test under ``--grpo-strict``.

    A test has a part of the risk for each rule that it declares
    (``@pytest.mark.grpo("accuracy")``), or for one rule if it declares none. It may use each part
    once; another use fails the test.
    """

    def __init__(self, session: Session, node: pytest.Item, declared: Sequence[str]) -> None:
        self._session = session
        self._node = node
        self._left = Counter(declared)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from grpo_harness.rules import RULES, of_function, of_slice

        if name not in RULES:
            raise AttributeError(f"the gate has no rule {name!r}: it has {', '.join(RULES)}")
        rule = RULES[name]

        def against_baseline(evaluation: Evaluation, baseline: Baseline) -> Check:
            return against_baselines([evaluation], [baseline])

        def against_baselines(
            evaluations: Sequence[Evaluation], baselines: Sequence[Baseline]
        ) -> Check:
            self._answered(evaluations, rule)
            alpha = self._share(rule)
            judge = partial(self._session.against_baseline, rule, evaluations, baselines, alpha)
            (check,) = self._asserted([judge])
            return check

        def total(evaluations: Sequence[Evaluation], baselines: Sequence[Baseline]) -> Check:
            if self._session.settings.sequential:
                pytest.skip("a sequential run stops each task by itself: there is no total")
            if len(evaluations) < 2:
                pytest.skip("with one task, its accuracy is the total")
            return against_baselines(evaluations, baselines)

        def each_reward(evaluation: Evaluation, baseline: Baseline) -> list[Check]:
            names = [reward.name for reward in evaluation.questions.rewards.functions]
            if len(names) < 2:
                pytest.skip(f"{names[0]} is the only reward, and so the total")
            alpha = self._share(rule) / len(names)
            sides = [evaluation], [baseline]
            judge = self._session.against_baseline
            return self._asserted([partial(judge, of_function(n), *sides, alpha) for n in names])

        def each_slice(evaluation: Evaluation, baseline: Baseline) -> list[Check]:
            task = self._session.settings.task(evaluation.questions.task_type)
            if not task.asks("slices"):
                pytest.skip("no slices are judged: set slices and gate_slices of the data set")
            parts = list(evaluation.slices())
            alpha = self._share(rule) / len(parts)
            judge = self._session.against_baseline
            return self._asserted(
                [partial(judge, of_slice(n), [part], [baseline], alpha) for n, part in parts]
            )

        def against_base(trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
            trained, base = self._answered(trained, rule), self._answered(base, rule)
            alpha = self._share(rule)
            (check,) = self._asserted(
                [lambda: self._session.against_base(rule, trained, base, alpha)]
            )
            return check

        judge: Callable[..., Any] = against_base
        if rule.against == "baseline":
            others: dict[str, Callable[..., Any]] = {
                "rewards": each_reward,
                "slices": each_slice,
                "total": total,
            }
            judge = others.get(rule.name, against_baseline)
        judge.__name__, judge.__doc__ = rule.name, rule.asks
        return judge

    def _share(self, rule: Rule) -> float:
        """Return the rule's part of the run's risk, which a test can use once."""
        from grpo_harness.rules import UNDECLARED

        for name in (rule.name, UNDECLARED):
            if self._left[name]:
                self._left[name] -= 1
                return self._session.shares[name]
        pytest.fail(
            f"ERROR: the test asks the gate for {rule.name}, which it does not declare"
            + ("" if rule.name not in self._left else " a second time")
            + ": its risk of a false alarm was not planned. Declare every rule that it asks, "
            f'such as @pytest.mark.grpo("accuracy", "{rule.name}")',
            pytrace=False,
        )

    def _answered(self, evaluations: Sequence[Evaluation], rule: Rule) -> list[Evaluation]:
        """Return the evaluations that a rule can judge; without any, skip the test."""
        from grpo_harness.rules import ANSWERS

        found = [e for e in evaluations if rule.name not in ANSWERS or e.questions.judges_answers]
        if rule.name == "lenient" and not any(e.questions.task_type.reads for e in found):
            pytest.skip("only generated tasks say what exactly the answer is")
        if evaluations and not found:
            pytest.skip("nothing says which completions are correct: set correct, or see rewards")
        return found

    def _asserted(self, judges: Sequence[Callable[[], Check]]) -> list[Check]:
        from grpo_harness.text import plain

        checks = [clearly(judge) for judge in judges]
        for check in checks:
            carry_check(self._node, check.asdict())
        carry_notices(self._node, self._session)
        option = self._node.config.getoption
        failing = ("FAIL", "ERROR", *(["UNPROVEN"] if option("grpo_strict") else []))
        if failed := [check.message() for check in checks if check.verdict in failing]:
            said = "\n".join([*failed, f"  again: {self._again()}"])
            pytest.fail(plain(said), pytrace=False)
        unproven = [check.reason for check in checks if check.verdict == "UNPROVEN"]
        if unproven and option("grpo_skip_unproven"):
            pytest.skip(plain(f"UNPROVEN: {'; '.join(unproven)}"))
        return checks

    def _again(self) -> str:
        """Return the command that repeats this test alone, with its samples and its verdict."""
        from grpo_harness.plugin.options import settable

        words = ["pytest", shlex.quote(self._node.nodeid), f"--grpo-seed={self._session.run_seed}"]
        for name in (*settable(), "strict"):
            given = self._node.config.getoption(f"grpo_{name}")
            for value in given if isinstance(given, list) else [given]:
                if value is not None and value is not False:
                    said = "" if value is True else f"={shlex.quote(str(value))}"
                    words.append(f"--grpo-{name}{said}")
        return " ".join(words)
