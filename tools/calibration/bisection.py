"""Bisections of simulated checkpoints: how often is the answer wrong, and what does it cost?

    python -m tools.calibration.bisection [--runs N] [--seed N]

prints the table in ``BISECTION.md``. The policies are those of the other simulations: a skill per
problem from a Beta distribution with mean 0.7, up to 1,024 problems, 4 samples each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import ttest_1samp
from tabulate import tabulate

from grpo_harness.choice.search import ERROR, GOOD, WOBBLE, bisect
from tools.calibration.promises import Outcomes, Plan, Promise, Row
from tools.calibration.simulation import Draws, Floats, Scenario
from tools.calibration.studies import Study

MOST, K = 1024, 4
GLANCE = 64
"""Problems of a probe that is decided by its mean alone."""

ABOUT = """\
Checkpoints between a good policy, 70% correct, and a bad one that has lost some points; up to 1,024
problems, 4 samples each. `bisect` is the search of the harness, at a risk of 5%. `means of 64`
believes the means of 64 problems. `each in full` judges every checkpoint on all problems, and takes
the first that is proven to be worse than the good one, at the same risk.

- *no answer*: the bad one is not proven to be worse;
- *wrong*: the range leaves out the first that has dropped. Of a drift: one that has lost less than
  a quarter is said to have dropped, or one that has lost over three quarters to be kept. By `each
  in full` the former is no false claim, since any loss counts;
- *exact*: the range is one checkpoint, and not wrong; *range*: its mean width;
- *lost there*: the part of the drop that the checkpoint has lost that is said to have dropped;
- *asked*: the candidates that were asked; *completions*: those drawn, as a part of what `each in
  full` draws.
"""

Truth: TypeAlias = Literal["a step", "a step that wobbles", "a drift"]


@dataclass(frozen=True)
class History:
    """What happens over ``checkpoints`` checkpoints: ``drop`` of mean skill is lost.

    *a step*: all of it at one checkpoint, each equally likely, the bad one included. *a step that
    wobbles*: so, but every checkpoint is off by up to a fifth of the drop, either way. *a drift*:
    the same part of it at every checkpoint.
    """

    checkpoints: int
    drop: float
    truth: Truth = "a step"
    concentrated: bool = False

    def __str__(self) -> str:
        how = ", in a few problems" if self.concentrated else ""
        return f"{self.truth} of {100 * self.drop:g} pt, {self.checkpoints} checkpoints{how}"

    def draw(self, rng: np.random.Generator) -> Drawn:
        """Draw one history."""
        m = self.checkpoints
        pattern: Literal["spread", "concentrated"] = (
            "concentrated" if self.concentrated else "spread"
        )
        scenario = Scenario(MOST, K, pattern=pattern, drop=self.drop)
        before, after = (skills[0] for skills in scenario.skills(rng, 1))
        first = int(rng.integers(m + 1))
        lost = (np.arange(m) >= first).astype(float)
        if self.truth == "a step that wobbles":
            lost += rng.uniform(-0.2, 0.2, m)
        if self.truth == "a drift":
            lost = np.arange(1, m + 1) / (m + 1)
        return Drawn(rng, before, after, np.concatenate([lost, [1.0, 0.0]]))


@dataclass(frozen=True)
class Drawn:
    """One history: the part of the drop that each has lost, with the bad and the good one last."""

    rng: np.random.Generator
    before: Floats
    after: Floats
    lost: Floats
    asked: dict[int, int] = field(default_factory=dict)
    _rates: dict[int, Floats] = field(default_factory=dict)

    def rates(self, number: int, n: int) -> Floats:
        """The measured rates of a checkpoint on the first ``n`` problems."""
        if number not in self._rates:
            skill = self.before + self.lost[number] * (self.after - self.before)
            self._rates[number] = self.rng.binomial(K, np.clip(skill, 0.0, 1.0)) / K
        self.asked[number] = max(n, self.asked.get(number, 0))
        return self._rates[number][:n]

    def wrong(self, kept: int, dropped: int) -> bool:
        """Whether a claim is false: of one that has lost little, or of one that has lost most."""
        return bool(self.lost[kept] >= 1 - WOBBLE or self.lost[dropped] <= WOBBLE)


@dataclass(frozen=True)
class Found:
    """An answer: whether there is ``any``, how wide its range is, its ``cost`` as a share of all.

    ``asked`` counts the candidates, and ``lost`` is the part that the one said to have dropped has.
    """

    any: bool
    wrong: bool
    exact: bool
    width: int
    cost: float
    asked: int
    lost: float


def by_evidence(drawn: Drawn) -> Found:
    """The search of the harness."""
    bad = len(drawn.lost) - 2
    answer = bisect(bad, drawn.rates, most=MOST)
    cost = sum(drawn.asked.values()) / (len(drawn.lost) * MOST)
    return _found(
        drawn, answer.bad.state == "dropped", answer.kept, answer.dropped, cost, len(answer.probes)
    )


def by_means(drawn: Drawn) -> Found:
    """A search that believes the means of a few problems: the nearer of good and bad."""
    low, high = GOOD, len(drawn.lost) - 2
    middle = (drawn.rates(low, GLANCE).mean() + drawn.rates(high, GLANCE).mean()) / 2
    while high - low > 1:
        probed = (low + high) // 2
        if drawn.rates(probed, GLANCE).mean() > middle:
            low = probed
        else:
            high = probed
    cost = sum(drawn.asked.values()) / (len(drawn.lost) * MOST)
    return _found(drawn, True, low, high, cost, len(drawn.asked) - 2)


def in_full(drawn: Drawn) -> Found:
    """Judge every checkpoint on all problems: the first whose drop is proven, at the same error."""
    bad = len(drawn.lost) - 2
    good = drawn.rates(GOOD, MOST)
    every = np.array([drawn.rates(number, MOST) for number in range(bad + 1)])
    p = ttest_1samp(every - good, 0.0, axis=1, alternative="less").pvalue
    proven = np.flatnonzero(p <= ERROR / (bad + 1))
    first = int(proven[0]) if len(proven) else bad
    return _found(drawn, len(proven) > 0, first - 1, first, 1.0, bad)


def _found(drawn: Drawn, any_: bool, kept: int, dropped: int, cost: float, asked: int) -> Found:
    wrong = any_ and drawn.wrong(kept, dropped)
    exact = any_ and not wrong and dropped - kept == 1
    return Found(any_, wrong, exact, dropped - kept, cost, asked, float(drawn.lost[dropped]))


EVIDENCE, MEANS = "bisect", f"means of {GLANCE}"
RULES: Mapping[str, Callable[[Drawn], Found]] = {
    EVIDENCE: by_evidence,
    MEANS: by_means,
    "each in full": in_full,
}


def simulate(
    draw: Draws, history: History, runs: int, rules: Sequence[str]
) -> dict[str, list[Found]]:
    """Search the same histories by several rules."""
    rng = draw.stream(f"bisections of {history}")
    found: dict[str, list[Found]] = {name: [] for name in rules}
    for _ in range(runs):
        drawn = history.draw(rng)
        for name in rules:
            drawn.asked.clear()
            found[name].append(RULES[name](drawn))
    return found


STUDIED = (History(20, 0.05), History(10, 0.1, "a step that wobbles"), History(20, 0.1, "a drift"))


def bisections(draw: Draws, plan: Plan) -> Study:
    """Few answers are wrong, and they cost a fraction of judging every checkpoint in full."""
    rows: list[Row] = []
    for history in STUDIED:
        found = simulate(draw, history, plan.studies // 4, [EVIDENCE, MEANS])
        wrong: dict[str, Outcomes] = {
            name: np.array([of.wrong for of in all_]) for name, all_ in found.items()
        }
        cost: dict[str, Outcomes] = {EVIDENCE: np.array([of.cost for of in found[EVIDENCE]])}
        rows.append((Promise(str(history), "wrong", high=ERROR), wrong))
        rows.append((Promise(str(history), "completions, of all", high=0.25), cost))
    return Study(
        f"The first checkpoint that has dropped, by evidence and by the means of {GLANCE} problems",
        rows,
        (MEANS,),
    )


def _histories() -> Iterator[History]:
    for drop in (0.03, 0.05, 0.1):
        for checkpoints in (5, 10, 20, 40):
            yield History(checkpoints, drop)
    for drop in (0.05, 0.1):
        yield History(20, drop, concentrated=True)
        yield History(20, drop, "a step that wobbles")
    for drop in (0.03, 0.05, 0.1):
        yield History(20, drop, "a drift")


def _cells(found: Sequence[Found]) -> dict[str, str]:
    answered = [of for of in found if of.any]
    return {
        "no answer": f"{100 * (1 - len(answered) / len(found)):.1f}%",
        "wrong": f"{100 * np.mean([of.wrong for of in found]):.1f}%",
        "exact": f"{100 * np.mean([of.exact for of in found]):.1f}%",
        "range": f"{np.mean([of.width for of in answered]):.1f}" if answered else "",
        "lost there": f"{100 * np.mean([of.lost for of in answered]):.0f}%" if answered else "",
        "asked": f"{np.mean([of.asked for of in found]):.1f}",
        "completions": f"{100 * np.mean([of.cost for of in found]):.1f}%",
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration.bisection")
    parser.add_argument("--runs", type=int, default=1000, help="histories of each kind (1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw = Draws(options.seed)
    rows = []
    for history in _histories():
        for name, found in simulate(draw, history, options.runs, [*RULES]).items():
            rows.append({"history": str(history), "rule": name, **_cells(found)})
    text = tabulate([*map(dict.values, rows)], [*rows[0]], tablefmt="pipe", disable_numparse=True)
    chance = 100 * math.sqrt(0.05 * 0.95 / options.runs)
    sys.stdout.write(
        f"# The bisection, simulated\n\n{ABOUT}\n{options.runs} histories of each kind, seed "
        f"{options.seed}: the standard error of 5% is {chance:.1f}%. Made by `python -m "
        f"tools.calibration.bisection --runs {options.runs}`.\n\n{text}\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
