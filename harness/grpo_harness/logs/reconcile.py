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
from itertools import pairwise, takewhile
from random import Random
from statistics import fmean, variance
from typing import Literal

from scipy.special import ndtri

from grpo_harness.engines.engine import Request, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.logs.figures import FIFTH, Figure
from grpo_harness.logs.read import Log, LogError, reward_key
from grpo_harness.policy import Policy, load
from grpo_harness.rewards.functions import Batch, Reward, Rewards, Scores, completion_of
from grpo_harness.text import escape
from grpo_harness.training.files import Recipe
from grpo_harness.training.job import Job, job_of, prompt_of
from grpo_harness.training.order import asked, has_own_order

PROMPTS, SAMPLES = 128, 4
"""Training prompts that the checkpoint is asked, at most, and completions of each."""

RISK = 0.01
"""The probability that an honest checkpoint is not taken for the logged one."""

LEAST = 0.02
"""A difference below this part of a reward's own range in the log is never a fault."""


@dataclass(frozen=True)
class Reconciled:
    """One reward: what the log says of the last steps, and what the checkpoint earns.

    ``noise`` is that of both, and ``drift`` how much the reward may have changed from those steps
    to the checkpoint, by the slope of the log.
    """

    name: str
    logged: float
    earned: float
    noise: float
    drift: float = 0.0

    @property
    def differs(self) -> bool:
        """Tell whether the difference is more than both measurements' noise and the drift."""
        off = self.earned - self.logged
        return not min(self.drift, 0) - self.noise <= off <= max(self.drift, 0) + self.noise

    def __str__(self) -> str:
        told = f"{escape(self.name, 60)}: logged {self.logged:+.4g}, earned {self.earned:+.4g}"
        return f"{told}, noise {self.noise:.2g}, drift {self.drift:+.2g}"


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
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """FAIL if the checkpoint earns another reward than its log says, or reads otherwise."""
        wrong = self.otherwise or any(reward.differs for reward in self.rewards)
        return "FAIL" if wrong else "PASS"

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
        if self.verdict == "FAIL":
            lines.append(
                "  it is not the policy whose curve was logged: see what was saved (the base, an "
                "early step, another adapter), or whether the rewards have changed"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Asked:
    """Rows of the data to ask, and the logged rows of the run to compare with."""

    rows: Sequence[int]
    logged: Sequence[Mapping[str, float]]
    exact: bool
    said: str


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
        key = reward_key(name)
        of = [[scores[name] for scores in group] for group in earned]
        scored = [own for group in of if (own := [value for value in group if value is not None])]
        if len(scored) < 2:
            raise LogError(f"the reward {escape(name)} applies to no completion of {folder}")
        then = [row[key] for row in prompts.logged if key in row]
        if prompts.exact and then:
            logged = fmean(then)
            # The same prompts on both sides: what remains are draws, and that policies wobble.
            within = fmean([variance(group) for group in scored if len(group) > 1] or [0.0])
            drawn = sum(map(len, scored))
            trained_on = drawn / SAMPLES * (job.config.num_generations or 1)
            error = math.sqrt(
                within * (1 / drawn + 1 / trained_on) + _wobble(log.series(key), then)
            )
        else:
            value = Figure("", key).of(log)
            assert value is not None, "two steps logged it"
            logged, means = value.number, [fmean(group) for group in scored]
            error = math.hypot(value.error, math.sqrt(variance(means) / len(means)))
        series = [value for _, value in log.series(key)]
        noise = max(quantile * error, LEAST * (max(series) - min(series)))
        mean = fmean(value for group in scored for value in group)
        found.append(Reconciled(name, logged, mean, noise, _trend(series)))
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
    if why := _unknown_order(job, log):
        rows = Random(seed).sample(range(n), min(PROMPTS, n))
        return _Asked(rows, (), False, f"{len(rows)} random training prompts: {why}")
    rewarded = [row for row in log.rows if "reward" in row]
    last = rewarded[-max(len(rewarded) // FIFTH, 1) :]
    first = rewarded[-len(last) - 1]["step"] if len(rewarded) > len(last) else 0
    drawn: dict[int, list[int]] = {}
    for step, rows in takewhile(lambda of: of[0] <= log.steps, asked(job.config, n)):
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
    return _Asked(chosen, logged, True, said)


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


def _wobble(series: Sequence[tuple[int, float]], last: Sequence[float]) -> float:
    """Return the variance by which one policy of a run differs from the mean of the last ones.

    At a high rate the policy changes from step to step, and the checkpoint is one of these.
    """
    near = [value for _, value in series[-2 * max(len(last), 2) :]]
    steps = fmean((b - a) ** 2 for a, b in pairwise(near)) / 2
    return steps * (1 + 1 / len(last))


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
