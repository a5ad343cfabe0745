"""Is the saved checkpoint the policy whose curve was logged?

The checkpoint is asked the prompts of the last steps, as far as they are known, and draws as in the
training; its completions are scored by the training's rewards. Each mean must be that of those
steps in the log, within the noise of both. A base that was saved in place of the trained policy, a
checkpoint of the first steps or a wrong adapter earns something else. A tokenizer or chat template
that is not the training's is named as such.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from statistics import fmean
from typing import Literal

import numpy as np
from scipy.special import ndtri

from grpo_harness.engines.engine import Request, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.logs.figures import FIFTH, Figure
from grpo_harness.logs.read import Log, LogError, reward_key
from grpo_harness.policy import Policy, load
from grpo_harness.rewards.calls import completion_of
from grpo_harness.rewards.functions import Batch, Reward, Rewards, Scores
from grpo_harness.text import escape
from grpo_harness.training.files import Recipe
from grpo_harness.training.job import Job, job_of, prompt_of
from grpo_harness.training.order import asked, has_own_order

PROMPTS, SAMPLES = 128, 4
"""Training prompts that the checkpoint is asked, at most, and completions of each."""

RISK = 0.01
"""The probability that an honest checkpoint is not taken for the logged one."""

_LEAST_ROWS = 4
"""Of so many rows, at least, the wobble of the policy is estimated, if there are as many."""

LEAST = 0.02
"""A difference below this part of a reward's own range in the log is never a fault."""


@dataclass(frozen=True)
class Reconciled:
    """One reward: what the log says of the last steps, and what the checkpoint earns.

    ``noise`` is that of both, and ``moved`` how much the reward has changed in the run, from the
    first fifth of the log to the last.
    """

    name: str
    logged: float
    earned: float
    noise: float
    moved: float = 0.0

    @property
    def differs(self) -> bool:
        """Tell whether the difference is more than the noise of both measurements."""
        return abs(self.earned - self.logged) > self.noise

    @property
    def blind(self) -> bool:
        """Tell whether the noise is wider than all that the reward has moved in the run."""
        return self.noise >= abs(self.moved)

    def __str__(self) -> str:
        told = f"{escape(self.name, 60)}: logged {self.logged:+.4g}, earned {self.earned:+.4g}"
        return f"{told}, noise {self.noise:.2g}, moved {self.moved:+.2g} in the run"


@dataclass(frozen=True)
class Reconciliation:
    """The verdict on a checkpoint. ``asked`` says which prompts it was asked.

    ``left_out`` has the rewards of the log or the recipe alone, and ``otherwise`` says how its
    tokenizer is not the training's, if so; then nothing was asked.
    """

    policy: str
    rewards: tuple[Reconciled, ...] = ()
    left_out: tuple[str, ...] = ()
    asked: str = ""
    otherwise: str = ""

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "UNPROVEN"]:
        """FAIL if the checkpoint earns another reward than its log says, or reads otherwise.

        UNPROVEN if every reward is blind: the policy of the first steps would earn the same.
        """
        if self.otherwise or any(reward.differs for reward in self.rewards):
            return "FAIL"
        return "UNPROVEN" if all(reward.blind for reward in self.rewards) else "PASS"

    def message(self) -> str:
        """Return the result in a line for each reward."""
        lines = [f"{self.verdict}: {escape(self.policy)} against the last steps of its log"]
        if self.otherwise:
            lines.append(f"  {self.otherwise}: save the tokenizer that it was trained with")
            return "\n".join(lines)
        lines += [f"  {reward}" for reward in sorted(self.rewards, key=lambda r: not r.differs)]
        lines += [
            f"  not compared: {escape(name, 60)}, which the log and the recipe do not both have"
            for name in self.left_out
        ]
        lines.append(f"  it was asked {self.asked}")
        lines += [
            f"  blind: {escape(reward.name, 60)}: only a difference of more than "
            f"{reward.noise:.2g} would be seen, and the run moved it by {reward.moved:+.2g}"
            for reward in self.rewards
            if reward.blind
        ]
        if self.verdict == "FAIL":
            lines.append(
                "  it is not the policy whose curve was logged: see what was saved (the base, an "
                "early step, another adapter), or whether the rewards have changed"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Asked:
    """Rows of the data to ask, and the logged rows of the run to compare with.

    If ``exact``, those rows are of these prompts. Each logged row is a mean over ``prompts``.
    """

    rows: Sequence[int]
    logged: Sequence[Mapping[str, float]]
    exact: bool
    said: str
    prompts: float


def reconcile(log: Log, recipe: Recipe, *, device: str = "auto", seed: int = 0) -> Reconciliation:
    """Ask the checkpoint beside ``log`` training prompts of ``recipe``, and compare its rewards.

    Raises ``LogError`` if the log has none of the recipe's rewards, and ``HarnessError`` for a
    policy, a data set or a reward that cannot be used.
    """
    folder = log.path.parent
    job = job_of(recipe, folder / "unused", device=device)
    functions = [Reward(reward) for reward in job.rewards if not isinstance(reward, str)]
    names = [of.name for of in functions if len(log.series(reward_key(of.name))) > 1]
    if not names:
        known = ", ".join(escape(reward.name, 60) for reward in functions)
        raise LogError(
            f"{log.path} logs none of the rewards of {job.name} ({known or 'no function'}): name "
            "the recipe of that run"
        )
    policy = load(str(folder))
    prompts = _asked(job, log, seed)
    if otherwise := _otherwise(job, policy, prompts.rows):
        return Reconciliation(str(folder), otherwise=otherwise)
    earned = _earned(job, policy, Rewards(tuple(functions)), prompts.rows, device, seed)
    quantile = float(-ndtri(RISK / 2 / len(names)))
    found = []
    for name in names:
        of = [[scores[name] for scores in group] for group in earned]
        scored = [own for group in of if (own := [value for value in group if value is not None])]
        if len(scored) < 2:
            raise LogError(f"the reward {escape(name)} applies to no completion of {folder}")
        key = reward_key(name)
        series = [value for _, value in log.series(key)]
        then = [row[key] for row in prompts.logged if key in row] or series[-1:]
        gain = Figure("", key, "gain").of(log)
        assert gain is not None, "two steps logged it"
        noise = quantile * _error(
            series, len(then), scored, prompts, job.config.num_generations or 1
        )
        noise = max(noise, LEAST * (max(series) - min(series)))
        mean = fmean(value for group in scored for value in group)
        found.append(Reconciled(name, fmean(then), mean, noise, gain.number))
    both = {*log.rewards, *(reward.name for reward in functions)}
    left_out = tuple(sorted(both - {*names}))
    return Reconciliation(str(folder), tuple(found), left_out, prompts.said)


def _unknown_order(job: Job, log: Log) -> str:
    """Return why the prompts of a run's steps are not known, or an empty text."""
    if has_own_order(job.trainer):
        return f"the trainer {job.trainer.__name__} has an order of its own"
    if log.processes not in (None, job.config.world_size):
        return f"it was trained by {log.processes} processes"
    return ""


def _asked(job: Job, log: Log, seed: int) -> _Asked:
    """Choose the prompts of the last steps, back to a fifth of the run; or else random ones."""
    n = len(job.rows)
    rewarded = [row for row in log.rows if "reward" in row]
    last = rewarded[-max(len(rewarded) // FIFTH, 1) :]
    generations = [*takewhile(lambda of: of[0] <= log.steps, asked(job.config, n))]
    each = sum(len(rows) for _, rows in generations) / len(rewarded)
    if why := _unknown_order(job, log):
        rows = Random(seed).sample(range(n), min(PROMPTS, n))
        each *= (log.processes or job.config.world_size) / job.config.world_size
        said = f"{len(rows)} random training prompts: {why}"
        return _Asked(rows, last, False, said, each)
    first = rewarded[-len(last) - 1]["step"] if len(rewarded) > len(last) else 0
    drawn: dict[int, list[int]] = {}
    for step, rows in generations:
        if step > first:
            of = next(int(row["step"]) for row in last if step <= row["step"])
            drawn.setdefault(of, []).extend(rows)
    chosen: list[int] = []
    logged = []
    for row in reversed(last):
        own = drawn.get(int(row["step"]), [])
        if chosen and len(chosen) + len(own) > PROMPTS:
            break
        chosen += own
        logged.append(row)
    said = f"the {len(chosen)} prompts of steps {int(logged[-1]['step'])} to {log.steps}"
    return _Asked(chosen, logged, True, said, each)


def _otherwise(job: Job, policy: Policy, rows: Sequence[int]) -> str:
    """Return how a checkpoint's tokenizer is not that of the policy that was trained, if so."""
    ours, theirs = policy.tokenizer, job.policy.tokenizer
    if ours.get_vocab() != theirs.get_vocab():
        return "its tokenizer has another vocabulary than that of the policy that was trained"
    if ours.eos_token != theirs.eos_token:
        return "its tokenizer has another end token than that of the policy that was trained"
    # What was trained on a text may be evaluated with the chat template.
    for prompt in ("?", *(job.rows[i]["prompt"] for i in rows)):
        given = [{"role": "user", "content": prompt}] if prompt == "?" else prompt
        shown, wanted = (prompt_of(of, job.config, given) for of in (policy, job.policy))
        if shown != wanted:
            return "its chat template is not that of the policy that was trained"
        if ours(shown)["input_ids"] != theirs(shown)["input_ids"]:
            return "its tokenizer reads prompts otherwise than that of the policy that was trained"
    return ""


def _earned(
    job: Job, policy: Policy, rewards: Rewards, order: Sequence[int], device: str, seed: int
) -> list[list[Scores]]:
    """Draw completions as the training did, and return their scores, a list for each prompt."""
    config, rows = job.config, job.rows
    each = [(i, rows[i]) for i in order for _ in range(SAMPLES)]
    rendered = [prompt_of(policy, config, row["prompt"]) for _, row in each]
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
    folder = policy.checkpoint.path
    failed = next((sample.error for sample in drawn if sample.error), None)
    if failed is not None:
        raise LogError(f"{folder}: a completion could not be drawn ({failed}): see --grpo-device")
    batch = Batch(
        names=[job.ids[i] for i, _ in each],
        prompts=[row["prompt"] for _, row in each],
        completions=[
            completion_of(row["prompt"], sample.text)
            for (_, row), sample in zip(each, drawn, strict=True)
        ],
        completion_ids=[list(sample.ids) for sample in drawn],
        columns={
            name: [row[name] for _, row in each] for name in rows.column_names if name != "prompt"
        },
    )
    scores = rewards.score(batch, job.name)
    return [scores[i : i + SAMPLES] for i in range(0, len(scores), SAMPLES)]


def _error(
    series: Sequence[float],
    n: int,
    scored: Sequence[Sequence[float]],
    prompts: _Asked,
    generations: int,
) -> float:
    """Return the standard error of what a checkpoint earns less the mean of the last ``n`` rows.

    ``scored`` are its rewards, a list for each prompt that the reward applies to. The run drew
    ``generations`` of each prompt.
    """
    samples = fmean(map(len, scored))
    within = fmean([float(np.var(group, ddof=1)) for group in scored if len(group) > 1] or [0.0])
    means = [float(np.mean(group)) for group in scored]
    between = max(float(np.var(means, ddof=1)) - within / samples, 0.0)
    # A logged row is a mean over prompts and completions, as far as the reward applies to them.
    each = prompts.prompts * len(scored) / len(prompts.rows)
    drawn = generations * samples / SAMPLES
    row = (within / drawn + between) / each
    # The same prompts on both sides differ by the draws alone.
    others = 0.0 if prompts.exact else between
    logged = (within / drawn + others) / each / n
    earned = (within / samples + others) / len(scored)
    return math.sqrt(logged + earned + _wobble(series, n, row))


def _wobble(series: Sequence[float], n: int, row: float) -> float:
    """Return the variance by which one policy of a run differs from the mean of the ``n`` before.

    So the checkpoint may differ from the last ones. The rows of the last half show how much:
    ``row`` is the variance of one that prompts and draws explain. What few rows may hide by chance
    is added, a standard error.
    """
    first = max(min(len(series) // 2, len(series) - _LEAST_ROWS), 1)
    off = [(series[i] - fmean(series[max(i - n, 0) : i])) ** 2 for i in range(first, len(series))]
    # They overlap, so that they tell as much as about two thirds of their number.
    most = fmean(off) * (1 + math.sqrt(2 / (2 / 3 * len(off))))
    return max(most - row * (1 + 1 / n), 0.0)
