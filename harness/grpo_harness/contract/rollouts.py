"""Invariants of what is drawn, scored and counted, up to the advantages."""

import asyncio
import inspect
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import torch

from grpo_harness.contract.conventions import Conventions
from grpo_harness.contract.invariant import (
    BrokenInvariantError,
    NotLookedAtError,
    average,
    equal,
    invariant,
    require,
    where,
)
from grpo_harness.contract.oracle import Oracle, rows_of
from grpo_harness.contract.trace import Batch, Scored, Tokens, Trace, identity
from grpo_harness.grpo import LossType
from grpo_harness.rewards.calls import RewardFunction
from grpo_harness.training import Recipe, Row

KEYS = ("loss", "grad_norm", "learning_rate", "epoch", "step", "step_time", "entropy")
"""The keys of a logged row; also ``kl`` if beta is not 0."""

CLIP_KEYS = (
    *(f"clip_ratio/{what}" for what in ("low_mean", "low_min", "high_mean", "high_max")),
    "clip_ratio/region_mean",
)
"""The further keys of a row if the loss clips the ratio."""

DRAWN_KEYS = (
    *("num_tokens", "reward", "reward_std", "frac_reward_zero_std"),
    *(
        f"completions/{which}_{length}"
        for which in ("mean", "min", "max")
        for length in ("length", "terminated_length")
    ),
    "completions/clipped_ratio",
)
"""The further keys of a row that covers a step in which completions were drawn."""


ROUNDING = 2**-22
"""Largest error of a mean or a σ in single precision, relative to the largest number."""

OWN = (
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "beta", "loss_type", "scale_rewards", "num_iterations"),
    *("mask_truncated_completions", "importance_sampling_level", "multi_objective_aggregation"),
    "top_entropy_quantile",
)
"""Settings that the trainer copies from its config."""

OF_THE_UPDATE = (
    *("learning_rate", "lr_scheduler_type", "max_steps", "gradient_accumulation_steps", "seed"),
    *("steps_per_generation", "epsilon", "delta", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "use_bias_correction_kl"),
)
"""Settings that the trainer reads from its config when it needs them."""


@invariant("a default that flipped in an upgrade, or a field of the recipe that is dropped")
def settings_are_the_recipes(run: Trace) -> None:
    """The trainer has the settings that were asked for, and the pinned values for the others.

    TRL 0.19, 0.22, 0.27 and 1.10 changed defaults (β, loss_type, top_k, the KL estimator).
    """
    config, trainer = run.config, run.trainer
    own = {name: getattr(config, name, None) for name in OWN}
    own["epsilon_low"] = config.epsilon
    own["epsilon_high"] = config.epsilon if config.epsilon_high is None else config.epsilon_high
    given = {name: getattr(config, name, None) for name in (*OWN, *OF_THE_UPDATE)}
    if run.recipe is not None:
        # By the recipe itself, because the config is made by TRL, with its defaults.
        given |= _pinned(run.recipe)
        own |= {name: value for name, value in given.items() if name in OWN}
    for holder, settings in ((trainer.args, given), (trainer, own)):
        for name, right in settings.items():
            seen = getattr(holder, name, None)
            require(seen == right, f"{type(holder).__name__}.{name} is {seen!r}, not {right!r}")


def _pinned(recipe: Recipe) -> dict[str, Any]:
    pinned = {
        "min_p": None,
        "multi_objective_aggregation": "sum_then_normalize",
        "top_entropy_quantile": 1.0,
        "steps_per_generation": recipe.values["gradient_accumulation_steps"],
        "warmup_steps": 0,
        "logging_nan_inf_filter": False,
        "delta": None,
    }
    known = {*pinned, *OWN, *OF_THE_UPDATE, "logging_steps"}
    return pinned | {name: of for name, of in recipe.values.items() if name in known}


@invariant("a metric that was renamed or dropped, or a step that blew up (trl#6702)")
def rows_are_complete_and_finite(run: Trace) -> None:
    """Every step is logged with all figures, and every figure is a finite number."""
    logged = [int(row["step"]) for row in run.rows]
    require(
        logged == list(range(run.every, run.last + 1, run.every)),
        f"rows of steps {logged} are logged, of {run.last} steps",
    )
    for row in run.rows:
        drawn = DRAWN_KEYS if run.drawn_in(row) else ()
        clip = CLIP_KEYS if run.config.loss_type in get_args(LossType) else ()
        for name in (*KEYS, *clip, *drawn, *(["kl"] if run.config.beta else [])):
            value = row.get(name)
            require(name in row, f"step {row['step']}: {name} is not logged")
            # Of completions that are all masked there is no least and no greatest share.
            masked = run.config.mask_truncated_completions and name.endswith(("_min", "_max"))
            scores = [score for batch in run.drawn_in(row) for score in batch.rewards]
            unscored = name in {"reward", "reward_std"} and None in scores
            none = value is None and (masked or unscored)
            finite = isinstance(value, int | float) and math.isfinite(value)
            require(none or finite, f"step {row['step']}: {name} is {value}")


@invariant("the policy was loaded in another precision, or from somewhere else")
def training_starts_from_the_base(run: Trace, oracle: Oracle) -> None:
    """Before the first step the weights are the base policy's, to the bit."""
    for name, right in oracle.base.items():
        off = int((run.steps[0].weights[name] != right).sum())
        require(off == 0, f"{off} of {right.numel()} elements of {name} differ from the base")


@invariant("texts or ids that are changed, mixed up or repeated on the way (trl#6533, trl#7039)")
def what_is_drawn_is_scored_and_trained_on(run: Trace, oracle: Oracle) -> None:
    """The completions that were drawn are those that were scored and trained on."""
    g = run.config.num_generations
    for batch in batches(run):
        texts = oracle.texts(batch.completion_ids)
        given = oracle.prompt_tokens(batch.prompts)
        for i, drawn in enumerate(batch.completion_ids):
            place = where(batch, i, g)
            require(
                batch.prompt_ids[i] == given[i], f"{place} was drawn for another prompt's tokens"
            )
            require(
                batch.prompts[i] == batch.prompts[i - i % g],
                f"{place} has another prompt than the first of its group",
            )
            for scored in batch.scored.values():
                text = content(scored.completions[i])
                require(
                    text == texts[i] and scored.ids[i] == drawn,
                    f"{place} was drawn as {texts[i]!r} and scored as {text!r}",
                )
                require(
                    scored.prompts[i] == batch.prompts[i],
                    f"{place} was scored with the prompt {scored.prompts[i]!r}",
                )
    for first in range(0, len(run.steps), run.steps_per_batch):
        steps = run.steps[first : first + run.steps_per_batch]
        batch = steps[0].batch
        drawn_rows = Counter(zip(batch.prompt_ids, batch.completion_ids, strict=True))
        used = Counter(
            row for step in steps for micro_batch in step.micro_batches for row in micro_batch.rows
        )
        span = " to ".join(str(step.number) for step in (steps[0], steps[-1])[: len(steps)])
        # The run may end before all completions are used.
        right = used & drawn_rows if len(steps) < run.steps_per_batch else drawn_rows
        require(
            used == right,
            f"step {span}: of {drawn_rows.total()} completions drawn "
            f"{(drawn_rows & used).total()} are among the {used.total()} that the loss was given",
        )


@invariant("special tokens added to a prompt that the chat template has completed")
def prompts_are_the_templates(run: Trace, oracle: Oracle) -> None:
    """Each prompt's tokens are those of the chat template, with nothing added."""
    right = set(asked_prompts(run, oracle))
    for batch in batches(run):
        for i, ids in enumerate(batch.prompt_ids):
            place = where(batch, i, run.config.num_generations)
            require(
                ids in right,
                f"{place}: the {len(ids)} tokens of its prompt, which begin with "
                f"{list(ids[:3])}, are those of none of the problems"
                + ("; without the first they are" if ids[1:] in right else ""),
            )


@invariant("a stale or second copy of the model draws: rollouts from the base (unsloth#8701)")
def rollouts_are_the_current_policys(run: Trace, oracle: Oracle) -> None:
    """Every completion is what the current weights draw from the recorded random state."""
    for batch in [draw for joined in batches(run) for draw in joined.draws]:
        number = batch.step + 1
        require(
            batch.random_state is not None,
            f"step {number}: the model under training drew nothing: rollouts come from elsewhere",
        )
        weights, how = run.steps[batch.step].weights, run.config
        limits = {"top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p}
        same = _share(oracle.redraw(weights, batch, how.temperature, **limits))
        # One token in a hundred may differ because of rounding.
        if same < 0.99:
            base = _share(oracle.redraw(oracle.base, batch, how.temperature, **limits))
            every = _share(oracle.redraw(weights, batch, how.temperature))
            raise BrokenInvariantError(
                f"step {number}: the current weights draw only {same:.1%} of the tokens again (the "
                f"base policy's draw {base:.1%}): the rollouts are not the current policy's at "
                f"temperature {how.temperature} and top_p {how.top_p}"
                + (f" (without top_p: {every:.1%})" if how.top_p < 1 else "")
            )


@invariant("one reward broadcast to all (trl#6533), scores kept from elsewhere, a reward that errs")
def rewards_are_the_completions(run: Trace, oracle: Oracle) -> None:
    """Scoring the raw completions again gives the rewards that were returned and logged."""
    g, names = run.config.num_generations, run.trainer.reward_func_names
    for batch in batches(run):
        table = _table(run, batch)
        for n, scored in batch.scored.items():
            again = _rescored(run, oracle, batch, n)
            if not all(map(_same, scored.rewards, again)):
                once_more = _rescored(run, oracle, batch, n)
                if not all(map(_same, once_more, again)):
                    raise NotLookedAtError(f"{names[n]}, which scores the same text differently")
            # Of functions with one name, TRL's table has the last one's rewards.
            listed = table is not None and names[n] not in names[n + 1 :]
            for i, right in enumerate(again):
                place = where(batch, i, g)
                seen = scored.rewards[i]
                require(_same(seen, right), f"{place} scored {seen}, not {right}")
                require(
                    seen is None or math.isfinite(seen),
                    f"{place} scored {seen} by {names[n]}: no advantage follows from it",
                )
                if listed:
                    logged = float(table[names[n]].iloc[i])
                    require(
                        _same(None if math.isnan(logged) else logged, right),
                        f"{place} is logged with reward {logged:.6g}, and its reward is {right}",
                    )
    for row in run.rows:
        drawn = run.drawn_in(row)
        figures = {"reward": [_mean(batch.rewards) for batch in drawn]}
        returned = [scored.rewards for batch in drawn for scored in batch.scored.values()]
        for n, name in enumerate(names):
            for batch in drawn:
                scores = batch.scored[n].rewards
                figures.setdefault(f"rewards/{name}/mean", []).append(_mean(scores))
                figures.setdefault(f"rewards/{name}/std", []).append(_spread(scores))
        for name, values in figures.items():
            _logged(row, name, values, _room(returned))


@invariant("ddof, ε or scale_rewards changed (trl#3991), or groups that are mixed up")
def advantages_are_group_relative(run: Trace, oracle: Oracle) -> None:
    """The advantages logged and used are those of the rewards, each within its own group.

    A reward of None is left out of mean and σ, and has advantage 0 (trl#5902).
    """
    g, how = run.config.num_generations, Conventions.of(run.config)
    for step in run.steps:
        batch = step.batch
        right = oracle.advantages(batch.rewards, g, how).tolist()
        room = (1e-5 + oracle.rounding(batch.rewards, g, how)).tolist()
        used = {
            place: advantage
            for rows, micro_batch in zip(rows_of(step, right), step.micro_batches, strict=True)
            for place, advantage in zip(rows, micro_batch.advantages.tolist(), strict=False)
        }
        table = _table(run, batch)
        logged = {} if table is None else dict(enumerate(table["advantage"].tolist()))
        for what, seen in (("used", used), ("logged", logged)):
            for i, value in sorted(seen.items()):
                if not math.isclose(value, right[i], rel_tol=1e-4, abs_tol=room[i]):
                    raise BrokenInvariantError(
                        f"{where(batch, i, g)}: the advantage {what} is {value:.6f}, and "
                        f"{right[i]:.6f} is right{oracle.suspect_advantages(run, batch, seen)}"
                    )
    for row in run.rows:
        drawn = run.drawn_in(row)
        spreads = [_spread(batch.rewards) for batch in drawn]
        _logged(row, "reward_std", spreads, _room([batch.rewards for batch in drawn]))
        if drawn:
            share = row["frac_reward_zero_std"]
            least, most = (
                average([_flat(batch, g, how, exactly=exactly) for batch in drawn])
                for exactly in (True, False)
            )
            require(
                least - 1e-6 <= share <= most + 1e-6,
                f"step {row['step']}: frac_reward_zero_std is {share}, and {most:.7g} is right",
            )


@invariant("padding or a second end counted as text (trl#7039), or lengths of other completions")
def counts_are_those_of_the_completions(run: Trace, oracle: Oracle) -> None:
    """Logged lengths, truncation and token counts are those of the raw completions."""
    g, most = run.config.num_generations, run.config.max_completion_length
    for batch in batches(run):
        for i, ids in enumerate(batch.completion_ids):
            place = f"{where(batch, i, g)} has {len(ids)} tokens"
            require(len(ids) <= most, f"{place}, and max_completion_length is {most}")
            require(
                len(ids) == most or ids[-1] in oracle.ends,
                f"{place}, none of which is an end token, and max_completion_length is {most}",
            )
    tokens = 0
    for row in run.rows:
        figures: list[dict[str, float]] = []
        for batch in run.drawn_in(row):
            lengths = [len(ids) for ids in batch.completion_ids]
            tokens += sum(lengths) + sum(len(ids) for ids in batch.prompt_ids)
            cut = [oracle.truncated(ids) for ids in batch.completion_ids]
            ended = [n for n, is_cut in zip(lengths, cut, strict=True) if not is_cut] or [0]
            figures.append(
                {
                    "completions/mean_length": average(lengths),
                    "completions/min_length": min(lengths),
                    "completions/max_length": max(lengths),
                    "completions/mean_terminated_length": average(ended),
                    "completions/min_terminated_length": min(ended),
                    "completions/max_terminated_length": max(ended),
                    "completions/clipped_ratio": average(cut),
                }
            )
        for name in figures[0] if figures else ():
            _logged(row, name, [figure[name] for figure in figures])
        if figures:
            equal(f"step {row['step']}: num_tokens", row["num_tokens"], tokens)


def asked_prompts(run: Trace, oracle: Oracle) -> list[Tokens]:
    """Return the tokens of the recipe's rendered problems, or of the data set's prompts.

    They are in order; of a data set they are those of the problems that were asked.
    """
    recipe = run.recipe
    if recipe is None:
        asked = {identity(prompt) for batch in batches(run) for prompt in batch.prompts}
        return oracle.prompt_tokens([p for p in prompts_of(run) if identity(p) in asked])
    assert oracle.policy is not None
    texts = [oracle.policy.render(problem.prompt) for problem in recipe.problems()]
    ids = oracle.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(row) for row in ids]


def prompts_of(run: Trace) -> list[Any]:
    """Return the prompts of the trainer's data set, in order."""
    return list(run.trainer.train_dataset["prompt"])


def batches(run: Trace) -> list[Batch]:
    """Return the generation batches of a run, in order."""
    return list(dict.fromkeys(step.batch for step in run.steps))


def content(completion: Any) -> Any:
    """Return the text of a completion, which is a text or the assistant's one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def _rescored(run: Trace, oracle: Oracle, batch: Batch, n: int) -> list[float | None]:
    """Score the completions of a batch by reward function ``n`` again, each process's at once."""
    return [
        reward
        for draw in batch.draws
        for reward in _again(run.rewards[n], draw.scored[n], oracle.texts(draw.completion_ids))
    ]


def _again(reward: RewardFunction, scored: Scored, texts: Sequence[str]) -> Sequence[float | None]:
    """Score the texts of completions as ``reward`` was called."""
    spoken = isinstance(scored.completions[0], str)
    completions = [t if spoken else [{"role": "assistant", "content": t}] for t in texts]
    rewards: Any = reward(
        prompts=list(scored.prompts),
        completions=completions,
        completion_ids=list(map(list, scored.ids)),
        **scored.columns,
    )
    return asyncio.run(rewards) if inspect.isawaitable(rewards) else rewards  # type: ignore[arg-type]


def _same(seen: float | None, right: float | None) -> bool:
    if seen is None or right is None:
        return seen is right
    return math.isclose(seen, right, rel_tol=1e-6, abs_tol=1e-6)


def _logged(row: Row, name: str, values: Sequence[float], room: float = 1e-6) -> None:
    """Require the mean of figures of batches in a row, without those that are not a number."""
    numbers = [value for value in values if not math.isnan(value)]
    if numbers:
        equal(f"step {row['step']}: {name}", row[name], average(numbers), room)
    elif values:
        require(row[name] is None, f"step {row['step']}: {name} is {row[name]} of no number")


def _table(run: Trace, batch: Batch) -> Any:
    """Return TRL's table of a batch's completions, in their order, or None."""
    covering = [int(row["step"]) for row in run.rows if batch in run.drawn_in(row)]
    return run.tables.get(covering[0]) if covering else None


def _share(redrawn: Sequence[Sequence[bool]]) -> float:
    return average([same for row in redrawn for same in row])


def _mean(rewards: Sequence[float | None]) -> float:
    scores = [reward for reward in rewards if reward is not None]
    return average(scores) if scores else math.nan


def _spread(rewards: Sequence[float | None]) -> float:
    scores = [reward for reward in rewards if reward is not None]
    return statistics.stdev(scores) if len(scores) > 1 else math.nan


def _room(rewards: Sequence[Sequence[float | None]]) -> float:
    """Return how far single precision may take the mean and σ of ``rewards`` from the right."""
    return 1e-6 + ROUNDING * max((abs(r or 0.0) for one in rewards for r in one), default=0.0)


def _flat(batch: Batch, g: int, how: Conventions, *, exactly: bool) -> float:
    """Return TRL's ``frac_reward_zero_std``: the share of completions without spread.

    With ``exactly``, of those whose σ has no rounding error either.
    """
    groups = [batch.rewards[i : i + g] for i in range(0, len(batch.rewards), g)]
    if how.scale == "batch":
        groups = [batch.rewards]
    scored = [[reward for reward in group if reward is not None] for group in groups]
    return average(
        [
            len(group) > 1 and max(group) == min(group) and not (exactly and _rounds(group))
            for group in scored
        ]
    )


def _rounds(equal_rewards: Sequence[float]) -> bool:
    """Tell whether a sum of equal rewards may have a rounding error in single precision."""
    sums = torch.tensor(equal_rewards, dtype=torch.float64).cumsum(0)
    return bool((sums.float() != sums).any())
