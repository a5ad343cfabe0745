"""Is the saved checkpoint the policy whose curve was logged?

The checkpoint is asked training prompts, drawn from as in the training, and its completions are
scored by the training's rewards. Each mean must be that of the last steps of the log, within the
noise of both. A base that was saved in place of the trained policy, a checkpoint of the first steps
or a wrong adapter earns something else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, variance
from typing import Literal

from scipy.special import stdtrit

from grpo_harness.engines.engine import Request, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.logs.figures import FIFTH, Figure
from grpo_harness.logs.judge import RISK
from grpo_harness.logs.read import Log, LogError, reward_key
from grpo_harness.policy import load
from grpo_harness.rewards.functions import Batch, Reward, Rewards, Scores, completion_of
from grpo_harness.text import escape
from grpo_harness.training.files import RecipeFile
from grpo_harness.training.job import Job, job_of, prompt_of
from grpo_harness.training.recipes import Recipe

PROMPTS, SAMPLES = 128, 4
"""Training prompts that the checkpoint is asked, and completions of each."""

LEAST = 0.02
"""A difference below this part of a reward's own range in the log is never a fault."""

LEAST_STEPS = 6
"""Of fewer steps nobody knows the noise."""


@dataclass(frozen=True)
class Reconciled:
    """One reward: what the log says of the last steps, and what the checkpoint earns."""

    name: str
    logged: float
    earned: float
    most: float

    @property
    def differs(self) -> bool:
        """Tell whether the difference is more than both measurements' noise."""
        return abs(self.earned - self.logged) > self.most

    def __str__(self) -> str:
        told = f"{escape(self.name, 60)}: logged {self.logged:+.4g}, earned {self.earned:+.4g}"
        return f"{told}, which may differ by {self.most:.2g}"


@dataclass(frozen=True)
class Reconciliation:
    """The verdict on a checkpoint. ``left_out`` has the rewards of the log or the recipe alone."""

    policy: str
    rewards: tuple[Reconciled, ...]
    left_out: tuple[str, ...] = ()

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """FAIL if the checkpoint earns another reward than its log says."""
        return "FAIL" if any(reward.differs for reward in self.rewards) else "PASS"

    def message(self) -> str:
        """Return the result in a line for each reward."""
        lines = [f"{self.verdict}: {escape(self.policy)} against the last steps of its log"]
        lines += [f"  {reward}" for reward in sorted(self.rewards, key=lambda r: not r.differs)]
        lines += [
            f"  not compared: {escape(name, 60)}, which the log and the recipe do not both have"
            for name in self.left_out
        ]
        if self.verdict == "FAIL":
            lines.append(
                "  it is not the policy whose curve was logged: see what was saved (the base, an "
                "early step, another adapter or tokenizer), or whether the rewards have changed"
            )
        return "\n".join(lines)


def reconcile(
    log: Log, recipe: Recipe | RecipeFile, *, device: str = "auto", seed: int = 0
) -> Reconciliation:
    """Ask the checkpoint beside ``log`` training prompts of ``recipe``, and compare its rewards.

    Raises ``LogError`` if the log has none of the recipe's rewards, and ``HarnessError`` for a
    policy, a data set or a reward that cannot be used.
    """
    folder = log.path.parent
    job = job_of(recipe, folder / "unused", device=device)
    functions = [Reward(reward) for reward in job.rewards if not isinstance(reward, str)]
    logged = {
        reward.name: value
        for reward in functions
        if (value := Figure("", reward_key(reward.name)).of(log)) is not None
    }
    if not logged:
        names = ", ".join(escape(reward.name, 60) for reward in functions)
        raise LogError(
            f"{log.path} logs none of the rewards of {job.name} ({names or 'no function'}): name "
            "the recipe of that run"
        )
    earned = _earned(job, Rewards(tuple(functions)), folder, device, seed)
    found = []
    for name, then in logged.items():
        of = [[scores[name] for scores in group] for group in earned]
        scored = [[value for value in values if value is not None] for values in of]
        means = [fmean(values) for values in scored if values]
        if len(means) < 2:
            raise LogError(f"the reward {escape(name)} applies to no completion of {folder}")
        series = [value for _, value in log.series(reward_key(name))]
        noise, freedom = _noise(series)
        error = math.hypot(noise, math.sqrt(variance(means) / len(means)))
        quantile = float(stdtrit(freedom, 1 - RISK / 2 / len(logged)))
        least = LEAST * (max(series) - min(series))
        most = max(quantile * error + abs(_trend(series)), least)
        found.append(Reconciled(name, then.number, fmean(means), most))
    both = {*log.rewards, *(reward.name for reward in functions)}
    return Reconciliation(str(folder), tuple(found), tuple(sorted(both - logged.keys())))


def _earned(job: Job, rewards: Rewards, folder: Path, device: str, seed: int) -> list[list[Scores]]:
    """Draw completions as the training did, and return their scores, a list for each prompt."""
    config, rows = job.config, job.rows
    policy = load(str(folder))
    order = Random(seed).sample(range(len(rows)), min(PROMPTS, len(rows)))
    asked = [(i, rows[i]) for i in order for _ in range(SAMPLES)]
    rendered = [prompt_of(policy, config, row["prompt"]) for _, row in asked]
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k or None,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_completion_length or Sampling().max_new_tokens,
    )
    with TransformersEngine(policy, sampling, device=device, dtype="float32") as engine:
        drawn = engine.sample(
            [Request(prompt, sample_seed(seed, prompt, i)) for i, prompt in enumerate(rendered)],
            None,
        )
    failed = next((sample.error for sample in drawn if sample.error), None)
    if failed is not None:
        raise LogError(f"{folder}: a completion could not be drawn ({failed}): see --grpo-device")
    batch = Batch(
        names=[job.ids[i] for i, _ in asked],
        prompts=[row["prompt"] for _, row in asked],
        completions=[
            completion_of(row["prompt"], sample.text)
            for (_, row), sample in zip(asked, drawn, strict=True)
        ],
        completion_ids=[list(sample.ids) for sample in drawn],
        columns={
            name: [row[name] for _, row in asked] for name in rows.column_names if name != "prompt"
        },
    )
    scores = rewards.score(batch, job.name)
    return [scores[i : i + SAMPLES] for i in range(0, len(scores), SAMPLES)]


def _noise(series: Sequence[float]) -> tuple[float, float]:
    """Return the standard error of the last fifth's mean, and its degrees of freedom.

    It is that of the differences of successive steps in the second half of a run: those of a fifth
    may be too few, and at the beginning a run learns in leaps. Two differences share a step, so
    that a third of the freedom is lost.
    """
    n, half = max(len(series) // FIFTH, 1), series[len(series) // 2 :]
    squares = [(b - a) ** 2 for a, b in pairwise(half if len(half) >= LEAST_STEPS else series)]
    return math.sqrt(fmean(squares) / 2 / n), max(2 / 3 * len(squares), 1.0)


def _trend(series: Sequence[float]) -> float:
    """Return how much a reward rises from the middle of the last fifth to the end, by its slope.

    The slope is that of the last two fifths.
    """
    n = max(len(series) // FIFTH, 1)
    part = series[-2 * n :]
    if len(part) < 3:
        return 0.0
    middle, mean = (len(part) - 1) / 2, fmean(part)
    slope = sum((i - middle) * (y - mean) for i, y in enumerate(part))
    return slope / sum((i - middle) ** 2 for i in range(len(part))) * n / 2
