"""Invariants of what is drawn, scored and counted, up to the advantages."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from grpo_harness.contract.conventions import Conventions
from grpo_harness.contract.invariant import (
    BrokenInvariantError,
    average,
    equal,
    invariant,
    require,
    where,
)
from grpo_harness.contract.oracle import Oracle, rows_of
from grpo_harness.contract.trace import Batch, Tokens, Trace
from grpo_harness.rewards.functions import RewardFunction
from grpo_harness.rewards.rule import reward_func
from grpo_harness.tasks import make_problems

KEYS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "num_tokens",
    "step_time",
    "entropy",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/reward_func/mean",
    "rewards/reward_func/std",
    *(
        f"completions/{which}_{length}"
        for which in ("mean", "min", "max")
        for length in ("length", "terminated_length")
    ),
    "completions/clipped_ratio",
    *(f"clip_ratio/{what}" for what in ("low_mean", "low_min", "high_mean", "high_max")),
    "clip_ratio/region_mean",
)
"""The keys of a logged row; also ``kl`` if beta is not 0."""


@invariant("a default that flipped in an upgrade, or a field of the recipe that is dropped")
def settings_are_the_recipes(run: Trace) -> None:
    """The trainer has the recipe's settings, and the pinned values for the others.

    TRL 0.19, 0.22, 0.27 and 1.10 changed defaults (β, loss_type, top_k, the KL estimator).
    """
    recipe, trainer = run.recipe, run.trainer
    shared = {
        "num_generations": recipe.num_generations,
        "max_completion_length": recipe.max_completion_length,
        "temperature": recipe.temperature,
        "top_p": recipe.top_p,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "beta": recipe.beta,
        "loss_type": recipe.loss_type,
        "scale_rewards": recipe.scale_rewards,
        "num_iterations": 1,
        "mask_truncated_completions": False,
        "importance_sampling_level": "token",
        "multi_objective_aggregation": "sum_then_normalize",
        "top_entropy_quantile": 1.0,
    }
    arguments = {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "max_steps": recipe.steps,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "steps_per_generation": recipe.gradient_accumulation_steps,
        "epsilon": recipe.epsilon,
        "seed": recipe.seed,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_bias_correction_kl": True,
        "delta": None,
        **shared,
    }
    own = {
        "epsilon_low": recipe.epsilon,
        "epsilon_high": recipe.config.get("epsilon_high") or recipe.epsilon,
        **shared,
    }
    for holder, settings in ((trainer.args, arguments), (trainer, own)):
        for name, value in settings.items():
            right = recipe.config.get(name, value)
            seen = getattr(holder, name, None)
            require(seen == right, f"{type(holder).__name__}.{name} is {seen!r}, not {right!r}")


@invariant("a metric that was renamed or dropped, or a step that blew up (trl#6702)")
def rows_are_complete_and_finite(run: Trace) -> None:
    """Every step is logged with all figures, and every figure is a finite number."""
    every = int(run.trainer.args.logging_steps)
    logged = [int(row["step"]) for row in run.rows]
    require(
        logged == list(range(every, run.recipe.steps + 1, every)),
        f"rows of steps {logged} are logged, of {run.recipe.steps} steps",
    )
    for row in run.rows:
        for key in (*KEYS, *(["kl"] if run.recipe.beta else [])):
            value = row.get(key)
            require(key in row, f"step {row['step']}: {key} is not logged")
            require(
                isinstance(value, int | float) and math.isfinite(value),
                f"step {row['step']}: {key} is {value}",
            )


@invariant("the policy was loaded in another precision, or from somewhere else")
def training_starts_from_the_base(run: Trace, oracle: Oracle) -> None:
    """Before the first step the weights are the base policy's, to the bit."""
    for name, right in oracle.base.items():
        off = int((run.steps[0].weights[name] != right).sum())
        require(off == 0, f"{off} of {right.numel()} elements of {name} differ from the base")


@invariant("texts or ids that are changed, mixed up or repeated on the way (trl#6533, trl#7039)")
def what_is_drawn_is_scored_and_trained_on(run: Trace, oracle: Oracle) -> None:
    """The completions that were drawn are those that were scored and trained on."""
    g = run.recipe.num_generations
    tokenizer = oracle.policy.tokenizer
    for batch in _batches(run):
        ids = list(map(list, batch.completion_ids))
        decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = [tuple(ids) for ids in tokenizer(list(batch.prompts))["input_ids"]]
        for i, (drawn, text) in enumerate(zip(batch.completion_ids, decoded, strict=True)):
            place = where(batch, i, g)
            require(
                batch.prompt_ids[i] == given[i], f"{place} was drawn for another prompt's tokens"
            )
            require(
                batch.prompts[i] == batch.prompts[i - i % g],
                f"{place} has another prompt than the first of its group",
            )
            require(
                batch.texts[i] == text and batch.scored[i] == drawn,
                f"{place} was drawn as {text!r} and scored as {batch.texts[i]!r}",
            )
    for first in range(0, len(run.steps), run.steps_per_batch):
        steps = run.steps[first : first + run.steps_per_batch]
        batch = steps[0].batch
        drawn_rows = Counter(zip(batch.prompt_ids, batch.completion_ids, strict=True))
        used = Counter(
            row for step in steps for micro_batch in step.micro_batches for row in micro_batch.rows
        )
        span = " to ".join(str(step.number) for step in (steps[0], steps[-1])[: len(steps)])
        require(
            used == drawn_rows,
            f"step {span}: of {drawn_rows.total()} completions drawn "
            f"{(drawn_rows & used).total()} are among the {used.total()} that the loss was given",
        )


@invariant("special tokens added to a prompt that the chat template has completed")
def prompts_are_the_templates(run: Trace, oracle: Oracle) -> None:
    """Each prompt's tokens are those of the chat template, with nothing added."""
    right = set(recipe_prompts(run, oracle))
    for batch in _batches(run):
        for i, ids in enumerate(batch.prompt_ids):
            place = where(batch, i, run.recipe.num_generations)
            require(
                ids in right,
                f"{place}: the {len(ids)} tokens of its prompt, which begin with "
                f"{list(ids[:3])}, are those of none of the recipe's problems"
                + ("; without the first they are" if ids[1:] in right else ""),
            )


@invariant("a stale or second copy of the model draws: rollouts from the base (unsloth#8701)")
def rollouts_are_the_current_policys(run: Trace, oracle: Oracle) -> None:
    """Every completion is what the current weights draw from the recorded random state."""
    for batch in _batches(run):
        number = batch.step + 1
        require(
            batch.random_state is not None,
            f"step {number}: the model under training drew nothing: rollouts come from elsewhere",
        )
        weights, recipe = run.steps[batch.step].weights, run.recipe
        same = _share(oracle.redraw(weights, batch, recipe.temperature, recipe.top_p))
        # One token in a hundred may differ because of rounding.
        if same < 0.99:
            base = _share(oracle.redraw(oracle.base, batch, recipe.temperature, recipe.top_p))
            every = _share(oracle.redraw(weights, batch, recipe.temperature))
            raise BrokenInvariantError(
                f"step {number}: the current weights draw only {same:.1%} of the tokens again (the "
                f"base policy's draw {base:.1%}): the rollouts are not the current policy's at "
                f"temperature {recipe.temperature} and top_p {recipe.top_p}"
                + (f" (without top_p: {every:.1%})" if recipe.top_p < 1 else "")
            )


@invariant("one reward broadcast to all (trl#6533), scores kept from elsewhere, a reward that errs")
def rewards_are_the_completions(
    run: Trace, oracle: Oracle, reward: RewardFunction = reward_func
) -> None:
    """Scoring the raw completions again gives the rewards that were returned and logged."""
    g = run.recipe.num_generations
    for batch in _batches(run):
        ids = list(map(list, batch.completion_ids))
        texts = oracle.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        again = list(reward(prompts=list(batch.prompts), completions=texts))
        table = _table(run, batch)
        for i, right in enumerate(again):
            place = where(batch, i, g)
            require(batch.rewards[i] == right, f"{place} scored {batch.rewards[i]}, not {right}")
            if table is not None:
                logged = float(table["reward_func"].iloc[i])
                number = math.nan if right is None else right
                require(
                    math.isnan(logged) == math.isnan(number)
                    and (math.isnan(number) or abs(logged - number) <= 1e-6),
                    f"{place} is logged with reward {logged:.6g}, and its reward is {right}",
                )
    for row, batches in _logged(run):
        scores = [_scores(batch) for batch in batches]
        means, spreads = [average(s) for s in scores], [_spread(s) for s in scores]
        for name, right in (
            ("reward", average(means)),
            ("rewards/reward_func/mean", average(means)),
            ("rewards/reward_func/std", average(spreads)),
        ):
            equal(f"step {row['step']}: {name}", row[name], right)


@invariant("ddof, ε or scale_rewards changed (trl#3991), or groups that are mixed up")
def advantages_are_group_relative(run: Trace, oracle: Oracle) -> None:
    """The advantages logged and used are those of the rewards, each within its own group.

    A reward of None is left out of mean and σ, and has advantage 0 (trl#5902).
    """
    g, how = run.recipe.num_generations, Conventions.of(run.recipe)
    for step in run.steps:
        batch = step.batch
        right = oracle.advantages(batch.rewards, g, how).tolist()
        used = _in_order(
            batch,
            right,
            {
                place: advantage
                for rows, micro_batch in zip(rows_of(step), step.micro_batches, strict=True)
                for place, advantage in zip(rows, micro_batch.advantages.tolist(), strict=False)
            },
        )
        table = _table(run, batch)
        logged = {} if table is None else dict(enumerate(table["advantage"].tolist()))
        for what, seen in (("used", used), ("logged", logged)):
            for i, value in sorted(seen.items()):
                # Rounding of the rewards matters more if they hardly differ.
                if not math.isclose(value, right[i], rel_tol=1e-4, abs_tol=1e-5):
                    raise BrokenInvariantError(
                        f"{where(batch, i, g)}: the advantage {what} is {value:.6f}, and "
                        f"{right[i]:.6f} is right{oracle.suspect_advantages(run, batch, seen)}"
                    )
    for row, batches in _logged(run):
        spread = average([_spread(_scores(batch)) for batch in batches])
        flat = average([_flat(batch, g, how) for batch in batches])
        equal(f"step {row['step']}: reward_std", row["reward_std"], spread)
        equal(f"step {row['step']}: frac_reward_zero_std", row["frac_reward_zero_std"], flat)


@invariant("padding or a second end counted as text (trl#7039), or lengths of other completions")
def counts_are_those_of_the_completions(run: Trace, oracle: Oracle) -> None:
    """Logged lengths, truncation and token counts are those of the raw completions."""
    g, most = run.recipe.num_generations, run.recipe.max_completion_length
    for batch in _batches(run):
        for i, ids in enumerate(batch.completion_ids):
            place = f"{where(batch, i, g)} has {len(ids)} tokens"
            require(len(ids) <= most, f"{place}, and max_completion_length is {most}")
            require(
                len(ids) == most or not oracle.truncated(ids),
                f"{place}, none of which is an end token, and max_completion_length is {most}",
            )
    tokens = 0
    for row, batches in _logged(run):
        figures: list[dict[str, float]] = []
        for batch in batches:
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
        for name in figures[0]:
            right = average([figure[name] for figure in figures])
            equal(f"step {row['step']}: {name}", row[name], right)
        equal(f"step {row['step']}: num_tokens", row["num_tokens"], tokens)


def recipe_prompts(run: Trace, oracle: Oracle) -> list[Tokens]:
    """Return the tokens of the recipe's rendered problems, in order."""
    recipe = run.recipe
    problems = make_problems(recipe.n_math, recipe.n_prog, recipe.problem_seed)
    texts = [oracle.policy.render(problem.prompt) for problem in problems]
    ids = oracle.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(row) for row in ids]


def _in_order(batch: Batch, right: Sequence[float], seen: Mapping[int, float]) -> dict[int, float]:
    """Reorder the advantages of equal rows, whose places are interchangeable, as in ``right``."""
    alike: dict[object, list[int]] = {}
    for place in seen:
        row = batch.prompt_ids[place], batch.completion_ids[place]
        alike.setdefault(row, []).append(place)
    return {
        place: value
        for places in alike.values()
        for place, value in zip(
            sorted(places, key=lambda i: right[i]), sorted(seen[i] for i in places), strict=True
        )
    }


def _batches(run: Trace) -> list[Batch]:
    return list(dict.fromkeys(step.batch for step in run.steps))


def _logged(run: Trace) -> Iterator[tuple[Mapping[str, float], list[Batch]]]:
    """Yield each row with the batches that were drawn in the steps that it covers."""
    for row in run.rows:
        yield row, list(dict.fromkeys(step.batch for step in run.steps_of(row)))


def _table(run: Trace, batch: Batch) -> Any:
    """Return TRL's table of a batch's completions, in their order, or None."""
    covering = [
        int(row["step"]) for row in run.rows if batch in {s.batch for s in run.steps_of(row)}
    ]
    return run.tables.get(covering[0]) if covering else None


def _share(redrawn: Sequence[Sequence[bool]]) -> float:
    return average([same for row in redrawn for same in row])


def _spread(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std())


def _scores(batch: Batch) -> list[float]:
    return [reward for reward in batch.rewards if reward is not None]


def _flat(batch: Batch, g: int, how: Conventions) -> float:
    """Return TRL's ``frac_reward_zero_std``: the share of completions without spread."""
    if how.scale == "batch":
        return float(_spread(_scores(batch)) == 0)
    groups = [batch.rewards[i : i + g] for i in range(0, len(batch.rewards), g)]
    scored = [[reward for reward in group if reward is not None] for group in groups]
    return average([len(group) > 1 and max(group) == min(group) for group in scored])
