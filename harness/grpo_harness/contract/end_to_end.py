"""Invariants of whole runs, and of pairs of runs."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from grpo_harness.contract.invariant import GRADIENT_TOLERANCE, distance, equal, invariant, require
from grpo_harness.contract.oracle import Oracle
from grpo_harness.contract.rollouts import asked_prompts, batches, prompts_of
from grpo_harness.contract.trace import Batch, Tensors, Trace, identity
from grpo_harness.gate.inputs import brief
from grpo_harness.policy import TRAINED_ON, load


@invariant("weight decay, a KL term or an entropy bonus that was not asked for")
def constant_reward_changes_nothing(run: Trace) -> None:
    """If every completion has the same reward, the weights do not change, to the bit."""
    for name, before in run.steps[0].weights.items():
        off = int((run.after[name] != before).sum())
        require(off == 0, f"{off} of {before.numel()} elements of {name} changed")
    for row in run.rows:
        share = row["frac_reward_zero_std"]
        require(share == 1, f"step {row['step']}: frac_reward_zero_std is {share}, not 1")


@invariant("rewards that are clipped, shifted or taken by size on the way")
def negated_reward_negates_the_gradient(run: Trace, other: Trace) -> None:
    """Negating the reward negates the first gradient and changes nothing else."""
    _same_completions(run, other)
    turned = {name: -values for name, values in other.steps[0].gradient.items()}
    off = distance(run.steps[0].gradient, turned)
    require(off <= GRADIENT_TOLERANCE, f"step 1: {off:.2g} of its length from the turned gradient")


@invariant("a normaliser that is a micro-batch's instead of the step's (trl#6024, trl#5619)")
def accumulation_changes_nothing(run: Trace, other: Trace) -> None:
    """The groups of a step have the same gradient in several micro-batches as in one."""
    made, at_once = (len(one.steps[0].micro_batches) for one in (run, other))
    require(made > at_once == 1, f"step 1 was made in {made} and {at_once} micro-batches")
    _same_completions(run, other)
    off = distance(run.steps[0].gradient, other.steps[0].gradient)
    summed = sum(micro_batch.loss for micro_batch in run.steps[0].micro_batches)
    require(
        off <= GRADIENT_TOLERANCE,
        f"step 1: with accumulation the gradient is {off:.2g} of its length away",
    )
    equal("step 1: the loss with accumulation", summed, other.steps[0].micro_batches[0].loss)


@invariant("random numbers from somewhere that the seed does not reach")
def the_same_seed_gives_the_same_rows(run: Trace, other: Trace) -> None:
    """A run and its repetition log the same figures, to the bit, except for times."""
    _same_rows(run, other)


@invariant("a seed that is set anew before every step, or the same one in every process")
def every_draw_has_its_own_random_numbers(run: Trace) -> None:
    """No two batches of completions are drawn from the same state of the random numbers."""
    drawn = [
        (f"step {batch.step + 1}" + (f" in process {n}" if batch.processes else ""), draw)
        for batch in batches(run)
        for n, draw in enumerate(batch.draws)
    ]
    for n, (place, draw) in enumerate(drawn):
        for earlier, before in drawn[:n]:
            same = _same_state(draw, before)
            require(not same, f"{place} draws from the random numbers of {earlier}")


@invariant("a seed that reaches only some of what is drawn")
def another_seed_gives_another_run(run: Trace, other: Trace) -> None:
    """Another seed asks other problems first, and draws with other random numbers."""
    seeds = f"with seed {run.config.seed} and with {other.config.seed}"
    g = run.config.num_generations
    one, two = (seen.steps[0].batch.prompts[::g] for seen in (run, other))
    require(one != two, f"step 1 asks the same problems in the same order {seeds}")
    for batch in batches(run):
        for then in batches(other):
            require(
                not _same_state(batch, then),
                f"step {batch.step + 1} draws from the random numbers of step {then.step + 1} of "
                f"the other run, {seeds}",
            )
    require(run.rows[0]["loss"] != other.rows[0]["loss"], f"step 1 has the same loss {seeds}")


@invariant("a sampler that repeats or skips, or does not shuffle")
def every_problem_has_its_turn(run: Trace, oracle: Oracle) -> None:
    """Every round asks each problem of the recipe once, in another order than before."""
    g = run.config.num_generations
    problems: list[Any]
    asked: list[list[Any]]
    if run.recipe is None:
        problems = [identity(prompt) for prompt in prompts_of(run)]
        asked = [[identity(prompt) for prompt in batch.prompts[::g]] for batch in batches(run)]
    else:
        problems = list(asked_prompts(run, oracle))
        asked = [list(batch.prompt_ids[::g]) for batch in batches(run)]
    # All steps ask the same number of problems, so the rest of a round is not asked.
    a_round = len(problems) // len(asked[0])
    known, rounds = Counter(problems), [list[Any]()]
    for n, batch in enumerate(batches(run)):
        if n and n % a_round == 0:
            rounds.append([])
        rounds[-1] += asked[n]
        for problem, times in Counter(rounds[-1]).items():
            place = f"step {batch.step + 1} asks"
            require(problem in known, f"{place} a problem that the recipe does not have")
            require(
                times <= known[problem],
                f"{place} problem {problems.index(problem)} again, and others of the "
                f"{len(problems)} have not had their turn",
            )
    orders = [problems, *rounds] if run.config.shuffle_dataset else []
    for n, order in enumerate(orders[1:], 1):
        # A few problems have the same order twice by chance.
        if math.perm(len(known), min(len(order), len(known))) < 10_000:
            continue
        for m, earlier in enumerate(orders[:n]):
            other = f"round {m}" if m else "the recipe"
            same = order == earlier[: len(order)]
            require(not same, f"round {n} has the order of {other}: the problems are not shuffled")


@invariant("a resume that loses the optimizer, the schedule or the random state (trl#3148, #3247)")
def resumed_equals_uninterrupted(run: Trace, other: Trace) -> None:
    """A run resumed from a checkpoint equals one without interruption, to the bit."""
    made = [step.number for step in run.steps]
    require(
        0 < len(made) < len(other.steps) and made[-1] == len(other.steps),
        f"after the interruption steps {made} were made, of {len(other.steps)}: not resumed",
    )
    for step, right in zip(run.steps, other.steps[-len(made) :], strict=True):
        place = f"step {step.number}, which is made after the interruption,"
        _same_weights(f"{place} starts from other weights", step.weights, right.weights)
        same = step.batch.prompts == right.batch.prompts
        require(same, f"{place} asks other problems: the sampler's place is lost")
        require(
            _same_state(step.batch, right.batch),
            f"{place} draws other random numbers: their state is lost",
        )
        _same_weights(f"{place} has another gradient", step.gradient, right.gradient)
        lost = "makes another update of the same gradient: the optimizer's state or rate is lost"
        _same_weights(f"{place} {lost}", step.after, right.after)
    _same_weights("the end has other weights", run.after, other.after)
    _same_rows(run, other)


@invariant("a tokenizer, template or generation config that is not saved, or another one")
def the_checkpoint_is_whole(run: Trace, oracle: Oracle) -> None:
    """The saved tokenizer, template and end tokens are the base's; the problems are listed."""
    require(run.saved is not None, f"the run left no checkpoint: {run.error}")
    assert run.saved is not None
    if run.recipe is None:
        _is_whole(run.saved, oracle)
        return
    assert run.run is not None
    assert oracle.policy is not None
    saved, base = load(str(run.run.path)), oracle.policy
    for what, seen, right in (
        ("tokenizer", saved.fingerprint.tokenizer, base.fingerprint.tokenizer),
        ("chat template", saved.fingerprint.chat_template, base.fingerprint.chat_template),
        ("set of end tokens", saved.eos_token_ids, base.eos_token_ids),
        ("pad token", saved.tokenizer.pad_token_id, base.tokenizer.pad_token_id),
    ):
        require(seen == right, f"its {what} is {seen}, and the base has {right}")
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        require((run.run.path / name).is_file(), f"there is no {name} in {run.run.path}")
    path, problems = run.run.path / TRAINED_ON, run.recipe.problems()
    listed = path.read_text(encoding="utf-8").split() if path.is_file() else []
    require(
        listed == [problem.id for problem in problems],
        f"{TRAINED_ON} lists {len(listed)} problems, and not the {len(problems)} of the recipe",
    )


def _is_whole(folder: Path, oracle: Oracle) -> None:
    base, saved = oracle.tokenizer, AutoTokenizer.from_pretrained(folder)
    for what, seen, right in (
        ("vocabulary", saved.get_vocab(), base.get_vocab()),
        ("chat template", saved.chat_template, base.chat_template),
        ("end token", saved.eos_token, base.eos_token),
        ("pad token", saved.pad_token, base.pad_token),
    ):
        require(
            seen == right, f"its {what} is {brief(seen)}, and that of the trainer {brief(right)}"
        )
    if not (folder / "adapter_config.json").is_file():
        for name in ("generation_config.json", "config.json"):
            require((folder / name).is_file(), f"there is no {name} in what is saved")
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
        ends = {saved.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
        require(ends == oracle.ends, f"its set of end tokens is {ends}, and not {set(oracle.ends)}")


@invariant("weights in half precision: steps of such rates are rounded away")
def weights_move(run: Trace) -> None:
    """At least half the elements of every trainable tensor have changed."""
    for name, before in run.steps[0].weights.items():
        share = float((run.after[name] != before).float().mean())
        require(share >= 0.5, f"only {share:.1%} of the elements of {name} changed")


@invariant("logging_nan_inf_filter, or a nan_to_num in the loss (trl#6702)")
def a_nan_is_seen(run: Trace) -> None:
    """A NaN loss is logged as NaN, and ends a recipe's run."""
    assert run.nan_at is not None
    rows = {int(row["step"]): row for row in run.rows}
    row = rows.get(run.nan_at)
    require(row is not None, f"step {run.nan_at}, with the NaN, is not logged")
    assert row is not None
    require(
        isinstance(row["loss"], float) and math.isnan(row["loss"]),
        f"step {run.nan_at}: the loss is NaN and was logged as {row['loss']}: NaN is filtered",
    )
    require(
        run.recipe is None or (run.error is not None and f"step {run.nan_at}" in str(run.error)),
        f"step {run.nan_at}: the run went on after a NaN loss (ended by: {run.error})",
    )


def _same_rows(run: Trace, other: Trace) -> None:
    one, two = ([row["step"] for row in seen.rows] for seen in (run, other))
    require(one == two, f"rows of steps {one} are logged, then of {two}")
    for row, again in zip(run.rows, other.rows, strict=True):
        for key in sorted(row.keys() | again.keys()):
            if key != "step_time":
                a, b = row.get(key), again.get(key)
                require(a == b, f"step {row['step']}: {key} is {a}, then {b}")


def _same_weights(otherwise: str, seen: Tensors, right: Tensors) -> None:
    for name, values in right.items():
        require(torch.equal(seen[name], values), f"{otherwise} (in {name})")


def _same_state(batch: Batch, other: Batch) -> bool:
    """Tell whether two batches are drawn from the same state, in every process."""
    return all(
        one.random_state is not None
        and two.random_state is not None
        and torch.equal(one.random_state, two.random_state)
        for one, two in zip(batch.draws, other.draws, strict=True)
    )


def _same_completions(run: Trace, other: Trace) -> None:
    one, two = run.steps[0].batch, other.steps[0].batch
    require(
        one.prompt_ids == two.prompt_ids and one.completion_ids == two.completion_ids,
        f"the first completions are not those of run {other.name!r}, at the same seed",
    )
