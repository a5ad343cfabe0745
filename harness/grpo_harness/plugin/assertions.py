"""The gate's rules as a suite asserts them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from grpo_harness.plugin.state import carry_check, carry_notices, clearly

if TYPE_CHECKING:
    from grpo_harness.baselines.file import Baseline
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.rules import Check, Rule
    from grpo_harness.session import Session


class Gate:
    """The rules as assertions, one method per rule: each judges, and fails the test on harm.

    ``gate.accuracy(evaluation, baseline)`` and similar rules judge against a baseline;
    ``gate.no_loss(trained, base)`` and ``gate.improvement`` take lists of evaluations. They return
    the check. FAIL and ERROR fail the test. UNPROVEN is counted beside passed and failed; it fails
    the test under ``--grpo-strict``.

    A test has a part of the risk for each rule that it declares
    (``@pytest.mark.grpo("accuracy")``), or for one rule if it declares none. It may use each part
    once; another use fails the test.
    """

    def __init__(self, session: Session, node: pytest.Item, declared: Sequence[str]) -> None:
        self._session = session
        self._node = node
        self._left = Counter(declared)

    def __getattr__(self, name: str) -> Callable[..., Check]:
        from grpo_harness.rules import RULES

        if name not in RULES:
            raise AttributeError(f"the gate has no rule {name!r}: it has {', '.join(RULES)}")
        rule = RULES[name]

        def against_baseline(evaluation: Evaluation, baseline: Baseline) -> Check:
            alpha = self._share(rule)
            return self._asserted(
                lambda: self._session.against_baseline(rule, evaluation, baseline, alpha)
            )

        def against_base(trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
            alpha = self._share(rule)
            return self._asserted(lambda: self._session.against_base(rule, trained, base, alpha))

        judge: Callable[..., Check] = (
            against_baseline if rule.against == "baseline" else against_base
        )
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

    def _asserted(self, judge: Callable[[], Check]) -> Check:
        from grpo_harness.text import plain

        check = clearly(judge)
        carry_check(self._node, check.asdict())
        carry_notices(self._node, self._session)
        option = self._node.config.getoption
        if check.verdict == "UNPROVEN" and option("grpo_skip_unproven"):
            pytest.skip(plain(f"UNPROVEN: {check.reason}"))
        failing = ("FAIL", "ERROR", *(["UNPROVEN"] if option("grpo_strict") else []))
        if check.verdict in failing:
            pytest.fail(plain(f"{check.message()}\n  again: {self._again()}"), pytrace=False)
        return check

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
