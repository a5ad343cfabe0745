"""Every figure of a run is compared: one that is changed in what was recorded is named."""

import copy
import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grpo_harness.contract import INVARIANTS, BrokenInvariantError, watch

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("trainers.py"))))

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with all figures in its rows, and its oracle."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "beta": 0.1}
    logged = {"log_completions": True, "num_completions_to_print": 0}
    rewards = [made.reward_digits, made.reward_answer]
    folder = tmp_path_factory.mktemp("recorded")
    run = watch(made.build(folder, rewards=rewards, **settings, **logged))
    run.holds()
    return run._seen


@pytest.fixture
def run(recorded):
    """A copy of the run, to be changed."""
    run, _ = recorded
    steps = [
        dataclasses.replace(step, micro_batches=list(step.micro_batches)) for step in run.steps
    ]
    tables = {number: table.copy() for number, table in run.tables.items()}
    rows = copy.deepcopy(run.rows)
    return dataclasses.replace(run, steps=steps, rows=rows, tables=tables)


@pytest.fixture
def said(recorded):
    """What an invariant says of a run, or of two; None if it holds."""

    def said(invariant, run, *other):
        oracle = [recorded[1]] if invariant in OF_THE_ORACLE else []
        try:
            INVARIANTS[invariant](run, *other, *oracle)
        except BrokenInvariantError as broken:
            return str(broken)
        return None

    return said


OF_THE_ORACLE = (
    *("loss_equals_the_oracles", "gradient_equals_the_oracles", "the_checkpoint_is_whole"),
    *("counts_are_those_of_the_completions", "rewards_are_the_completions"),
    *("advantages_are_group_relative", "figures_of_the_policy_are_the_oracles"),
    *("what_is_drawn_is_scored_and_trained_on", "rollouts_are_the_current_policys"),
    *("log_probabilities_are_the_policys", "the_mask_is_the_completions"),
    *("prompts_are_the_templates", "every_problem_has_its_turn"),
)

OF_THE_ROW = {
    "loss_equals_the_oracles": ["loss"],
    "gradient_equals_the_oracles": ["grad_norm"],
    "rates_logged_are_the_schedules": ["learning_rate"],
    "counts_are_those_of_the_completions": [
        *("num_tokens", "completions/clipped_ratio"),
        *(f"completions/{which}_length" for which in ("mean", "min", "max")),
        *(f"completions/{which}_terminated_length" for which in ("mean", "min", "max")),
    ],
    "rewards_are_the_completions": [
        "reward",
        *(f"rewards/reward_digits/{what}" for what in ("mean", "std")),
        *(f"rewards/reward_answer/{what}" for what in ("mean", "std")),
    ],
    "advantages_are_group_relative": ["reward_std", "frac_reward_zero_std"],
    "figures_of_the_policy_are_the_oracles": [
        *("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean"),
        *("clip_ratio/high_max", "clip_ratio/region_mean"),
    ],
}
"""The invariants that compare the figures of a row."""

FIGURES = [(invariant, key) for invariant, keys in OF_THE_ROW.items() for key in keys]


@pytest.mark.parametrize(("invariant", "key"), FIGURES)
def test_a_figure_of_a_row(invariant, key, run, said):
    assert said(invariant, run) is None
    run.rows[1][key] = run.rows[1][key] * 1.001 + 0.001
    assert key in said(invariant, run) or (key == "loss" and "logged" in said(invariant, run))


def test_every_figure_of_a_row_is_compared(run):
    compared = {key for keys in OF_THE_ROW.values() for key in keys}
    assert run.rows[0].keys() - compared == {"epoch", "step", "step_time"}


def test_a_row(run, said):
    complete = "rows_are_complete_and_finite"
    assert said(complete, run) is None
    run.rows[0]["kl"] = float("nan")
    assert "step 1: kl is nan" in said(complete, run)
    del run.rows[0]["kl"]
    assert "step 1: kl is not logged" in said(complete, run)
    del run.rows[0]
    assert "rows of steps [2] are logged, of 2 steps" in said(complete, run)


def test_a_run_that_ended_early(run, said):
    """Nothing stopped it."""
    del run.steps[1], run.rows[1]
    state, control = SimpleNamespace(global_step=1), SimpleNamespace(should_training_stop=False)
    run.trainer = SimpleNamespace(state=state, control=control)
    assert "steps [1] are logged, of 2 steps" in said("rows_are_complete_and_finite", run)
    assert "made in steps [1], of 2" in said("every_update_is_adamws", run)
    control.should_training_stop = True
    assert said("rows_are_complete_and_finite", run) is None


def changed(values, by=1e-3):
    """A copy with another first element."""
    values = values.clone()
    values.view(-1)[0] += by
    return values


def micro_batch(**change):
    """Change fields of the first micro-batch of step 2."""

    def tamper(run):
        one = run.steps[1].micro_batches[0]
        fields = {name: by(getattr(one, name), one) for name, by in change.items()}
        run.steps[1].micro_batches[0] = dataclasses.replace(one, **fields)

    return tamper


def batch(**change):
    """Change fields of the batch of step 2."""

    def tamper(run):
        one = run.steps[1].batch
        fields = {name: by(getattr(one, name)) for name, by in change.items()}
        run.steps[1].batch = dataclasses.replace(one, **fields)

    return tamper


def call(**change):
    """Change fields of the second reward function's call in step 2."""

    def other(scored):
        fields = {name: by(getattr(scored[1], name)) for name, by in change.items()}
        return {**scored, 1: dataclasses.replace(scored[1], **fields)}

    return batch(scored=other)


def step(**change):
    """Change one element of a weight in fields of step 2."""

    def tamper(run):
        for field, by in change.items():
            tensors = dict(getattr(run.steps[1], field))
            name = next(iter(tensors))
            tensors[name] = changed(tensors[name], by)
            setattr(run.steps[1], field, tensors)

    return tamper


def table(column):
    def tamper(run):
        run.tables[2].loc[3, column] += 0.01

    return tamper


def times(factor, tensors):
    return {name: factor * values for name, values in tensors.items()}


def last(values):
    return (*values[:-1], values[0])


TAMPERED = {
    "advantage used": (
        micro_batch(advantages=lambda a, _: changed(a)),
        *("advantages_are_group_relative", "the advantage used is"),
    ),
    "advantage logged": (
        table("advantage"),
        *("advantages_are_group_relative", "the advantage logged is"),
    ),
    "reward logged": (
        table("reward_answer"),
        *("rewards_are_the_completions", "completion 3 (group 0) is logged with reward"),
    ),
    "reward returned": (
        call(rewards=lambda r: (*r[:-1], 0.25)),
        *("rewards_are_the_completions", "completion 15 (group 3) scored 0.25"),
    ),
    "text scored": (
        call(completions=last),
        *("what_is_drawn_is_scored_and_trained_on", "and scored as"),
    ),
    "ids scored": (call(ids=last), "what_is_drawn_is_scored_and_trained_on", "and scored as"),
    "prompt scored": (
        call(prompts=last),
        *("what_is_drawn_is_scored_and_trained_on", "was scored with the prompt"),
    ),
    "prompt drawn for": (
        batch(prompt_ids=last),
        *("what_is_drawn_is_scored_and_trained_on", "was drawn for another prompt's tokens"),
    ),
    "row left out": (
        micro_batch(rows=lambda rows, _: rows[1:]),
        *("what_is_drawn_is_scored_and_trained_on", "among the 15 that the loss was given"),
    ),
    "row used twice": (
        micro_batch(rows=lambda rows, _: (*rows, rows[0])),
        *("what_is_drawn_is_scored_and_trained_on", "among the 17 that the loss was given"),
    ),
    "mask": (
        micro_batch(mask=lambda mask, _: 1 - mask),
        *("the_mask_is_the_completions", "has mask 0, and 1 is right"),
    ),
    "log-probability": (
        micro_batch(log_probabilities=lambda values, _: changed(values)),
        *("log_probabilities_are_the_policys", "token 0: log-probability"),
    ),
    "old log-probability": (
        micro_batch(old=lambda _, one: changed(one.log_probabilities, 1e-5)),
        *("on_policy_the_ratio_is_one", "step 2: ρ is up to"),
    ),
    "random state": (
        batch(random_state=lambda state: torch.manual_seed(1).get_state()),
        *("rollouts_are_the_current_policys", "step 2: the current weights draw only"),
    ),
    "gradient": (step(gradient=0.1), "gradient_equals_the_oracles", "step 2: the gradient is"),
    "gradient by a thousandth": (
        lambda run: setattr(run.steps[1], "gradient", times(1.001, run.steps[1].gradient)),
        *("gradient_equals_the_oracles", "step 2: the gradient is 0.001 of its length away"),
    ),
    "tokens of one completion": (
        batch(completion_ids=lambda ids: (tuple(t + 1 for t in ids[0]), *ids[1:])),
        *("rollouts_are_the_current_policys", "step 2: the current weights draw only 9"),
    ),
    "a token less": (
        batch(completion_ids=lambda ids: (*ids[:-1], (5,))),
        *("counts_are_those_of_the_completions", "has 1 tokens, none of which is an end token"),
    ),
    "problems of the step before": (
        lambda run: batch(scored=lambda _: run.steps[0].batch.scored)(run),
        *("every_problem_has_its_turn", "again, and others of the 36 have not had their turn"),
    ),
    "gradient taken": (step(taken=1e-3), "gradients_are_clipped_as_asked", "step 2: "),
    "gradient of an update": (step(taken=1.0), "every_update_is_adamws", "step 2: 1 of"),
    "weights after": (step(after=1e-6), "only_updates_move_the_weights", "after step 2: 1 of"),
    "weights before": (step(weights=1e-6), "only_updates_move_the_weights", "after step 1: 1 of"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_recorded(what, run, said):
    tamper, invariant, says = TAMPERED[what]
    assert said(invariant, run) is None
    tamper(run)
    assert says in said(invariant, run)


def test_a_group_of_two_prompts(run, said):
    """The group's prompt is known by its first completion."""
    one = run.steps[1].batch
    other = {n: dataclasses.replace(s, prompts=last(s.prompts)) for n, s in one.scored.items()}
    changed = {"scored": other, "prompt_ids": last(one.prompt_ids)}
    run.steps[1].batch = dataclasses.replace(one, **changed)
    invariant = "what_is_drawn_is_scored_and_trained_on"
    assert "has another prompt than the first of its group" in said(invariant, run)


def test_random_numbers_of_an_earlier_step(run, said):
    invariant = "every_draw_has_its_own_random_numbers"
    assert said(invariant, run) is None
    batch(random_state=lambda _: run.steps[0].batch.random_state)(run)
    assert "step 2 draws from the random numbers of step 1" in said(invariant, run)


@pytest.mark.parametrize("what", ["weights before it", "gradients", "weights after it"])
def test_a_process_of_its_own(what, run, said):
    right = {"weights before it": "a", "gradients": "b", "weights after it": "c"}
    for one in run.steps:
        one.digests = [right, right]
    assert said("every_process_has_the_same_weights", run) is None
    run.steps[1].digests = [right, right | {what: "d"}]
    says = f"step 2: the {what} of processes 0 and 1 differ"
    assert says in said("every_process_has_the_same_weights", run)


@pytest.fixture
def saved(run, tmp_path):
    """The folder of a copy of what was saved."""
    run.saved = Path(shutil.copytree(run.saved, tmp_path / "saved"))
    return run.saved


def test_what_is_saved(run, saved, said):
    invariant, file = "what_is_saved_is_what_was_trained", saved / "model.safetensors"
    assert said(invariant, run) is None
    tensors = load_file(file)
    name = next(iter(run.after))
    for values, says in (
        (changed(tensors[name], 1e-6), f"elements of {name} differ"),
        # Of the same values: only the precision differs.
        (tensors[name].double(), f"{name} is saved as torch.float64"),
    ):
        save_file({**tensors, name: values}, file, {"format": "pt"})
        assert says in said(invariant, run)
    save_file({n: v for n, v in tensors.items() if n != name}, file, {"format": "pt"})
    assert f"not saved: {name}" in said(invariant, run)


def test_what_is_saved_beside_the_weights(run, saved, said):
    invariant = "the_checkpoint_is_whole"
    assert said(invariant, run) is None
    settings = saved / "generation_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"eos_token_id": 7}))
    assert "its set of end tokens is" in said(invariant, run)
    settings.unlink()
    assert "there is no generation_config.json" in said(invariant, run)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token = "7"
    tokenizer.save_pretrained(saved)
    assert "its pad token is '7'" in said(invariant, run)


RESUMED = {
    "weights before": (step(weights=1e-6), "starts from other weights"),
    "random state": (batch(random_state=lambda state: 1 - state), "draws other random numbers"),
    "gradient": (step(gradient=1e-6), "has another gradient"),
    "weights after": (step(after=1e-6), "makes another update of the same gradient"),
    "prompts": (
        batch(
            scored=lambda scored: {
                n: dataclasses.replace(one, prompts=last(one.prompts)) for n, one in scored.items()
            }
        ),
        "asks other problems",
    ),
    "end": (
        lambda run: setattr(run, "after", {n: w + 1e-6 for n, w in run.after.items()}),
        "the end has other weights",
    ),
    "row": (lambda run: run.rows[1].update(entropy=1.0), "step 2: entropy is 1.0, then"),
}


@pytest.mark.parametrize("what", RESUMED)
def test_a_resumed_run(what, run, recorded, said):
    whole, invariant = recorded[0], "resumed_equals_uninterrupted"
    tamper, says = RESUMED[what]
    assert "not resumed" in said(invariant, run, whole)
    tamper(run)
    del run.steps[0]
    assert says in said(invariant, run, whole)


def test_a_run_that_resumed_rightly(run, recorded, said):
    del run.steps[0]
    assert said("resumed_equals_uninterrupted", run, recorded[0]) is None


def test_accumulation(run, recorded, said):
    invariant, (whole, _) = "accumulation_changes_nothing", recorded
    (first, *others) = run.steps[0].micro_batches
    total = first.loss + sum(one.loss for one in others)
    run.steps[0].micro_batches = [dataclasses.replace(first, loss=total)]
    assert said(invariant, whole, run) is None
    run.steps[0].gradient = times(1.001, run.steps[0].gradient)
    assert "with accumulation the gradient is 0.001 of its length" in said(invariant, whole, run)
    run.steps[0].gradient = whole.steps[0].gradient
    run.steps[0].micro_batches = [dataclasses.replace(first, loss=total + 1e-3)]
    assert "the loss with accumulation is" in said(invariant, whole, run)


def test_negation(run, recorded, said):
    invariant, (whole, _) = "negated_reward_negates_the_gradient", recorded
    run.steps[0].gradient = times(-1, run.steps[0].gradient)
    assert said(invariant, whole, run) is None
    run.steps[0].gradient = times(1.001, run.steps[0].gradient)
    assert "step 1: 0.001 of its length from the turned gradient" in said(invariant, whole, run)
