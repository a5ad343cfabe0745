"""Judge evaluations by a rule against a reference, and say what was found.

A `Check` is the answer to one question: its verdict, its evidence, and the problems that changed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from grpo_harness.evaluation import Evaluation, Group, Tally
from grpo_harness.gate.permutation import Rewards
from grpo_harness.gate.plan import Noise, Planner
from grpo_harness.gate.verdicts import Evidence, Verdict, chance
from grpo_harness.rules import RULES, Rule, Tallies, Terms, Unit, counts, nothing_to_lose
from grpo_harness.text import escape

_CHANCE = 1e-6
"""Below this probability, problems to which a reward applies on one side only are a change.

It is not part of the run's risk, which a hundred such checks raise by a hundredth of it at most.
"""

_SHOWN = 3
"""Problems that a message shows, and completions of each."""


OF_CHANGES: Mapping[Unit, str] = {"%": " points", "tokens": " %", "reward": ""}
"""What follows a `change` in a sentence."""


def side(value: float, unit: Unit) -> str:
    """Return the value of one side, now or then, for a message."""
    shown = {"tokens": f"{value:.1f} tokens", "reward": f"{value:+.4g}"}
    return shown.get(unit, f"{value:.1%}")


def change(value: float, unit: Unit) -> str:
    """Return a difference, in points, in percent of a length, or in a reward's own unit."""
    if unit == "%" and math.isfinite(value):  # the bounds of an interval may lie beyond what can be
        value = min(max(value, -1.0), 1.0)
    return f"{value:+.3g}" if unit == "reward" else f"{100 * value:+.1f}"


@dataclass(frozen=True)
class Check:
    """One judged question about one policy and task type.

    ``evidence`` is ``None`` when the two sides could not be compared at all; ``reason`` says why.
    ``unit`` is that of the two sides: ``%`` of completions, or ``tokens``. ``changed`` shows the
    problems that got worse.
    """

    rule: str
    title: str
    task_type: str
    policy: str
    reference: str
    against: Literal["baseline", "base"] = "baseline"
    reason: str = ""
    evidence: Evidence | None = None
    changed: tuple[str, ...] = ()
    unit: Unit = "%"

    @property
    def verdict(self) -> Verdict:
        """PASS, FAIL, UNPROVEN or ERROR."""
        return self.evidence.verdict if self.evidence else "ERROR"

    def message(self) -> str:
        """Return the result in a few lines for the user."""
        lines = [f"{self.verdict}: {self.title} of {escape(self.policy)} on {self.task_type}"]
        if e := self.evidence:
            now, then = (side(x, self.unit) for x in (e.now, e.then))
            delta, lower, upper = (change(x, self.unit) for x in (e.delta, e.lower, e.upper))
            unit = {"tokens": "%", "reward": ""}.get(self.unit, " points")
            lines.append(
                f"  {then} ({escape(self.reference)}) -> {now}: {delta}{unit}, "
                f"90 % interval {lower} to {upper}, {chance(e.p)}, "
                f"n = {e.n} problems x {e.k} samples"
            )
        lines.append(f"  {self.reason}")
        lines += [f"  {line}" for line in self.changed]
        if self.verdict == "FAIL" and self.against == "baseline":
            why = " --grpo-accept-regression 'why'" if self.rule == "accuracy" else ""
            lines.append(f"  if it is meant: --grpo-record{why}")
        return "\n".join(lines)

    def asdict(self) -> dict[str, Any]:
        """Return the check as plain numbers and texts."""
        return {**asdict(self), "verdict": self.verdict}


def against_baseline(
    rule: Rule, evaluations: Sequence[Evaluation], reference: str, records: Tallies, terms: Terms
) -> Check:
    """Judge evaluations of a policy against the records of all planned problems, in their order.

    Only one evaluation may have stopped early.
    """
    check = opened(rule, _named(evaluations), evaluations[0].policy, reference)
    if reason := failed(evaluations):
        return replace(check, reason=reason)
    asked, planned = (sum(getattr(e, n) for e in evaluations) for n in ("n", "planned"))
    may_stop = terms.may_stop and len(evaluations) == 1
    if asked < planned and not may_stop:
        return replace(
            check,
            reason=f"{asked} of {planned} planned problems were asked, and the run was not to "
            "stop early: completions are missing",
        )
    groups = [group for evaluation in evaluations for group in evaluation.groups]
    now = [rule.part(tally) for tally in _tallies(groups)]
    then = [rule.part(tally) for tally in records]
    floor = nothing_to_lose(then, rule.bounds) if rule.name == "accuracy" else ""
    if reason := _unlike(rule, now, then) or ("" if terms.allow_floor else floor):
        return replace(check, reason=reason)
    try:
        evidence = rule.judge(now, then, rule.bounds, terms)
    except ValueError as error:  # rewards of sizes that no test can compare
        return replace(check, reason=str(error))
    return _closed(check, rule, evidence, groups, then)


def _named(evaluations: Sequence[Evaluation]) -> str:
    return evaluations[0].task if len(evaluations) == 1 else "all"


def against_base(
    rule: Rule, trained: Sequence[Evaluation], base: Sequence[Evaluation], terms: Terms
) -> Check:
    """Judge a trained policy against its base on the same problems, over all evaluations.

    Raises ``ValueError`` unless the evaluations of the two are pairs, at least one.
    """
    if not trained or len(trained) != len(base):
        raise ValueError(
            f"{len(trained)} evaluations of the trained policy and {len(base)} of the base: "
            "they are compared in pairs, and there must be one"
        )
    check = opened(rule, _named(trained), trained[0].policy, base[0].policy)
    if reason := _no_pairs(trained, base) or failed([*trained, *base]):
        return replace(check, reason=reason)
    # One side may have been asked more problems than the other, or have stopped later.
    pairs = [
        pair
        for ours, theirs in zip(trained, base, strict=True)
        for pair in zip(ours.groups, theirs.groups, strict=False)
    ]
    now, then = [group for group, _ in pairs], _tallies(group for _, group in pairs)
    try:
        evidence = rule.judge(_tallies(now), then, rule.bounds, terms)
    except ValueError as error:  # rewards of sizes that no test can compare, or on no problem
        return replace(check, reason=str(error))
    return _closed(check, rule, evidence, now, then)


def planner(
    records: Tallies, alpha: float, rule: Rule = RULES["accuracy"], *, sequential: bool = False
) -> Planner:
    """Return what plans a rule's run on the problems of ``records``, in their order.

    Raises ``ValueError`` if there is nothing to plan by.
    """
    if rule.measure.unit != "reward":
        noise = Noise.of_counts(*counts(records))
        return Planner(noise, rule.bounds.of, alpha, sequential)
    totals = [tally.total for tally in records]
    if not any(totals):
        raise ValueError("the reward applies to no completion")
    mean = fmean(value for values in totals for value in values)
    # To a problem without any score the reward may apply next time.
    table = [values or (mean,) for values in totals]
    bounds = rule.bounds.of(mean, Rewards.of(table, table).scale or 1.0)
    return Planner(Noise.of_rewards(table), bounds, alpha)


def opened(rule: Rule, task_type: str, policy: str, reference: str, reason: str = "") -> Check:
    """Return a check without evidence; ``reason`` says why it cannot be judged, if so."""
    return Check(
        rule.name,
        rule.title,
        task_type,
        policy,
        reference,
        against=rule.against,
        reason=reason,
        unit=rule.measure.unit,
    )


def _closed(
    check: Check, rule: Rule, evidence: Evidence, now: Sequence[Group], then: Tallies
) -> Check:
    changed = _worst(now, then, rule) if evidence.verdict == "FAIL" else ()
    return replace(check, reason=evidence.reason, evidence=evidence, changed=changed)


def _worst(now: Sequence[Group], then: Tallies, rule: Rule) -> tuple[str, ...]:
    """Show the problems that changed most in the direction of the whole, with completions."""
    measure = rule.measure
    # A sequential run may have asked fewer problems than the reference holds.
    tallies = [rule.part(group.tally) for group in now]
    sides = [(measure.of(b), measure.of(a)) for a, b in zip(tallies, then, strict=False)]
    harm = [measure.worse(before, after) for before, after in sides]
    harm = [0.0 if math.isnan(by) else by for by in harm]
    if sum(harm) < 0:  # the recorded policy got better, which only changed code can have done
        harm = [-by for by in harm]
    most = sorted(range(len(sides)), key=lambda i: -harm[i])[:_SHOWN]
    answers = [group.problem.answer for group in now]
    wanted = ["" if a is None else f"wanted {_quoted(str(a))}, " for a in answers]
    return tuple(
        f"{now[i].problem.id}: {measure.show(sides[i][0])} -> {measure.show(sides[i][1])} "
        f"{measure.label}, {wanted[i]}now "
        + " | ".join(_quoted(completion.text) for completion in now[i].completions[:_SHOWN])
        for i in most
        if harm[i] > 0
    )


def _quoted(text: str) -> str:
    # Not repr(), which would escape the text a second time.
    return f"'{escape(text, 40)}'"


def _no_pairs(trained: Sequence[Evaluation], base: Sequence[Evaluation]) -> str:
    """Return why evaluations of trained and base cannot be compared, or an empty text."""
    for ours, theirs in zip(trained, base, strict=True):
        if ours.fingerprint.weights == theirs.fingerprint.weights:
            return (
                f"the trained policy {ours.policy} is the base policy {theirs.policy}: both have "
                f"the same weights (fingerprints {ours.fingerprint} and {theirs.fingerprint}). "
                "Point --grpo-trained at what was trained"
            )
        # Each may be asked as many as it needs: they are compared on those that both were asked.
        common = min(ours.planned, theirs.planned)
        asked = [(e.task, e.questions.ids[:common]) for e in (ours, theirs)]
        if asked[0] != asked[1]:
            return (
                f"not comparable: the problems of {ours.task} that were asked of {ours.policy} are "
                f"not those of {theirs.task} that were asked of {theirs.policy}: ask both the same"
            )
        # End tokens may differ between policies.
        sampling = [{**e.questions.settings, "eos_token_ids": None} for e in (ours, theirs)]
        if sampling[0] != sampling[1]:
            return f"not comparable: {ours.policy} and {theirs.policy} were sampled differently"
    return ""


def _unlike(rule: Rule, now: Tallies, then: Tallies) -> str:
    """Return why rewards cannot be compared, or an empty text."""
    if rule.measure.unit != "reward":
        return ""
    pairs = [(a, b) for a, b in zip(now, then, strict=False) if a.total or b.total]
    lacks, more = sum(not a.total for a, _ in pairs), sum(not b.total for _, b in pairs)
    if more == len(now):
        return "the baseline was recorded without single rewards: record it anew, --grpo-record"
    if not _by_chance(pairs, lacks + more):
        return (
            f"the reward applies to {more} problems where it did not when the baseline was "
            f"recorded, and no longer to {lacks}: it has changed, or what the policy writes has"
        )
    return "" if lacks + more < len(pairs) else "the reward applies to no completion"


def _by_chance(pairs: Sequence[tuple[Tally, Tally]], alone: int) -> bool:
    """Tell whether ``alone`` problems can have scores on one side only without a change.

    A reward may be ``None`` by what a completion says. If both sides draw alike, the scored ones of
    a problem are a random part of all its completions. The number of problems is then a sum of
    independent chances, whose tail Chernoff's bound exceeds: the true risk is below `_CHANCE`.
    Another policy may draw otherwise; the problems that remain would then be a selection, which is
    not comparable either.
    """
    expected = 0.0
    for a, b in pairs:
        k = len(a.total) + len(b.total)
        expected += (math.comb(a.k, k) + math.comb(b.k, k)) / math.comb(a.k + b.k, k)
    if alone <= expected:
        return True
    # Chernoff's bound of the probability of so many, or 0 if none can be.
    log = alone - expected + alone * math.log(expected / alone) if expected else -math.inf
    return log > math.log(_CHANCE)


def failed(evaluations: Sequence[Evaluation]) -> str:
    """Return which completions could not be drawn, or an empty text."""
    missed = [
        f"{missing} of {len(outcomes)} ({evaluation.policy} on {evaluation.task})"
        for evaluation in evaluations
        if (missing := (outcomes := [c.outcome for c in evaluation.completions]).count("error"))
    ]
    if not missed:
        return ""
    return (
        f"completions could not be drawn: {', '.join(missed)}. Nothing is judged if some are "
        "missing: see the samples' errors, free memory (--grpo-device, fewer samples), run again"
    )


def _tallies(groups: Iterable[Group]) -> list[Tally]:
    return [group.tally for group in groups]
