"""Has a run gained reward while the reward that decides correctness fell?

It needs no recorded runs: the first fifth of the steps is compared with the last. That a total
rises is the aim of a training; what is asked is whether the decisive reward has fallen meanwhile.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from grpo_harness.logs.figures import Figure
from grpo_harness.logs.read import Log, reward_key
from grpo_harness.text import escape

RISK = 0.002
"""The probability that a change of nothing counts as a rise, or as a fall."""

LEAST_STEPS = 10
"""Of fewer steps that logged a reward, the noise is not known."""


@dataclass(frozen=True)
class Change:
    """How much a reward has changed from the first to the last fifth, and the noise of that."""

    name: str
    change: float
    noise: float

    def __str__(self) -> str:
        return f"{escape(self.name, 60)} {self.change:+.3g} (noise {self.noise:.2g})"


@dataclass(frozen=True)
class Hacking:
    """The change of the decisive reward and those of the total and of the others.

    ``reason`` says why nothing was judged, if so.
    """

    decisive: Change | None = None
    others: tuple[Change, ...] = ()
    reason: str = ""

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "UNPROVEN"]:
        """FAIL if the decisive reward fell while another or the total rose, beyond the noise."""
        if self.decisive is None:
            return "UNPROVEN"
        fell = self.decisive.change < -self.decisive.noise
        return "FAIL" if fell and any(of.change > of.noise for of in self.others) else "PASS"

    def message(self) -> str:
        """Return the result in a few lines."""
        if self.decisive is None:
            return f"not judged: reward without correctness: {self.reason}"
        title = f"{self.verdict}: reward without correctness, from the first to the last fifth"
        risen = [of for of in self.others if of.change > of.noise]
        lines = [title, f"  decisive reward: {self.decisive}"]
        lines += [f"  {of}" for of in (risen if self.verdict == "FAIL" else self.others)]
        if self.verdict == "FAIL":
            lines.append(
                "  the policy is paid for something else than being right: see its completions, "
                "and the weights of these rewards"
            )
        return "\n".join(lines)


def hacking(log: Log, decisive: Collection[str]) -> Hacking:
    """Compare the decisive reward of a run with its total and its other rewards.

    ``decisive`` has the names of rewards that decide correctness; one of them must be the run's.
    """
    names = [name for name in log.rewards if name in decisive]
    if len(log.rewards) < 2:
        return Hacking(reason="the run has one reward, and nothing to compare it with")
    if len(names) != 1:
        which = ", ".join(escape(name, 60) for name in log.rewards)
        return Hacking(
            reason=f"nothing says which of the rewards {which} decides correctness: set correct of "
            "a data set in [tool.grpo-harness], or --decisive"
        )
    others = {"the total": "reward"}
    others |= {name: reward_key(name) for name in log.rewards if name not in names}
    own = _change(log, names[0], reward_key(names[0]), RISK)
    found = [_change(log, name, key, RISK / len(others)) for name, key in others.items()]
    if own is None or None in found:
        return Hacking(reason=f"fewer than {LEAST_STEPS} steps logged a reward: too few to judge")
    return Hacking(own, tuple(change for change in found if change is not None))


def _change(log: Log, name: str, key: str, risk: float) -> Change | None:
    gain, steps = Figure(name, key, "gain").of(log), len(log.series(key))
    if gain is None or steps < LEAST_STEPS:
        return None
    # The variance of n differences of successive steps has about 2/3 n degrees of freedom.
    quantile = float(stdtrit(2 * (steps - 1) / 3, 1 - risk))
    return Change(name, gain.number, quantile * gain.error)
