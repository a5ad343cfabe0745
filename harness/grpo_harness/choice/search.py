"""Which is the first of some checkpoints that has lost: a binary search among noisy measurements.

Numbers in, answer out: `bisect` takes a function that measures, and knows no policy.

The checkpoints lie between a good and a bad one. One is claimed to be *kept* if it is proven to
have lost less than three quarters of what the bad one has lost, and to have *dropped* if it is
proven to have lost more than a quarter, whichever is proven first. Half of the risk of a claim is
that of bets on the rates of the same problems (`harmless_evidence`), which are valid for any number
of looks: a checkpoint gets more problems until one bet has won. The other half is that of a t test
of all problems, where none has. If that does not decide either, nothing is claimed, and the answer
is a range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np

from grpo_harness.gate.bounds import LOOK
from grpo_harness.gate.inputs import Floats
from grpo_harness.gate.stats import Estimate, harmless_evidence

GOOD: Final = -1
"""The number of the good one. Candidates are numbered from 0; the bad one comes after the last."""

ERROR = 0.05
"""The risk that an answer is wrong, over all probes together."""

WOBBLE = 0.25
"""Part of the bad one's loss by which a checkpoint may differ from the good or the bad one.

With more of it a probe needs more problems: at 0 two thirds as many, at a half twice as many.
"""

State: TypeAlias = Literal["kept", "dropped", "undecided"]

Rates: TypeAlias = Callable[[int, int], Floats]
"""``rates(number, n)``: for each of the first ``n`` problems, the share of correct completions of a
checkpoint, shape (n,). Asked again for more problems, it begins with the same numbers."""


@dataclass(frozen=True)
class Probe:
    """What was found of the checkpoint ``number``.

    ``lost`` is its loss against the good one on the ``n`` problems that were asked.
    """

    number: int
    state: State
    n: int
    lost: Estimate


@dataclass(frozen=True)
class Answer:
    """The drop came after ``kept``, and at ``dropped`` or before.

    ``kept`` may be `GOOD`, and ``dropped`` the bad one. ``step`` is the loss between these two, on
    the problems that both were asked. ``bad`` says what the bad one has lost: if that is not proven
    there is nothing to bisect, and there are no ``probes``.
    """

    kept: int
    dropped: int
    step: Estimate
    bad: Probe
    probes: tuple[Probe, ...] = ()

    @property
    def found(self) -> bool:
        """Tell whether the first that has dropped is known: it is ``dropped``."""
        return self.bad.state == "dropped" and self.dropped - self.kept == 1


@dataclass(frozen=True)
class _Search:
    """The probes of one search, each made once. ``risk`` is that of one wrong claim."""

    rates: Rates
    bad: int
    most: int
    risk: float
    told: Callable[[Probe], None]
    probes: dict[int, Probe] = field(default_factory=dict)

    def state(self, number: int) -> State:
        """Probe a checkpoint, unless that was done."""
        if number not in self.probes:
            self.probes[number] = self._probe(number)
            self.told(self.probes[number])
        return self.probes[number].state

    def boundary(self, state: State) -> int:
        """Return the last that is kept, or the first that has dropped, as far as it is claimed."""
        low, high = GOOD, self.bad
        while high - low > 1:
            middle = (low + high) // 2
            claimed = self.state(middle) == state
            if claimed == (state == "kept"):
                low = middle
            else:
                high = middle
        return low if state == "kept" else high

    def _probe(self, number: int) -> Probe:
        n = 0
        state: State = "undecided"
        while state == "undecided" and n < self.most:
            n = min(n + max(LOOK, n // 4), self.most)
            kept, dropped = self._differences(number, n)
            state = _bets(kept, dropped, self.risk / 2)
        if state == "undecided":
            state = _tests(kept, dropped, self.risk / 2)
        lost = self.rates(GOOD, n) - self.rates(number, n)
        return Probe(number, state, n, Estimate.of(lost, guarded=True))

    def _differences(self, number: int, n: int) -> tuple[Floats, Floats]:
        """Return what has a mean above 0 if a checkpoint is kept, and if it has dropped."""
        good, own = self.rates(GOOD, n), self.rates(number, n)
        if number == self.bad:  # any loss counts: nothing is known of its size
            return own - good, good - own
        bad = self.rates(self.bad, n)
        apart = WOBBLE * (good - bad)
        return own - bad - apart, good - own - apart

    def step(self, kept: int, dropped: int) -> Estimate:
        """Return the loss between two checkpoints that were probed."""
        n = min(self.probes[number].n for number in (kept, dropped) if number != GOOD)
        return Estimate.of(self.rates(kept, n) - self.rates(dropped, n), guarded=True)


def _bets(kept: Floats, dropped: Floats, risk: float) -> State:
    """Tell which of two means is first proven to be above 0, problem after problem."""
    wealth = np.stack([harmless_evidence(kept, 0.0), harmless_evidence(dropped, 0.0)])
    won = np.flatnonzero(wealth.max(axis=0) >= -math.log(risk))
    if not len(won):
        return "undecided"
    return "kept" if wealth[0, won[0]] > wealth[1, won[0]] else "dropped"


def _tests(kept: Floats, dropped: Floats, risk: float) -> State:
    """Tell which of two means is better proven to be above 0, by all problems."""
    p = [Estimate.of(of, guarded=True).p_above(0.0) for of in (kept, dropped)]
    if min(p) > risk:
        return "undecided"
    return "kept" if p[0] < p[1] else "dropped"


def bisect(
    candidates: int,
    rates: Rates,
    *,
    most: int,
    error: float = ERROR,
    told: Callable[[Probe], None] = lambda _: None,
) -> Answer:
    """Find the first of ``candidates`` checkpoints, in the order of their steps, that has dropped.

    First it must be proven that the bad one is worse than the good one. Each probe asks at most
    ``most`` problems, and is ``told`` when it ends. If, up to some checkpoint, all have lost less
    than a quarter of what the bad one has, and from there on all more than three quarters, the
    chance is at most ``error`` that this one is not after ``kept``, or not at ``dropped`` or
    before.

    Two searches use the same probes, for the last that is kept and for the first that has dropped;
    what is undecided counts against the claim that a search looks for. Both follow the path of a
    search without errors, or leave it on the side where no claim that they look for is wrong: so
    the answer is wrong only if a claim on that path is. It has at most log2(candidates + 1) probes,
    rounded up, and their risks add up, although they share the numbers of the good and the bad one.
    """
    risk = error / (math.ceil(math.log2(candidates + 1)) + 1)
    search = _Search(rates, candidates, most, risk, told)
    kept, dropped = GOOD, candidates
    if search.state(candidates) == "dropped":
        kept, dropped = search.boundary("kept"), search.boundary("dropped")
    step = search.step(kept, dropped)
    bad = search.probes.pop(candidates)
    return Answer(kept, dropped, step, bad, tuple(search.probes.values()))
