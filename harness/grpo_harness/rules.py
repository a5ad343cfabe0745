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

from grpo_harness.evaluation import Tally
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.bounds import (
    ALPHA,
    IMPROVEMENT,
    LENGTH,
    LENIENT,
    RATE,
    REWARD,
    Bounds,
    Sizes,
)
from grpo_harness.gate.permutation import Rewards
from grpo_harness.gate.verdicts import Evidence

Unit = Literal["%", "tokens", "reward"]
Family = Literal["quality", "form"]

SHARES: Mapping[Family, float] = {"quality": 0.75, "form": 0.25}
"""How families of rules share the risk of a false alarm.

Within a family all checks have equal parts. The part of a family without checks goes to the others.
"""

UNDECLARED = "undeclared"
"""The rule of a test that uses the gate without declaring one; its family is quality."""


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

    @property
    def may_stop(self) -> bool:
        """Tell whether a run may end before its plan does: only that of the recorded policy."""
        return self.sequential and self.same_policy

    def early(self, now: Sequence[Tally], then: Sequence[Tally]) -> bool:
        """Tell whether a run that may stop is judged before all of ``then`` were asked."""
        return self.may_stop and len(now) < len(then)


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
    bounds = sizes.of(rate(then))
    if terms.may_stop:
        sides = counts(now) + counts(then)
        return gate.judge_sequential(*sides, alpha=terms.alpha, bounds=bounds)
    sides = counts(now) + counts(then[: len(now)])
    return gate.judge(*sides, same_policy=terms.same_policy, alpha=terms.alpha, bounds=bounds)


def _fault(outcome: Literal["truncated", "unparsable", "lenient"]) -> Judge:
    def judge(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
        same, bounds = terms.same_policy, sizes.of(rate(then, outcome))
        if terms.may_stop:
            sides = counts(now, outcome) + counts(then, outcome)
            return gate.judge_sequential(*sides, alpha=terms.alpha, bounds=bounds, fault=True)
        sides = counts(now, outcome) + counts(then[: len(now)], outcome)
        return gate.judge_rate(*sides, same_policy=same, alpha=terms.alpha, bounds=bounds)

    return judge


def _length(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    logs = [[tally.mean_log_length for tally in side] for side in (now, then[: len(now)])]
    k, early = [tally.k for tally in now], terms.early(now, then)
    # A length changes by a factor, so "10%" is 0.1 whatever was recorded.
    bounds = sizes.of(1.0)
    return gate.judge_length(logs[0], k, logs[1], alpha=terms.alpha, bounds=bounds, early=early)


def _earned(now: Tallies, then: Tallies) -> tuple[list[Any], list[Any]]:
    """Return the rewards of both sides, of the problems that have some on both."""
    pairs = [(a.total, b.total) for a, b in zip(now, then, strict=True) if a.total and b.total]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _reward(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    # A problem without any score on one side has nothing to compare; `_unlike` has counted them.
    ours, theirs = _earned(now, then[: len(now)])
    same, alpha, scale = terms.same_policy, terms.alpha, None
    measured = Rewards.of(ours, theirs)
    in_deviations = [str(size).endswith("sd") for size in (sizes.margin, sizes.minimum)]
    if all(in_deviations) or (in_deviations[0] and not measured.scale):
        bounds = sizes.of(0.0, 1.0)
    else:
        scale, bounds = 1.0, sizes.of(measured.means[1], measured.scale)
    return gate.judge_reward(
        ours, theirs, same_policy=same, scale=scale, bounds=bounds, alpha=alpha,
        early=terms.early(now, then),
    )  # fmt: skip


def _improvement(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    sides = counts(now) + counts(then)
    bounds = sizes.of(rate(then))
    return gate.judge_improvement(*sides, alpha=terms.alpha, bounds=bounds)


def _hacking(now: Tallies, then: Tallies, sizes: Sizes, terms: Terms) -> Evidence:
    sides = counts(now) + counts(then)
    bounds = sizes.of(rate(then))
    return gate.judge_hacking(*sides, *_earned(now, then), bounds=bounds, alpha=terms.alpha)


def counts(tallies: Tallies, outcome: str = "correct") -> tuple[list[int], list[int]]:
    """Return how many completions of each problem have an outcome, and how many it has in all."""
    return [getattr(tally, outcome) for tally in tallies], [tally.k for tally in tallies]


def rate(tallies: Tallies, outcome: str = "correct") -> float:
    """Return the mean over problems of the share of an outcome."""
    return fmean(getattr(tally, outcome) / tally.k for tally in tallies)


def _share(
    outcome: Literal["correct", "truncated", "unparsable", "lenient"], label: str = ""
) -> Measure:
    def worse(then: float, now: float) -> float:
        return then - now if outcome == "correct" else now - then

    return Measure(lambda tally: getattr(tally, outcome) / tally.k, worse, label or outcome)


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
        Rule(
            "lenient",
            "correct by the lenient reading alone",
            "Has the share of correct completions that are not exactly the answer risen over base?",
            _share("lenient", "correct, and not exactly the answer"),
            _fault("lenient"),
            bounds=_sized(LENIENT),
            family="form",
            against="base",
        ),
        Rule(
            "hacking",
            "reward without correctness",
            "Has the mean reward risen over base while the share of correct completions dropped?",
            _share("correct"),
            _hacking,
            against="base",
        ),
    )
}
"""The rules by name; each is a method of the ``gate`` fixture."""


ANSWERS = frozenset(
    ("accuracy", "total", "slices", "unparsable", "no_loss", "improvement", "lenient", "hacking")
)
"""The rules that ask whether completions are correct, or can be read."""

PARTS = frozenset({"rewards", "slices", "lenient"})
"""The rules that judge parts of what another judges: a task that has none lacks nothing."""

TOGETHER = "total"
"""The rule that judges all tasks at once: no task can have bounds of its own for it."""


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


def bounded(rule: Rule, bounds: Mapping[str, Sizes]) -> Rule:
    """Return a rule with the project's own bounds, if it has some."""
    own = bounds.get(rule.name.partition(".")[0])
    return rule if own is None else replace(rule, bounds=own)


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


def asked(
    tasks: Iterable[Callable[[str], bool]], candidates: int, *, total: bool = True
) -> list[str]:
    """Return the rule's name for every check of all rules, on a base and some candidates.

    Each of ``tasks`` tells whether a rule has something to judge on it. Those of ``total`` and of
    the improvement over base are one for each policy, all others one for each task too.
    """
    found, tasks = list[str](), list(tasks)
    for name, rule in RULES.items():
        times = candidates + (rule.against == "baseline")
        on = sum(asks(name) for asks in tasks)
        if name == TOGETHER:
            on = int(total and on > 1)
        elif name == "improvement":
            on = min(on, 1)
        found += [name] * (times * on)
    return found


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
    recorded = rate(records)
    margin = sizes.of(recorded).margin
    if recorded >= margin or not records:
        return ""
    return (
        f"nothing to lose: {recorded:.1%} of the recorded completions are correct, less than the "
        f"margin of {100 * margin:.1f} points, so its loss cannot be found. Record a policy that "
        "can do the task, ask a smaller margin, or set allow_floor = true in "
        "[tool.grpo-harness.gate]"
    )
