"""The table of rules: name, question, measure, judge. A new rule is one entry.

The methods of the ``gate`` fixture, the plan, the shares of the risk and the report derive from
`RULES`. A rule compares the numbers of each problem's completions (`Tally`) with those of a
reference, which the caller provides.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

from grpo_harness.evaluation import Evaluation, Group, Tally
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.bounds import ALPHA, IMPROVEMENT, LENGTH, RATE, REWARD, Bounds, Sizes
from grpo_harness.gate.permutation import Rewards
from grpo_harness.gate.verdicts import Evidence, Verdict
from grpo_harness.text import escape

Unit = Literal["%", "tokens", "reward"]
Family = Literal["quality", "form"]

SHARES: Mapping[Family, float] = {"quality": 0.75, "form": 0.25}
"""How families of rules share the risk of a false alarm.

Within a family all checks have equal parts. The part of a family without checks goes to the others.
"""

UNDECLARED = "undeclared"
"""The rule of a test that uses the gate without declaring one; its family is quality."""

_CHANCE = 1e-6
"""Below this probability, problems to which a reward applies on one side only are a change."""

_SHOWN = 3
"""Problems that a message shows, and completions of each."""


@dataclass(frozen=True)
class Terms:
    """The conditions of a judgement.

    ``alpha`` is the check's part of the run's risk. With ``same_policy`` the reference was recorded
    from the policy that is judged. ``sequential`` runs may stop at a decision. With ``allow_floor``
    a recorded accuracy may be too low to lose the margin.
    """

    alpha: float
    same_policy: bool = False
    sequential: bool = False
    allow_floor: bool = False


Tallies = Sequence[Tally]
Judge = Callable[[Tallies, Tallies, Sizes, Terms], Evidence]


def _sized(bounds: Bounds) -> Sizes:
    return Sizes(bounds.margin, bounds.minimum)


_RATE = _sized(RATE)
_REWARD = Sizes(f"{REWARD.margin} sd", f"{REWARD.minimum} sd")


@dataclass(frozen=True)
class Measure:
    """The value that a rule measures on one problem, and how much worse it became."""

    of: Callable[[Tally], float]
    worse: Callable[[float, float], float]
    label: str
    unit: Unit = "%"

    def show(self, value: float) -> str:
        """Return a value of this measure, formatted for a message."""
        return {"tokens": f"{value:.1f}", "reward": f"{value:+.3g}"}.get(self.unit, f"{value:.0%}")


@dataclass(frozen=True)
class Rule:
    """One question that is judged. ``asks`` is the question in full, ``title`` its short name.

    The reference is the policy's ``baseline``, or the ``base`` policy on the same problems.
    ``part`` is what the rule sees of a problem's numbers.
    """

    name: str
    title: str
    asks: str
    measure: Measure
    judge: Judge
    bounds: Sizes = _RATE
    family: Family = "quality"
    against: Literal["baseline", "base"] = "baseline"
    part: Callable[[Tally], Tally] = lambda tally: tally


def _accuracy(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    # The likelihood ratio of one common drop would count differences between two policies as
    # evidence, so another policy is always judged on all planned problems.
    bounds = sizes.of(_rate(then))
    if terms.sequential and terms.same_policy:
        sides = _counts(now) + _counts(then)
        return gate.judge_sequential(*sides, alpha=terms.alpha, bounds=bounds)
    sides = _counts(now) + _counts(then[: len(now)])
    return gate.judge(*sides, same_policy=terms.same_policy, alpha=terms.alpha, bounds=bounds)


def _fault(outcome: Literal["truncated", "unparsable"]) -> Judge:
    def judge(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
        sides = _counts(now, outcome) + _counts(then[: len(now)], outcome)
        same, bounds = terms.same_policy, sizes.of(_rate(then, outcome))
        return gate.judge_rate(*sides, same_policy=same, alpha=terms.alpha, bounds=bounds)

    return judge


def _length(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    logs = [[tally.mean_log_length for tally in side] for side in (now, then[: len(now)])]
    k = [tally.k for tally in now]
    # A length changes by a factor, so "10%" is 0.1 whatever was recorded.
    return gate.judge_length(logs[0], k, logs[1], alpha=terms.alpha, bounds=sizes.of(1.0))


def _reward(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    sides = zip(now, then[: len(now)], strict=True)
    # A problem without any score on one side has nothing to compare; `_unlike` has counted them.
    pairs = [(a.total, b.total) for a, b in sides if a.total and b.total]
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    same, alpha = terms.same_policy, terms.alpha
    if all(str(size).endswith("sd") for size in (sizes.margin, sizes.minimum)):
        scale, bounds = None, sizes.of(0.0, 1.0)
    else:
        measured = Rewards.of(ours, theirs)
        scale, bounds = 1.0, sizes.of(measured.means[1], measured.scale)
    return gate.judge_reward(
        ours, theirs, same_policy=same, scale=scale, bounds=bounds, alpha=alpha
    )


def _improvement(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    sides = _counts(now) + _counts(then)
    bounds = sizes.of(_rate(then))
    return gate.judge_improvement(*sides, alpha=terms.alpha, bounds=bounds)


def _counts(tallies: Tallies, outcome: str = "correct") -> tuple[list[int], list[int]]:
    return [getattr(tally, outcome) for tally in tallies], [tally.k for tally in tallies]


def _rate(tallies: Tallies, outcome: str = "correct") -> float:
    return fmean(getattr(tally, outcome) / tally.k for tally in tallies)


def _tallies(groups: Iterable[Group]) -> list[Tally]:
    return [group.tally for group in groups]


def _share(outcome: Literal["correct", "truncated", "unparsable"]) -> Measure:
    def worse(then: float, now: float) -> float:
        return then - now if outcome == "correct" else now - then

    return Measure(lambda tally: getattr(tally, outcome) / tally.k, worse, outcome)


_TOKENS = Measure(
    lambda tally: math.exp(tally.mean_log_length),
    lambda then, now: abs(math.log(now / then)),
    "tokens",
    unit="tokens",
)

_TOTAL = Measure(
    lambda tally: fmean(tally.total) if tally.total else math.nan,
    lambda then, now: then - now,
    "mean reward",
    unit="reward",
)

RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "accuracy",
            "accuracy",
            "Has the share of correct completions dropped?",
            _share("correct"),
            _accuracy,
        ),
        Rule(
            "total",
            "accuracy of all tasks",
            "Has the share of correct completions dropped, over all tasks together?",
            _share("correct"),
            _accuracy,
        ),
        Rule(
            "slices",
            "accuracy of slices",
            "Has the share of correct completions dropped on the rows of one value of a column?",
            _share("correct"),
            _accuracy,
        ),
        Rule(
            "length",
            "length",
            "Have completions become longer or shorter, in tokens?",
            _TOKENS,
            _length,
            bounds=_sized(LENGTH),
            family="form",
        ),
        Rule(
            "truncation",
            "truncation",
            "Has the share of completions that the token limit cut off risen?",
            _share("truncated"),
            _fault("truncated"),
            family="form",
        ),
        Rule(
            "unparsable",
            "unparsable answers",
            "Has the share of completions without a readable answer risen?",
            _share("unparsable"),
            _fault("unparsable"),
            family="form",
        ),
        Rule(
            "reward",
            "reward",
            "Has the mean total reward dropped?",
            _TOTAL,
            _reward,
            bounds=_REWARD,
        ),
        Rule(
            "rewards",
            "rewards",
            "Has the mean of one of several rewards dropped?",
            _TOTAL,
            _reward,
            bounds=_REWARD,
        ),
        Rule(
            "no_loss",
            "not worse than base",
            "Is the trained policy at least no worse than its base?",
            _share("correct"),
            _accuracy,
            against="base",
        ),
        Rule(
            "improvement",
            "better than base",
            "Is the trained policy better than its base?",
            _share("correct"),
            _improvement,
            bounds=_sized(IMPROVEMENT),
            against="base",
        ),
    )
}
"""The rules by name; each is a method of the ``gate`` fixture."""


ANSWERS = frozenset({"accuracy", "total", "slices", "unparsable", "no_loss", "improvement"})
"""The rules that ask whether completions are correct, or can be read."""


def of_slice(name: str) -> Rule:
    """Return the rule ``slices`` for one value of a column."""
    rule = RULES["slices"]
    return replace(rule, name=f"{rule.name}.{name}", title=f"accuracy of {name}")


def of_function(name: str) -> Rule:
    """Return the rule ``rewards`` for one of several functions."""

    def part(tally: Tally) -> Tally:
        return replace(tally, total=tally.rewards.get(name, ()))

    rule = RULES["rewards"]
    return replace(rule, name=f"{rule.name}.{name}", title=f"reward {name}", part=part)


def shares(planned: Iterable[str], alpha: float = ALPHA) -> dict[str, float]:
    """Return each check's part of the run's risk, by the name of its rule.

    ``planned`` has the rule's name for every check of the run, so a name can occur many times, and
    ``alpha`` is the risk of the run.
    """
    times = Counter(planned)
    families: Counter[Family] = Counter()
    for name, count in times.items():
        families[_family(name)] += count
    asked = sum(SHARES[family] for family in families)
    return {name: alpha * SHARES[_family(name)] / asked / families[_family(name)] for name in times}


def _family(name: str) -> Family:
    return RULES[name].family if name in RULES else "quality"


def recorded_bounds(
    own: Mapping[str, Sizes] = MappingProxyType({}), alpha: float = ALPHA
) -> dict[str, Any]:
    """Return the bounds that a baseline stores, for its later judgement.

    ``own`` has those of the project, by rule, and ``alpha`` is the risk of a run.
    """
    rules = [rule for rule in RULES.values() if rule.against == "baseline"]
    return {
        "alpha": alpha, **{rule.name: asdict(own.get(rule.name, rule.bounds)) for rule in rules}
    }  # fmt: skip


def rates() -> list[str]:
    """Return the names of the rules whose bounds are shares of completions."""
    return [name for name, rule in RULES.items() if rule.bounds == _RATE]


def nothing_to_lose(records: Tallies, sizes: Sizes) -> str:
    """Return why accuracy cannot lose its margin, or an empty text."""
    rate = _rate(records)
    margin = sizes.of(rate).margin
    if rate >= margin or not records:
        return ""
    return (
        f"nothing to lose: {rate:.1%} of the recorded completions are correct, less than the "
        f"margin of {100 * margin:.1f} points, so its loss cannot be found. Record a policy that "
        "can do the task, ask a smaller margin, or set allow_floor = true in "
        "[tool.grpo-harness.gate]"
    )


def side(value: float, unit: Unit) -> str:
    """Return the value of one side, now or then, for a message."""
    shown = {"tokens": f"{value:.1f} tokens", "reward": f"{value:+.4g}"}
    return shown.get(unit, f"{value:.1%}")


def change(value: float, unit: Unit) -> str:
    """Return a difference, in points, in percent of a length, or in a reward's own unit."""
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
                f"90 % interval {lower} to {upper}, p = {e.p:.2g}, "
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
    if reason := _failed(evaluations):
        return replace(check, reason=reason)
    asked, planned = (sum(getattr(e, n) for e in evaluations) for n in ("n", "planned"))
    may_stop = terms.sequential and terms.same_policy and len(evaluations) == 1
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
    evidence = rule.judge(now, then, rule.bounds, terms)
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
    if reason := _no_pairs(trained, base) or _failed([*trained, *base]):
        return replace(check, reason=reason)
    # In sequential runs, one side may have been asked more problems than the other.
    pairs = [
        pair
        for ours, theirs in zip(trained, base, strict=True)
        for pair in zip(ours.groups, theirs.groups, strict=False)
    ]
    now, then = [group for group, _ in pairs], _tallies(group for _, group in pairs)
    evidence = rule.judge(_tallies(now), then, rule.bounds, terms)
    return _closed(check, rule, evidence, now, then)


def decided(
    groups: Sequence[Group], records: Tallies, alpha: float, rule: Rule = RULES["accuracy"]
) -> bool:
    """Tell whether a sequential run may stop after ``groups`` of the planned ``records``."""
    terms = Terms(alpha, same_policy=True, sequential=True)
    return rule.judge(_tallies(groups), records, rule.bounds, terms).verdict in ("PASS", "FAIL")


def plan(records: Tallies, k: int, alpha: float, rule: Rule = RULES["accuracy"]) -> gate.Plan:
    """Predict which drop of accuracy a run of the recorded policy can find."""
    bounds = rule.bounds.of(_rate(records))
    return gate.plan(*_counts(records), k, alpha=alpha, bounds=bounds)


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
        asked = [(e.task, e.questions.ids) for e in (ours, theirs)]
        if asked[0] != asked[1]:
            return (
                f"not comparable: {ours.planned} problems of {ours.task} were asked of "
                f"{ours.policy}, and {theirs.planned} of {theirs.task} of {theirs.policy}: ask "
                "both the same"
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
            f"recorded, and no longer to {lacks}: what it is has changed"
        )
    return "" if lacks + more < len(pairs) else "the reward applies to no completion"


def _by_chance(pairs: Sequence[tuple[Tally, Tally]], alone: int) -> bool:
    """Tell whether ``alone`` problems can have scores on one side only without a change.

    A reward may be ``None`` by what a completion says. If both sides draw alike, the scored ones of
    a problem are a random part of all its completions.
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


def _failed(evaluations: Sequence[Evaluation]) -> str:
    failed = [
        f"{missing} of {len(outcomes)} ({evaluation.policy} on {evaluation.task})"
        for evaluation in evaluations
        if (missing := (outcomes := [c.outcome for c in evaluation.completions]).count("error"))
    ]
    if not failed:
        return ""
    return (
        f"completions could not be drawn: {', '.join(failed)}. Nothing is judged if some are "
        "missing: see the samples' errors, free memory (--grpo-device, fewer samples), run again"
    )
