"""The gate's rules as a suite asserts them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from grpo_harness.plugin.state import SETTABLE, carry

if TYPE_CHECKING:
    from grpo_harness.baselines.file import Baseline
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.rules import Check, Rules
    from grpo_harness.session import Session


class Gate:
    """The gate's rules as assertions: each judges, reports, and fails the test on harm.

    FAIL and ERROR fail the test. UNPROVEN is reported and counted beside passed and failed, and
    fails it under ``--grpo-strict``.
    """

    def __init__(self, session: Session, node: pytest.Item) -> None:
        self._session = session
        self._node = node
        self._asked = 0

    def accuracy(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when the share of correct completions has dropped."""
        return self._against("accuracy", evaluation, baseline)

    def length(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when completions have become longer or shorter."""
        return self._against("length", evaluation, baseline)

    def truncation(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when more completions are cut off by the token limit."""
        return self._against("truncation", evaluation, baseline)

    def unparsable(self, evaluation: Evaluation, baseline: Baseline) -> Check:
        """Fail when more completions hold no readable answer."""
        return self._against("unparsable", evaluation, baseline)

    def improvement(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Fail when the trained policy is proven worse than its base; pass when proven better."""
        return self._between("improvement", trained, base)

    def no_loss(self, trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> Check:
        """Fail when the trained policy is worse than its base, or is its base."""
        return self._between("no_loss", trained, base)

    def _against(self, rule: str, evaluation: Evaluation, baseline: Baseline) -> Check:
        def judge(rules: Rules, evaluations: Sequence[Evaluation]) -> Check:
            check: Check = getattr(rules, rule)(*evaluations, baseline)
            return check

        return self._judge(rule, [evaluation], baseline.digest, judge)

    def _between(
        self, rule: str, trained: Sequence[Evaluation], base: Sequence[Evaluation]
    ) -> Check:
        def judge(rules: Rules, evaluations: Sequence[Evaluation]) -> Check:
            sides = evaluations[: len(trained)], evaluations[len(trained) :]
            check: Check = getattr(rules, rule)(*sides)
            return check

        return self._judge(rule, [*trained, *base], "base", judge)

    def _judge(
        self,
        rule: str,
        evaluations: Sequence[Evaluation],
        reference: str,
        judge: Callable[[Rules, Sequence[Evaluation]], Check],
    ) -> Check:
        check = self._session.judge(rule, evaluations, reference, judge, again=self._asked)
        self._asked += 1
        carry(self._node, "check", check.asdict())
        strict = self._node.config.getoption("grpo_strict")
        if check.name in ("FAIL", "ERROR", *(["UNPROVEN"] if strict else [])):
            pytest.fail(f"{check.message()}\n  again: {self._again()}", pytrace=False)
        return check

    def _again(self) -> str:
        """The command that draws and judges the same once more.

        By itself: the attempts know how many checks shared the risk when its samples were drawn.
        """
        words = ["pytest", shlex.quote(self._node.nodeid), f"--grpo-seed={self._session.run_seed}"]
        for name in (*SETTABLE, "strict"):
            value = self._node.config.getoption(f"grpo_{name}")
            if value is not None and value is not False:
                said = "" if value is True else f"={shlex.quote(str(value))}"
                words.append(f"--grpo-{name}{said}")
        return " ".join(words)
