"""Compare every two of some policies on every task, and on all together, as one family of tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, TypeAlias

from grpo_harness import checks
from grpo_harness.checks import Check
from grpo_harness.errors import HarnessError
from grpo_harness.evaluation import Evaluation
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.bounds import Bounds, Sizes
from grpo_harness.gate.stats import holm
from grpo_harness.gate.verdicts import Evidence, Verdict
from grpo_harness.report.report import DIFFERENCE
from grpo_harness.rules import RULES, Tallies, Terms, bounded, counts, rate

Relation: TypeAlias = Literal["better", "worse", "equivalent", "not told apart"]

_VERDICTS: Mapping[Relation, Verdict] = {
    "better": "PASS",
    "equivalent": "PASS",
    "worse": "FAIL",
    "not told apart": "UNPROVEN",
}
"""What a report, which knows the gate's verdicts alone, says: is it no worse than the other?"""


@dataclass(frozen=True)
class Pair:
    """What was found of a policy against another, on a task or on all together.

    ``evidence`` is that of ``check``; its ``p`` is two-sided, and ``adjusted`` is that by Holm's
    method, over all pairs and tasks.
    """

    check: Check
    evidence: Evidence
    adjusted: float
    relation: Relation

    @property
    def opposite(self) -> Relation:
        """The relation of the other policy to this one."""
        turned: dict[Relation, Relation] = {"better": "worse", "worse": "better"}
        return turned.get(self.relation, self.relation)


def _difference(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    """Test both directions, on new problems too: any proven difference counts, however small."""
    ours, theirs = counts(now), counts(then)
    bounds = Bounds(sizes.of(rate(then)).margin, 0.0)
    alpha = terms.alpha / 2
    drop = gate.judge(*ours, *theirs, same_policy=False, bounds=bounds, alpha=alpha)
    rise = gate.judge(*theirs, *ours, same_policy=False, bounds=bounds, alpha=alpha)
    return replace(drop, p=min(1.0, 2 * min(drop.p, rise.p)))


_RULE = replace(
    RULES["no_loss"],
    title="no worse than the other",
    asks="Are the two policies equally often correct?",
    judge=_difference,
)


def compare(
    policies: Sequence[Sequence[Evaluation]], bounds: Sequence[Mapping[str, Sizes]], alpha: float
) -> list[Pair]:
    """Judge every policy against every one before it, on every task and on all together.

    ``policies`` has the evaluations of each on the same tasks. ``bounds`` are those of each task,
    and after them those of all together. ``alpha`` is the risk that any two equal policies are told
    apart, over the whole family. Raises ``HarnessError`` where nothing can be judged.
    """
    tasks = len(policies[0])
    parts = [slice(i, i + 1) for i in range(tasks)] + [slice(None)] * (tasks > 1)
    own = [*bounds[:tasks], bounds[-1]][: len(parts)]
    family = len(parts) * len(policies) * (len(policies) - 1) // 2
    found: list[tuple[Check, Evidence]] = []
    for other, policy in combinations(policies, 2):
        for part, sizes in zip(parts, own, strict=True):
            # A report has one entry for a rule, a policy and a task: with the other in its name,
            # the rule has one for each pair.
            name = f"{DIFFERENCE}.{other[0].questions.policy.slug}"
            rule = replace(bounded(_RULE, sizes), name=name)
            check = checks.against_base(rule, policy[part], other[part], Terms(alpha / family))
            if check.evidence is None or check.verdict == "ERROR":
                raise HarnessError(f"{check.policy} and {check.reference}: {check.reason}")
            found.append((check, check.evidence))
    adjusted = holm([evidence.p for _, evidence in found])
    return [_pair(*of, p, alpha) for of, p in zip(found, adjusted, strict=True)]


def _pair(check: Check, e: Evidence, adjusted: float, alpha: float) -> Pair:
    relation: Relation = "not told apart"
    reason = (
        f"not told apart from it: p = {adjusted:.2g} over all pairs and tasks; nine times in ten, "
        f"a difference of {100 * e.mde90:.1f} points would have been found"
    )
    if adjusted <= alpha:
        relation = "better" if e.delta > 0 else "worse"
        reason = f"proven {relation}, p = {adjusted:.2g} over all pairs and tasks"
    elif -e.margin < e.lower and e.upper < e.margin:
        relation = "equivalent"
        reason = f"a difference of {100 * e.margin:g} points or more, either way, is ruled out"
    evidence = replace(e, verdict=_VERDICTS[relation], reason=reason)
    changed = check.changed if relation == "worse" else ()
    return Pair(
        replace(check, evidence=evidence, reason=reason, changed=changed),
        evidence,
        adjusted,
        relation,
    )


def overall(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs on all tasks together, or on the only one."""
    last = pairs[-1].check.task_type
    return [pair for pair in pairs if pair.check.task_type == last]


def best(pairs: Sequence[Pair]) -> str | None:
    """Return the policy that is proven better than every other, overall; ``None`` if none is."""
    found = _relations(pairs).items()
    return next((name for name, own in found if {*own} == {"better"}), None)


def unbeaten(pairs: Sequence[Pair]) -> list[str]:
    """Return the policies that are not proven worse than any other, overall."""
    return [name for name, own in _relations(pairs).items() if "worse" not in own]


def _relations(pairs: Sequence[Pair]) -> dict[str, list[Relation]]:
    """Return the relations of each policy to all others."""
    relations: dict[str, list[Relation]] = {}
    for pair in overall(pairs):
        relations.setdefault(pair.check.reference, []).append(pair.opposite)
        relations.setdefault(pair.check.policy, []).append(pair.relation)
    return relations
