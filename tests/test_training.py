"""A run leaves a whole policy or nothing, and goes on where it was interrupted."""

import csv
import hashlib
import json
import math
import pickle
import resource
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_harness.engines.weights import load_weights
from grpo_harness.policy import load
from grpo_harness.policy.checkpoint import PolicyError
from grpo_harness.rewards.rule import reward_func
from grpo_harness.training import TrainingError, train
from grpo_harness.training import load as load_recipe
from grpo_harness.training.resources import read_resources
from grpo_harness.training.trainer import save_every
from grpo_harness.training.unfinished import UnfinishedError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A policy this small is slower on two, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short(tiny):
    """Seven steps over three to the epoch, so that the second epoch and the third are reached."""
    return load_recipe("smoke").with_values(
        model_name_or_path=str(tiny),
        n_math=4,
        n_prog=8,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=8,
        max_steps=7,
        save_steps=2,
    )


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    return train(short, tmp_path_factory.mktemp("training") / "trained", device="cpu")


@pytest.fixture
def one_step(short):
    return short.with_values(max_steps=1)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
    }


def figures(log):
    return [{name: row[name] for name in row if name != "step_time"} for row in log]


def stop_at(step):
    """Stand in for Ctrl-C: Python raises this wherever the run happens to be."""

    def progress(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return progress


def interrupt(recipe, out, step):
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(recipe, out, device="cpu", progress=stop_at(step))
    return getattr(stopped.value, "__notes__", [])


@pytest.fixture(scope="module")
def stopped(short, tmp_path_factory):
    """What a run leaves that was interrupted in its last step: checkpoints of step 4 and 6."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    (note,) = interrupt(short, out, 7)
    assert "checkpoint-6 is kept" in note
    (folder,) = out.parent.iterdir()
    return folder


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of it, beside what shall become ``out``."""
    return Path(shutil.copytree(stopped, tmp_path / "out.unfinished"))


def test_every_step_is_logged_and_finite(run):
    assert [row["step"] for row in run.log] == list(range(1, 8))
    for row in run.log:
        for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
            assert math.isfinite(row[name]), name


def test_weights_move(run):
    assert run.weights_moved >= 0.5


def test_checkpoint_reloads_to_the_same_logits(run, tiny_policy):
    policy = load(str(run.path))
    model = load_weights(policy, torch.device("cpu"), torch.float32)
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, run.model(ids).logits)
    assert policy.eos_token_ids == tiny_policy.eos_token_ids
    assert policy.fingerprint.tokenizer == tiny_policy.fingerprint.tokenizer
    assert policy.fingerprint.weights != tiny_policy.fingerprint.weights
    assert str(policy.fingerprint) == run.fingerprint


def test_folder_is_complete(run, tiny_policy):
    record = json.loads((run.path / "recipe.json").read_text())
    assert record["recipe"]["file"]["num_generations"] == 4
    assert record["config"]["loss_type"] == "dapo"
    assert "trl" in record["versions"]
    assert record["base"]["fingerprint"] == str(tiny_policy.fingerprint)
    assert record["fingerprint"] == run.fingerprint
    with (run.path / "curves.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(n) for n in range(1, 8)]
    assert len(json.loads((run.path / "log.json").read_text())) == 7
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_resources(run.path) == run.resources
    assert len((run.path / "problems.txt").read_text().split()) == 12
    assert [path.name for path in run.path.parent.iterdir()] == ["trained"]
    assert not [path for path in run.path.iterdir() if path.suffix in {".bin", ".pt", ".pth"}]


def test_same_seed_same_run_and_base_unchanged(run, short, tiny, tmp_path):
    before = digests(tiny)
    seen = []
    again = train(short, tmp_path / "again", device="cpu", progress=seen.append)
    assert digests(tiny) == before
    assert figures(again.log) == figures(run.log)
    assert seen == list(again.log)
    assert again.fingerprint == run.fingerprint


def test_existing_out_is_refused(short, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        train(short, tmp_path, device="cpu")


def test_prompt_too_long_is_an_error(short, tmp_path):
    recipe = short.with_values(max_prompt_length=25)
    with pytest.raises(ValueError, match="max_prompt_length is 25"):
        train(recipe, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_policy_that_is_cut_short_is_an_error(short, copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe = short.with_values(model_name_or_path=str(copy))
    with pytest.raises(PolicyError, match="cut short"):
        train(recipe, tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "lack the tensor model.norm.weight"),
        (lambda weights: weights["model.norm.weight"].fill_(math.nan), "holds NaN or infinity"),
    ],
)
def test_weights_that_are_not_whole_are_never_trained(damage, said, short, copy, tmp_path):
    """TRL would train random numbers in place of what is missing, after a warning."""
    weights = load_file(copy / "model.safetensors")
    damage(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(PolicyError, match=said):
        train(short.with_values(model_name_or_path=str(copy)), tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def broken(prompts, completions, **kwargs):
    raise RuntimeError("no such answer")


def not_a_number(prompts, completions, **kwargs):
    return [0.0] * (len(completions) - 1) + [math.nan]


def none(prompts, completions, **kwargs):
    return [None] * len(completions)


def one_too_few(prompts, completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def no_list(prompts, completions, **kwargs):
    return 1.0


def text(prompts, completions, **kwargs):
    return ["1.0"] * len(completions)


def beyond_floats(prompts, completions, **kwargs):
    return [10**400] * len(completions)


def beyond_float32(prompts, completions, **kwargs):
    return [1e30] * len(completions)


def commanding(prompts, completions, **kwargs):
    raise ValueError("\x1b[31m\u202e\n::error::")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (broken, "the reward broken raised RuntimeError: no such answer"),
        (not_a_number, "the reward not_a_number returned nan for the completion '"),
        (none, "the reward none scored none of 16 completions"),
        (one_too_few, "the reward one_too_few returned 15 numbers for 16 completions"),
        (no_list, "the reward no_list returned float"),
        (text, "the reward text returned '1.0' for the completion '"),
        (beyond_floats, "the reward beyond_floats returned 1000000000"),
        (beyond_float32, "the reward beyond_float32 returned 1e+30 for the completion '"),
        (commanding, r"the reward commanding raised ValueError: \x1b[31m\u202e :\u003aerror"),
    ],
)
def test_reward_that_fails_ends_the_run_and_leaves_nothing(reward, message, one_step, tmp_path):
    with pytest.raises(TrainingError) as failed:
        train(one_step, tmp_path / "out", device="cpu", reward=reward)
    assert str(failed.value).startswith(f"step 1: {message}")
    assert "\n" not in str(failed.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reward", [7, "reward_func"])
def test_reward_that_is_no_function_is_an_error(reward, one_step, tmp_path):
    with pytest.raises(ValueError, match=f"the reward is {reward!r}, not a function"):
        train(one_step, tmp_path / "out", device="cpu", reward=reward)
    assert not list(tmp_path.iterdir())


def test_greatest_reward_is_still_trained_on(one_step, tmp_path):
    def huge(prompts, completions, **kwargs):
        return [1e18 * (-1) ** n for n in range(len(completions))]

    recipe = one_step.with_values(scale_rewards="group")
    (row,) = train(recipe, tmp_path / "out", device="cpu", reward=huge).log
    assert math.isfinite(row["reward_std"])
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "abacus"}, r"recipe 'smoke': report_to cannot be used .*abacus"),
        ({"optim": "adamw_bnb_8bit"}, r"recipe 'smoke': optim cannot be used"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, r"recipe 'smoke': lr_scheduler_type and .*'foo'"),
        ({"use_vllm": True}, "recipe 'smoke': use_vllm needs a package"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"reward_model_name_or_path": "./none"}, "reward_model_name_or_path './none' is not"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_loaded(
    changes, message, one_step, tmp_path
):
    recipe = one_step.with_values(model_name_or_path="./no-weights-here", **changes)
    with pytest.raises((ValueError, TrainingError), match=message) as refused:
        train(recipe, tmp_path / "out", device="cpu")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_window_of_more_problems_than_there_are_is_an_error(short, tmp_path):
    recipe = short.with_values(steps_per_generation=4)
    with pytest.raises(ValueError, match="has 12 problems and asks 16 at once"):
        train(recipe, tmp_path / "out", device="cpu")


def test_reward_may_leave_a_completion_out_and_what_was_drawn_is_kept(one_step, tmp_path):
    def partly(prompts, completions, **kwargs):
        return [None if n % 5 == 0 else float(n) for n in range(len(completions))]

    recipe = one_step.with_values(log_completions=True, num_completions_to_print=0)
    run = train(recipe, tmp_path / "out", device="cpu", reward=partly)
    assert run.log[0]["reward"] == pytest.approx(sum(n for n in range(16) if n % 5) / 12)
    (table,) = (run.path / "completions").iterdir()
    assert len(pd.read_parquet(table)) == 16


def test_step_that_diverges_ends_the_run(short, tmp_path):
    recipe = short.with_values(learning_rate=1e30, lr_scheduler_type="constant")
    with pytest.raises(TrainingError, match=r"step \d: .*: lower the learning rate$"):
        train(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "left"), [(1, []), (4, ["out.unfinished"])])
def test_weights_that_are_no_numbers_are_never_kept(steps, left, short, tmp_path, monkeypatch):
    """The last update of a run, and the one before a checkpoint, are seen in no figure yet."""
    made = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        result = made(self, *arguments, **options)
        weights = self.param_groups[0]["params"]
        if (step_number := self.state[weights[0]]["step"]) == steps:
            weights[0].data.flatten()[int(step_number)] = math.inf
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    recipe = short.with_values(max_steps=1 if steps == 1 else 7)
    with pytest.raises(TrainingError, match=rf"step {steps}: .* is not finite after its update"):
        train(recipe, tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == left
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-2"][: len(left)]


@pytest.mark.parametrize("kept", [6, 4])
def test_resumed_equals_uninterrupted(kept, run, short, unfinished, tmp_path):
    said, seen = [], []
    if kept == 4:
        optimizer = unfinished / "checkpoint-6" / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
    again = train(short, tmp_path / "out", device="cpu", progress=seen.append, notice=said.append)
    left_out = "checkpoint-6 is left out: optimizer.pt is not what was written"
    assert [left_out in line for line in said] == [True, False][kept == 6 :]
    assert said[-1] == f"going on from {unfinished / f'checkpoint-{kept}'}"
    assert [row["step"] for row in seen] == list(range(kept + 1, 8))
    assert figures(again.log) == figures(run.log)
    assert digests(again.path)["model.safetensors"] == digests(run.path)["model.safetensors"]
    assert again.weights_moved == run.weights_moved
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resumed_equals_uninterrupted_where_completions_are_used_again(short, tmp_path):
    recipe = short.with_values(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_steps=1,
        max_steps=5,
        num_iterations=2,
    )
    whole = train(recipe, tmp_path / "whole", device="cpu")
    (note,) = interrupt(recipe, tmp_path / "out", 4)
    assert "checkpoint-2 is kept" in note  # and not 3, in the middle of a window
    again = train(recipe, tmp_path / "out", device="cpu")
    assert figures(again.log) == figures(whole.log)
    assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("save_steps", "parts", "config", "every"),
    [
        (10, 1, {}, 10),
        (0, 1, {}, 0),
        (10, 2, {"num_iterations": 4}, 12),
        (1, 4, {"steps_per_generation": 6}, 3),
        (5, 4, {"steps_per_generation": 4, "num_iterations": 2}, 6),
        (1, 4, {"steps_per_generation": 2}, 1),
    ],
)
def test_checkpoints_are_made_where_a_generation_window_ends(
    save_steps, parts, config, every, tmp_path
):
    recipe = load_recipe("smoke").with_values(
        num_generations=2, gradient_accumulation_steps=parts, **config
    )
    assert save_every(recipe.config(tmp_path, device="cpu"), save_steps) == every


def test_another_run_does_not_go_on_from_it(short, unfinished, tmp_path, monkeypatch):
    other = short.with_values(learning_rate=1e-4)
    with pytest.raises(UnfinishedError, match=r"config\.learning_rate was 0\.0002, and is 0\.0001"):
        train(other, tmp_path / "out", device="cpu")
    with pytest.raises(UnfinishedError, match=r"policy\.\w+ was"):
        train(short.with_values(model_name_or_path="nano-base"), tmp_path / "out", device="cpu")
    with pytest.raises(UnfinishedError, match="prompts was"):
        train(short.with_values(problem_seed=9), tmp_path / "out", device="cpu")
    with pytest.raises(UnfinishedError, match="reward was"):
        train(short, tmp_path / "out", device="cpu", reward=none)
    monkeypatch.setattr("grpo_harness.training.run.version", lambda name: "9.9")
    with pytest.raises(UnfinishedError, match=r"versions\.\w+ was"):
        train(short, tmp_path / "out", device="cpu")
    assert len(list(unfinished.glob("checkpoint-*"))) == 2


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_is_never_run(name, short, unfinished, tmp_path):
    checkpoint = unfinished / "checkpoint-6"
    torch.save({"state": Bomb(tmp_path / "ran")}, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = digests(checkpoint)[name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=f"{checkpoint} cannot be read") as failed:
        train(short, tmp_path / "out", device="cpu")
    assert isinstance(failed.value.__cause__, pickle.UnpicklingError)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("state", ["{", "{}", "[]"])
def test_checkpoint_that_cannot_be_read_is_named(state, run, short, unfinished, tmp_path):
    checkpoint = unfinished / "checkpoint-6"
    (checkpoint / "trainer_state.json").write_text(state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["trainer_state.json"] = digests(checkpoint)["trainer_state.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=f"{checkpoint} cannot be read .*: remove it") as failed:
        train(short, tmp_path / "out", device="cpu")
    assert "\n" not in str(failed.value)
    shutil.rmtree(checkpoint)
    assert train(short, tmp_path / "out", device="cpu").fingerprint == run.fingerprint


def test_out_that_appears_while_training_is_not_written_over(run, short, unfinished, tmp_path):
    def appear(row):
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(FileExistsError, match="out exists already") as failed:
        train(short, tmp_path / "out", device="cpu", progress=appear)
    assert "checkpoint-6 is kept" in failed.value.__notes__[0]
    (tmp_path / "out").rmdir()
    assert train(short, tmp_path / "out", device="cpu").fingerprint == run.fingerprint


@pytest.fixture
def full_disk():
    """Let files grow no further than so many bytes: the system itself then refuses the rest."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# Of the optimizer's state, which is twice as large as the weights, one half fits; then not even
# the weights do.
@pytest.mark.parametrize("room", [1.5, 0.5])
def test_full_disk_at_a_checkpoint_keeps_the_one_before(room, short, full_disk, tiny, tmp_path):
    def fill(row):
        if row["step"] == 3:
            full_disk(int(room * (tiny / "model.safetensors").stat().st_size))

    with pytest.raises(TrainingError, match="step 4: its checkpoint cannot be written") as failed:
        train(short, tmp_path / "out", device="cpu", progress=fill)
    assert "\n" not in str(failed.value)
    assert "checkpoint-2 is kept" in failed.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    checkpoints = (tmp_path / "out.unfinished").glob("checkpoint-*")
    assert [path.name for path in checkpoints] == ["checkpoint-2"]


def test_full_disk_at_the_end_keeps_the_last_checkpoint(
    run, short, full_disk, unfinished, tmp_path
):
    def fill(row):
        if row["step"] == 7:
            full_disk(1000)

    with pytest.raises(TrainingError, match="the result cannot be written") as failed:
        train(short, tmp_path / "out", device="cpu", progress=fill)
    assert "checkpoint-6 is kept" in failed.value.__notes__[0]
    full_disk(resource.RLIM_INFINITY)
    assert train(short, tmp_path / "out", device="cpu").fingerprint == run.fingerprint


def test_reward_that_fails_later_keeps_the_checkpoint_before(run, short, tmp_path):
    mended = False

    def reward(prompts, completions, trainer_state, **kwargs):
        if trainer_state.global_step == 4 and not mended:
            raise ZeroDivisionError("no answer has a length")
        return reward_func(prompts, completions)

    with pytest.raises(TrainingError, match=r"step 5: .* ZeroDivisionError") as failed:
        train(short, tmp_path / "out", device="cpu", reward=reward)
    assert "checkpoint-4 is kept" in failed.value.__notes__[0]
    mended = True
    again = train(short, tmp_path / "out", device="cpu", reward=reward)
    assert again.fingerprint == run.fingerprint
