"""Does GRPO still learn? Judges a few short runs by what they gain, never by their loss.

The on-policy loss says nothing: it is about zero whatever is learned. A mean reward alone can be
gamed: if hardly any completion is correct, only the length penalty differs within a group, and at a
high rate the policy learns to write nothing, which gains a little. So there are four separate
criteria: the reward rises by more than shorter completions can gain, held-out accuracy rises,
completions do not become too short, and the run's own figures stay in bounds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from grpo_harness.evaluation import Tally
from grpo_harness.gate.bounds import ALPHA
from grpo_harness.gate.stats import Estimate
from grpo_harness.gate.verdicts import Evidence
from grpo_harness.logs.figures import FIFTH
from grpo_harness.rules import RULES, Terms

Answers = tuple[Tally, ...]
"""The results of one policy on held-out problems, in their order."""


@dataclass(frozen=True)
class Trial:
    """One short run: its seed, the log of every step, its rewards and the trained policy's results.

    ``first`` and ``last`` are mean rewards in the first and in the last fifth of the steps, one
    entry per problem, in the same order (see :func:`ends`). ``answers`` are the trained policy's
    results on held-out problems, which are the same in every trial.
    """

    seed: int
    log: tuple[Mapping[str, float], ...]
    first: tuple[float, ...]
    last: tuple[float, ...]
    answers: Answers


@dataclass(frozen=True)
class Limits:
    """The limits of the learning test.

    The lower bound of the gain at ``confidence`` must exceed ``gain``: more than shorter
    completions alone can gain (0.002 per character, and few completions have thirty), and more than
    the gains seen under meaningless rewards. ``length`` is the least ratio of lengths, after over
    before, on held-out problems. The other figures bound the mean over the last fifth of the steps,
    in every run on its own. They lie beyond the worst run of the recipe ``learn`` by a factor of
    two or more (``nano/LEARNING.md`` has the runs and their figures). The collapse ends beyond
    them: all groups without spread, a KL above 5, an entropy below 0.05.
    """

    gain: float = 0.1
    confidence: float = 0.99
    length: float = 0.5
    frac_reward_zero_std: float = 0.75
    clipped_ratio: float = 0.5
    kl: float = 2.0
    entropy: float = 0.1
    grad_norm: tuple[float, float] = (0.05, 5.0)

    def bands(self) -> Iterator[tuple[str, float, float]]:
        """Yield every logged figure that is bounded, with its least and its greatest value."""
        yield "frac_reward_zero_std", 0.0, self.frac_reward_zero_std
        yield "completions/clipped_ratio", 0.0, self.clipped_ratio
        yield "kl", -math.inf, self.kl
        yield "entropy", self.entropy, math.inf
        yield "grad_norm", *self.grad_norm


@dataclass(frozen=True)
class Gain:
    """The rise of the reward over all trials' problems: two means, and their difference."""

    first: float
    last: float
    estimate: Estimate


@dataclass(frozen=True)
class Learning:
    """The result of a learning test.

    ``broken`` has a sentence for each criterion that does not hold, by name: ``gain``,
    ``accuracy``, ``length`` or a logged figure. ``lower`` is the gain's lower bound, ``length`` the
    ratio of geometric mean lengths on held-out problems, after over before.
    """

    gain: Gain
    lower: float
    accuracy: Evidence
    length: float
    broken: Mapping[str, str]

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """PASS if every criterion holds."""
        return "FAIL" if self.broken else "PASS"

    @property
    def reason(self) -> str:
        """The broken criteria with their numbers, or else what was gained."""
        if self.broken:
            return "; ".join(self.broken.values())
        return (
            f"the reward rose by {self.gain.estimate.mean:.3f} (at least {self.lower:.3f}), "
            f"held-out accuracy from {self.accuracy.then:.1%} to {self.accuracy.now:.1%}"
        )


def ends(steps: Sequence[Sequence[tuple[str, float]]]) -> tuple[list[float], list[float]]:
    """Return each problem's mean reward in the first and in the last fifth of ``steps``.

    A step is its completions' prompts and rewards. Raises ``ValueError`` if there are fewer than
    five steps, if a reward is not finite, and if a problem is asked in only one of the two fifths:
    the comparison is paired, so that easy problems cannot come late by chance.
    """
    if len(steps) < FIFTH:
        raise ValueError(f"{len(steps)} steps have no fifth: at least {FIFTH} are needed")
    n = len(steps) // FIFTH
    parts = [_means(steps[:n], 1), _means(steps[-n:], len(steps) - n + 1)]
    for prompt in sorted(parts[0].keys() ^ parts[1].keys()):
        raise ValueError(
            f"the problem {prompt[-60:]!r} is not asked in both the first and the last {n} of "
            f"{len(steps)} steps: let every step ask all problems"
        )
    return [parts[0][prompt] for prompt in parts[0]], [parts[1][prompt] for prompt in parts[0]]


def _means(steps: Sequence[Sequence[tuple[str, float]]], number: int) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for i, step in enumerate(steps, number):
        for prompt, reward in step:
            if not math.isfinite(reward):
                raise ValueError(f"step {i}: the reward is {reward}, not a finite number")
            rewards.setdefault(prompt, []).append(reward)
    return {prompt: fmean(values) for prompt, values in rewards.items()}


def gain(trials: Sequence[Trial]) -> Gain:
    """Return how much the reward rose from the first to the last fifth, over all trials.

    The same problems are asked in both fifths; one observation is the difference of a problem's two
    means in one trial. Raises ``ValueError`` for no trials, and for a trial whose two sides are
    empty, of unequal length or not finite, with its seed.
    """
    if not trials:
        raise ValueError("there are no trials to judge")
    for trial in trials:
        if not trial.first or len(trial.first) != len(trial.last):
            raise ValueError(
                f"seed {trial.seed}: {len(trial.first)} problems in the first fifth and "
                f"{len(trial.last)} in the last: they are compared in pairs"
            )
        if not all(map(math.isfinite, (*trial.first, *trial.last))):
            raise ValueError(f"seed {trial.seed}: a mean reward is not a finite number")
    first = np.array([value for trial in trials for value in trial.first], dtype=np.float64)
    last = np.array([value for trial in trials for value in trial.last], dtype=np.float64)
    return Gain(float(first.mean()), float(last.mean()), Estimate.of(last - first))


def judge_learning(trials: Sequence[Trial], before: Answers, limits: Limits = Limits()) -> Learning:
    """Judge whether ``trials`` have learned; ``before`` are the results of their start policy.

    Held-out accuracy is judged by the rule ``improvement``, with the completions of all
    trials pooled by problem. Raises ``ValueError`` for what cannot be judged: no trials, fewer than
    five steps, a figure that is missing or not finite, results on other problems.
    """
    found = gain(trials)
    lower = found.estimate.lower(limits.confidence)
    after = _pooled(trials, before)
    rule = RULES["improvement"]
    accuracy = rule.judge(after, before, rule.bounds, Terms(ALPHA))
    now, then = (fmean(tally.mean_log_length for tally in side) for side in (after, before))
    length = math.exp(now - then)
    broken: dict[str, str] = {}
    if lower <= limits.gain:
        broken["gain"] = (
            f"gain: the reward rose by {found.estimate.mean:+.3f} (from {found.first:+.3f} to "
            f"{found.last:+.3f}), of which {lower:+.3f} is certain: more than {limits.gain:+.3f} "
            "is asked"
        )
    if accuracy.verdict != "PASS":
        broken["accuracy"] = (
            f"accuracy: {accuracy.then:.1%} of held-out answers were right before and "
            f"{accuracy.now:.1%} are after ({accuracy.verdict}: {accuracy.reason})"
        )
    if length < limits.length:
        broken["length"] = (
            f"length: held-out answers are {length:.2f} times as long as before, and "
            f"{limits.length:.2f} is the least: completions become empty"
        )
    for name, least, most in limits.bands():
        values = {trial.seed: late(trial, name) for trial in trials}
        seed, value = max(values.items(), key=lambda item: max(item[1] - most, least - item[1]))
        if not least <= value <= most:
            side, bound = ("above", most) if value > most else ("below", least)
            broken[name] = (
                f"{name}: {value:.3f} in the last fifth of the steps (seed {seed}), {side} "
                f"the limit of {bound:g}"
            )
    return Learning(found, lower, accuracy, length, broken)


def late(trial: Trial, name: str) -> float:
    """Return the mean of a logged figure over the last fifth of a trial's steps.

    Raises ``ValueError`` with seed and step if it is missing or not finite, and if there are fewer
    than five steps. A missing figure never counts as one in bounds.
    """
    if len(trial.log) < FIFTH:
        raise ValueError(f"seed {trial.seed}: {len(trial.log)} logged steps, {FIFTH} are needed")
    first = len(trial.log) - len(trial.log) // FIFTH
    values = [row.get(name) for row in trial.log[first:]]
    for step, value in enumerate(values, first + 1):
        if value is None or not math.isfinite(value):
            hint = " (it is logged only with beta above 0)" if name == "kl" else ""
            raise ValueError(f"seed {trial.seed}, step {step}: {name} is {value}{hint}")
    return fmean(value for value in values if value is not None)


def _pooled(trials: Sequence[Trial], before: Answers) -> list[Tally]:
    """Pool all trials' results by problem, as if they were of one policy."""
    for who, answers in [("before", before), *((f"seed {t.seed}", t.answers) for t in trials)]:
        if len(answers) != len(before):
            raise ValueError(
                f"{who}: {len(answers)} problems were answered, and {len(before)} before"
            )
        if not all(math.isfinite(tally.mean_log_length) for tally in answers):
            raise ValueError(f"{who}: the log-length of a problem is not a finite number")
    return [
        Tally(
            k=sum(tally.k for tally in of_one),
            correct=sum(tally.correct for tally in of_one),
            truncated=sum(tally.truncated for tally in of_one),
            unparsable=sum(tally.unparsable for tally in of_one),
            mean_log_length=fmean(tally.mean_log_length for tally in of_one),
        )
        for of_one in zip(*(trial.answers for trial in trials), strict=True)
    ]
