"""What must hold of a watched run: one function, one invariant, and the regression it is there for.

Every function takes the run (some take two) and the oracle. The figures come from the raw
completions and from the weights before each step; what TRL itself says of them is the other side
of the comparison. The numbers of issues are those of the libraries in which the field met them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.contract.oracle import (
    GRADIENT_TOLERANCE,
    Conventions,
    Oracle,
    distance,
    rows_of,
)
from harness.contract.witness import Step, Window, Witness
from harness.evaluation import RewardFunction
from harness.reward import reward_func

Check = Callable[..., None]

INVARIANTS: dict[str, Check] = {}
"""All invariants by name."""

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
"""What a logged row has; ``kl`` too where beta is not 0."""


class BrokenInvariantError(AssertionError):
    """An invariant that does not hold: its name, the number, the place, what it usually means."""


def invariant(usually: str) -> Callable[[Check], Check]:
    """Make a check an invariant: named in its failure, with what such a failure usually means."""

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def named(run: Witness, *others: Any) -> None:
            try:
                check(run, *others)
            except BrokenInvariantError as broken:
                raise BrokenInvariantError(
                    f"{check.__name__}: {(check.__doc__ or '').splitlines()[0]}\n"
                    f"  broken in run {run.recipe.name!r}: {broken}\n"
                    f"  usually: {usually}"
                ) from None

        INVARIANTS[check.__name__] = named
        return named

    return decorate


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenInvariantError(otherwise)


def _equal(
    place: str, seen: float | None, right: float, absolute: float = 1e-6, relative: float = 1e-5
) -> None:
    close = seen is not None and abs(seen - right) <= absolute + relative * abs(right)
    _require(close, f"{place} is {seen}, and {right:.7g} is right")


@invariant("a default that flipped in an upgrade, or a field of the recipe that is dropped")
def settings_are_the_recipes(run: Witness) -> None:
    """The trainer runs by the recipe, and by what is pinned beside it.

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
            _require(seen == right, f"{type(holder).__name__}.{name} is {seen!r}, not {right!r}")


@invariant("a metric that was renamed or dropped, or a step that blew up (trl#6702)")
def rows_are_complete_and_finite(run: Witness) -> None:
    """Every step is logged, with every figure, and every figure is a number."""
    every = int(run.trainer.args.logging_steps)
    logged = [int(row["step"]) for row in run.rows]
    _require(
        logged == list(range(every, run.recipe.steps + 1, every)),
        f"rows of steps {logged} are logged, of {run.recipe.steps} steps",
    )
    for row in run.rows:
        for key in (*KEYS, *(["kl"] if run.recipe.beta else [])):
            value = row.get(key)
            _require(key in row, f"step {row['step']}: {key} is not logged")
            _require(
                isinstance(value, int | float) and math.isfinite(value),
                f"step {row['step']}: {key} is {value}",
            )


@invariant("the policy was loaded in another precision, or from somewhere else")
def training_starts_from_the_base(run: Witness, oracle: Oracle) -> None:
    """Before the first step the weights are the base policy's, to the bit."""
    for name, right in oracle.base.items():
        off = int((run.steps[0].weights[name] != right).sum())
        _require(off == 0, f"{off} of {right.numel()} elements of {name} differ from the base")


@invariant("texts or ids that are changed, mixed up or repeated on the way (trl#6533, trl#7039)")
def what_is_drawn_is_scored_and_trained_on(run: Witness, oracle: Oracle) -> None:
    """The completions that the model drew are those that were scored and those that were used."""
    g = run.recipe.num_generations
    tokenizer = oracle.policy.tokenizer
    for window in _windows(run):
        ids = list(map(list, window.completion_ids))
        decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = [tuple(ids) for ids in tokenizer(list(window.prompts))["input_ids"]]
        for i, (drawn, text) in enumerate(zip(window.completion_ids, decoded, strict=True)):
            place = _place(window, i, g)
            _require(
                window.prompt_ids[i] == given[i], f"{place} was drawn for another prompt's tokens"
            )
            _require(
                window.prompts[i] == window.prompts[i - i % g],
                f"{place} has another prompt than the first of its group",
            )
            _require(
                window.texts[i] == text and window.scored[i] == drawn,
                f"{place} was drawn as {text!r} and scored as {window.texts[i]!r}",
            )
    for step in run.steps:
        used = sorted(place for rows in rows_of(step) for place in rows)
        rows = sum(len(part.rows) for part in step.parts)
        n = len(step.window.completion_ids)
        _require(
            used == list(range(n)) and rows == n,
            f"step {step.number}: of {n} completions drawn {len(used)} are among the {rows} "
            "that the loss was given",
        )


@invariant("a stale or second copy of the model draws: rollouts from the base (unsloth#8701)")
def rollouts_are_the_current_policys(run: Witness, oracle: Oracle) -> None:
    """Every completion is what the weights of its step draw from that random state."""
    for window in _windows(run):
        number = window.step + 1
        _require(
            window.random_state is not None,
            f"step {number}: the model under training drew nothing; who made these rollouts?",
        )
        weights, temperature = run.steps[window.step].weights, run.recipe.temperature
        same = _share(oracle.redraw(weights, window, temperature))
        # A token in a hundred may fall the other way by a rounding.
        if same < 0.99:
            base = _share(oracle.redraw(oracle.base, window, temperature))
            raise BrokenInvariantError(
                f"step {number}: the current weights draw only {same:.1%} of the tokens again (the "
                f"base policy's draw {base:.1%}): the rollouts are not the current policy's at "
                f"temperature {temperature}"
            )


@invariant("one reward broadcast to all (trl#6533), scores kept from elsewhere, a reward that errs")
def rewards_are_the_completions(
    run: Witness, oracle: Oracle, reward: RewardFunction = reward_func
) -> None:
    """The raw completions, scored again, have the rewards that were returned and logged."""
    g = run.recipe.num_generations
    for window in _windows(run):
        ids = list(map(list, window.completion_ids))
        texts = oracle.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        again = list(reward(prompts=list(window.prompts), completions=texts))
        table = _table(run, window)
        for i, right in enumerate(again):
            place = _place(window, i, g)
            _require(window.rewards[i] == right, f"{place} scored {window.rewards[i]}, not {right}")
            if table is not None:
                logged = float(table["reward_func"].iloc[i])
                number = math.nan if right is None else right
                _require(
                    math.isnan(logged) == math.isnan(number)
                    and (math.isnan(number) or abs(logged - number) <= 1e-6),
                    f"{place} is logged with reward {logged:.6g}, and its reward is {right}",
                )
    for row, windows in _logged(run):
        scores = [_scores(window) for window in windows]
        means, spreads = [_mean(s) for s in scores], [_spread(s) for s in scores]
        for name, right in (
            ("reward", _mean(means)),
            ("rewards/reward_func/mean", _mean(means)),
            ("rewards/reward_func/std", _mean(spreads)),
        ):
            _equal(f"step {row['step']}: {name}", row[name], right)


@invariant("ddof, ε or scale_rewards changed (trl#3991), or groups that are mixed up")
def advantages_are_group_relative(run: Witness, oracle: Oracle) -> None:
    """The advantages logged and used are those of the rewards, each within its own group.

    A reward of None counts neither in mean nor in σ, and has advantage 0 (trl#5902).
    """
    g, how = run.recipe.num_generations, Conventions.of(run.recipe)
    for step in run.steps:
        window = step.window
        right = oracle.advantages(window.rewards, g, how).tolist()
        used = {
            place: advantage
            for rows, part in zip(rows_of(step), step.parts, strict=True)
            for place, advantage in zip(rows, part.advantages.tolist(), strict=False)
        }
        table = _table(run, window)
        logged = {} if table is None else dict(enumerate(table["advantage"].tolist()))
        for what, seen in (("used", used), ("logged", logged)):
            for i, value in sorted(seen.items()):
                # A rounding of the rewards counts as much more where they hardly differ.
                if not math.isclose(value, right[i], rel_tol=1e-4, abs_tol=1e-5):
                    raise BrokenInvariantError(
                        f"{_place(window, i, g)}: the advantage {what} is {value:.6f}, and "
                        f"{right[i]:.6f} is right{oracle.suspect_advantages(run, window, seen)}"
                    )
    for row, windows in _logged(run):
        spread = _mean([_spread(_scores(window)) for window in windows])
        flat = _mean([_flat(window, g, how) for window in windows])
        _equal(f"step {row['step']}: reward_std", row["reward_std"], spread)
        _equal(f"step {row['step']}: frac_reward_zero_std", row["frac_reward_zero_std"], flat)


@invariant("padding or a second end counted as text (trl#7039), or lengths of other completions")
def counts_are_those_of_the_completions(run: Witness, oracle: Oracle) -> None:
    """Lengths, the share cut off and the tokens seen are those of the raw completions."""
    tokens = 0
    for row, windows in _logged(run):
        figures: list[dict[str, float]] = []
        for window in windows:
            lengths = [len(ids) for ids in window.completion_ids]
            tokens += sum(lengths) + sum(len(ids) for ids in window.prompt_ids)
            cut = [oracle.truncated(ids) for ids in window.completion_ids]
            ended = [n for n, is_cut in zip(lengths, cut, strict=True) if not is_cut] or [0]
            figures.append(
                {
                    "completions/mean_length": _mean(lengths),
                    "completions/min_length": min(lengths),
                    "completions/max_length": max(lengths),
                    "completions/mean_terminated_length": _mean(ended),
                    "completions/min_terminated_length": min(ended),
                    "completions/max_terminated_length": max(ended),
                    "completions/clipped_ratio": _mean(cut),
                }
            )
        for name in figures[0]:
            right = _mean([figure[name] for figure in figures])
            _equal(f"step {row['step']}: {name}", row[name], right)
        _equal(f"step {row['step']}: num_tokens", row["num_tokens"], tokens)


@invariant("temperature ignored (trl#3029), the attention mask left out (trl#2708), shifted tokens")
def log_probabilities_are_the_policys(run: Witness, oracle: Oracle) -> None:
    """Padded in a batch, each token has the log-probability that it has without padding."""
    g, temperature = run.recipe.num_generations, run.recipe.temperature
    for step in run.steps:
        right = oracle.step(run, step).log_probabilities
        for rows, part in zip(rows_of(step), step.parts, strict=True):
            if part.log_probabilities is None:
                continue  # an older TRL does not show them: its gradient tells
            for place, row in zip(rows, part.log_probabilities, strict=False):
                ids = step.window.completion_ids[place]
                if Conventions.of(run.recipe).mask_truncated and oracle.truncated(ids):
                    continue
                seen, wanted = row[: len(ids)].double(), right[place, : len(ids)]
                worst = int((seen - wanted).abs().argmax())
                if not abs(seen[worst] - wanted[worst]) <= 1e-4:
                    with torch.no_grad():
                        plain, _ = oracle.log_probabilities(step.weights, step.window, 1.0)
                    ignored = torch.allclose(seen, plain[place, : len(ids)].cpu(), atol=1e-4)
                    raise BrokenInvariantError(
                        f"{_place(step.window, place, g)}, token {worst}: log-probability "
                        f"{float(seen[worst]):.6f}, and {float(wanted[worst]):.6f} is right at "
                        f"temperature {temperature}"
                        + ("; it is that of 1: the temperature is ignored" if ignored else "")
                    )


@invariant("another loss_type or normaliser under accumulation (trl#6024, #5619, #6369), KL, ε")
def loss_equals_the_oracles(run: Witness, oracle: Oracle) -> None:
    """Each step's loss is the formula's on the raw completions, and it is what is logged."""
    right = {step.number: oracle.step(run, step).loss for step in run.steps}
    for step in run.steps:
        seen = sum(part.loss for part in step.parts)
        _gap(run, oracle, step, "the loss", seen, right[step.number])
    for row in run.rows:
        steps = run.steps_of(row)
        mean = _mean([right[step.number] for step in steps])
        _gap(run, oracle, steps[-1], "the loss logged", row["loss"], mean)


@invariant("another loss_type, ε, KL, temperature or normaliser (trl#6024, #5619, #3029)")
def gradient_equals_the_oracles(run: Witness, oracle: Oracle) -> None:
    """Each step's gradient is autograd's of the formula, on a fresh copy of the weights."""
    for step in run.steps:
        right = oracle.step(run, step).gradient
        off = distance(step.gradient, right)
        if not off <= GRADIENT_TOLERANCE:
            raise BrokenInvariantError(
                f"step {step.number}: the gradient is {off:.2g} of its length away from the "
                f"oracle's (allowed: {GRADIENT_TOLERANCE:g}){oracle.suspect(run, step)}"
            )
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in right.values()))
        for row in run.rows:
            if row["step"] == step.number:
                _equal(f"step {step.number}: grad_norm", row["grad_norm"], norm, 1e-6, 1e-4)


@invariant("another estimator of the KL, a reference that is not the base, or another clip range")
def figures_of_the_policy_are_the_oracles(run: Witness, oracle: Oracle) -> None:
    """Entropy, KL to the base and the clip ratios that are logged are those of the tokens."""
    for row in run.rows:
        computed = [oracle.step(run, step).logged for step in run.steps_of(row)]
        for name in computed[0]:
            if name != "kl" or run.recipe.beta:
                right = _mean([figures[name] for figures in computed])
                _equal(f"step {row['step']}: {name}", row[name], right, 1e-5, 1e-4)


@invariant("old log-probabilities that are another policy's, or of another temperature")
def on_policy_the_ratio_is_one(run: Witness) -> None:
    """Where completions are used once, ρ is exactly 1 and nothing is clipped."""
    for step in run.steps:
        for part in step.parts:
            if part.old is None or part.log_probabilities is None:
                continue  # the trainer takes π itself for π_old
            rho = torch.exp(part.log_probabilities - part.old)
            _require(bool((rho == 1).all()), f"step {step.number}: ρ is up to {float(rho.max())}")
    for row in run.rows:
        for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"):
            value = row[f"clip_ratio/{name}"]
            _require(value == 0, f"step {row['step']}: clip_ratio/{name} is {value}, on-policy")


@invariant("ε that is not the recipe's, or ratios that are taken against the policy itself")
def clipping_acts_off_policy(run: Witness, oracle: Oracle) -> None:
    """On used completions, at a large rate, tokens are clipped at 1 ± ε, and not all of them."""
    (row,) = run.rows
    last = run.steps[-1]
    right = oracle.step(run, last).logged["clip_ratio/region_mean"]
    _require(0.1 < right < 0.99, f"step {last.number}: {right:.0%} would be clipped: no control")
    # One row for both steps; in the first nothing is clipped.
    _equal("clipping: clip_ratio/region_mean", row["clip_ratio/region_mean"], right / 2, 1e-5, 1e-4)
    off = distance(last.gradient, oracle.step(run, last).gradient)
    if not off <= GRADIENT_TOLERANCE:
        raise BrokenInvariantError(
            f"step {last.number}: the clipped gradient is {off:.2g} of its length away from the "
            f"oracle's at epsilon = {run.recipe.epsilon}{oracle.suspect(run, last)}"
        )


@invariant("weight decay, a KL term or an entropy bonus that was not asked for")
def constant_reward_changes_nothing(run: Witness) -> None:
    """Where every completion has the same reward, the weights stay as they are, to the bit."""
    for name, before in run.steps[0].weights.items():
        off = int((run.after[name] != before).sum())
        _require(off == 0, f"{off} of {before.numel()} elements of {name} changed")
    for row in run.rows:
        share = row["frac_reward_zero_std"]
        _require(share == 1, f"step {row['step']}: frac_reward_zero_std is {share}, not 1")


@invariant("rewards that are clipped, shifted or taken by size on the way")
def negated_reward_negates_the_gradient(run: Witness, other: Witness) -> None:
    """The reward the other way round turns the first gradient round and does nothing else."""
    _same_completions(run, other)
    turned = {name: -values for name, values in other.steps[0].gradient.items()}
    off = distance(run.steps[0].gradient, turned)
    _require(off <= GRADIENT_TOLERANCE, f"step 1: {off:.2g} of its length from the turned gradient")


@invariant("a normaliser that is a micro-batch's instead of the step's (trl#6024, trl#5619)")
def accumulation_changes_nothing(run: Witness, other: Witness) -> None:
    """Four groups in four parts have the gradient that they have in one."""
    _require(
        len(run.steps[0].parts) == 4 and len(other.steps[0].parts) == 1,
        f"step 1 was made in {len(run.steps[0].parts)} and {len(other.steps[0].parts)} parts",
    )
    _same_completions(run, other)
    off = distance(run.steps[0].gradient, other.steps[0].gradient)
    parts = sum(part.loss for part in run.steps[0].parts)
    _require(
        off <= GRADIENT_TOLERANCE,
        f"step 1: with accumulation the gradient is {off:.2g} of its length away",
    )
    _equal("step 1: the loss with accumulation", parts, other.steps[0].parts[0].loss)


@invariant("random numbers from somewhere that the seed does not reach")
def the_same_seed_gives_the_same_rows(run: Witness, other: Witness) -> None:
    """A run and its repetition log the same figures, to the bit, but for the time they took."""
    for row, again in zip(run.rows, other.rows, strict=True):
        for key in row.keys() | again.keys():
            if key != "step_time":
                one, two = row.get(key), again.get(key)
                _require(one == two, f"step {row['step']}: {key} is {one}, then {two}")


@invariant("weights in half precision: steps of such rates are rounded away")
def weights_move(run: Witness) -> None:
    """At least half the elements of every trainable tensor have changed."""
    for name, before in run.steps[0].weights.items():
        share = float((run.after[name] != before).float().mean())
        _require(share >= 0.5, f"only {share:.1%} of the elements of {name} changed")


@invariant("another optimizer, learning rate or decay than the recipe's")
def the_first_update_is_adams(run: Witness) -> None:
    """The first step moves each weight by the learning rate against its gradient's sign."""
    first = run.steps[0]
    after = run.steps[1].weights if len(run.steps) > 1 else run.after
    rate = run.recipe.learning_rate
    for name, before in first.weights.items():
        g = first.gradient[name].double()
        # Both of Adam's moments are corrected for their start: what is left is g / |g|.
        right = before.double() - rate * g / (g.abs() + 1e-8)
        off = float((after[name].double() - right).abs().max())
        _require(
            off <= 1e-3 * rate + 1e-6, f"step 1: an element of {name} is {off:.2g} off, of {rate:g}"
        )


@invariant("logging_nan_inf_filter, or a nan_to_num in the loss (trl#6702)")
def a_nan_is_seen(run: Witness) -> None:
    """A NaN loss is logged as what it is, and ends the run."""
    rows = {int(row["step"]): row for row in run.rows}
    (planted,) = [step for step in run.steps if step.number == len(run.steps)]
    row = rows.get(planted.number)
    _require(row is not None, f"step {planted.number}, with the NaN, is not logged")
    assert row is not None
    _require(
        isinstance(row["loss"], float) and math.isnan(row["loss"]),
        f"step {planted.number}: the loss is NaN and was logged as {row['loss']}: NaN is filtered",
    )
    _require(
        run.error is not None and f"step {planted.number}" in str(run.error),
        f"step {planted.number}: the run went on after a NaN loss (ended by: {run.error})",
    )


def _windows(run: Witness) -> list[Window]:
    return list(dict.fromkeys(step.window for step in run.steps))


def _logged(run: Witness) -> Iterator[tuple[Mapping[str, float], list[Window]]]:
    """Yield each row with the windows that were drawn in the steps that it covers."""
    for row in run.rows:
        yield row, list(dict.fromkeys(step.window for step in run.steps_of(row)))


def _table(run: Witness, window: Window) -> Any:
    """Return TRL's own table of a window's completions, in their order, if there is one."""
    covering = [
        int(row["step"]) for row in run.rows if window in {s.window for s in run.steps_of(row)}
    ]
    return run.tables.get(covering[0]) if covering else None


def _place(window: Window, i: int, g: int) -> str:
    return f"step {window.step + 1}, completion {i} (group {i // g})"


def _gap(run: Witness, oracle: Oracle, step: Step, what: str, seen: float, right: float) -> None:
    if not abs(seen - right) <= 1e-6 + 1e-5 * abs(right):
        raise BrokenInvariantError(
            f"step {step.number}: {what} is {seen:.8g}, and {right:.8g} is right"
            f"{oracle.suspect(run, step)}"
        )


def _same_completions(run: Witness, other: Witness) -> None:
    one, two = run.steps[0].window, other.steps[0].window
    _require(
        one.prompt_ids == two.prompt_ids and one.completion_ids == two.completion_ids,
        f"the first completions are not those of run {other.recipe.name!r}, at the same seed",
    )


def _share(redrawn: Sequence[Sequence[bool]]) -> float:
    return _mean([same for row in redrawn for same in row])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std())


def _scores(window: Window) -> list[float]:
    return [reward for reward in window.rewards if reward is not None]


def _flat(window: Window, g: int, how: Conventions) -> float:
    """Return the share of completions with nothing to tell them apart, as TRL counts it."""
    if how.scale == "batch":
        return float(_spread(_scores(window)) == 0)
    groups = [window.rewards[i : i + g] for i in range(0, len(window.rewards), g)]
    scored = [[reward for reward in group if reward is not None] for group in groups]
    return _mean([len(group) > 1 and max(group) == min(group) for group in scored])
