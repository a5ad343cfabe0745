"""A recipe in a file of TRL's format: what it names is what is trained, and nothing is dropped."""

import json
import os
import random
import re
import shutil
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl.scripts.grpo import make_parser

from grpo_harness.cli import main
from grpo_harness.contract import watch
from grpo_harness.errors import HarnessError
from grpo_harness.policy import PolicyName, find
from grpo_harness.policy import load as load_policy
from grpo_harness.tasks import check_disjoint
from grpo_harness.tasks.dataset import DatasetSource
from grpo_harness.training import train
from grpo_harness.training.files import load
from grpo_harness.training.job import job_of, prompt_of
from grpo_harness.training.order import asked, steps
from grpo_harness.training.reading import assignment
from grpo_harness.training.recorded import differences, record, recorded
from grpo_harness.training.run import build
from tests.projects import run

REWARDS = """
import asyncio
from datasets import Dataset
from trl import GRPOTrainer

CALLS = []
WAITING = []

def accuracy(completions, solution, **columns):
    CALLS.append(sorted(columns))
    return [float(s in c[0]["content"]) for c, s in zip(completions, solution)]

async def short(completions, **_):
    WAITING.append(len(WAITING))
    await asyncio.sleep(0.05)
    return [-len(c[0]["content"]) / 50 for c in completions]

async def slow(completions, **_):
    WAITING.append(-1)
    await asyncio.sleep(0.05)
    return [None] * len(completions)

def odd(solution, **_):
    return [0.5 if int(s) % 2 else None for s in solution]

def raises(**_):
    raise KeyError("oops")

def pictures():
    rows = {"prompt": list("abcd"), "image": ["a.png"] * 4, "solution": ["1"] * 4}
    return Dataset.from_dict(rows)

def _spoken(*parts):
    prompt = [{"role": "user", "content": [{"type": part, part: "a"} for part in parts]}]
    return Dataset.from_list([{"prompt": prompt, "solution": str(i)} for i in range(4)])

def shown():
    return _spoken("text", "image")

def parts():
    return _spoken("text")

class Ours(GRPOTrainer):
    SEEN = []

    def compute_loss(self, *args, **kwargs):
        self.SEEN.append(self.state.global_step)
        return super().compute_loss(*args, **kwargs)

class Unready(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        raise SystemExit("no licence")

class Late(GRPOTrainer):
    def get_train_dataloader(self):
        return {}["loader"]

class Odd(GRPOTrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise ValueError("shapes differ")
        return super().compute_loss(*args, **kwargs)

class Keeps(GRPOTrainer):
    SAVED = []

    def _save_checkpoint(self, *args, **kwargs):
        self.SAVED.append(self.state.global_step)
        return super()._save_checkpoint(*args, **kwargs)

class Steep(GRPOTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + (loss - loss.detach()).abs().sqrt()  # 0, of an infinite slope

class Few(GRPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return range(self.args.per_device_train_batch_size)  # one step an epoch

class Mute(GRPOTrainer):
    def log(self, logs, *args, **kwargs):
        pass
"""


RECIPE = {
    "model_name_or_path": "nano-base",
    "dataset_name": "train.jsonl",
    "reward_funcs": ["team_rewards.accuracy", "team_rewards.short", "team_rewards.odd"],
    "reward_weights": [1.0, 0.2, 0.1],
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "logging_steps": 1,
    "output_dir": "elsewhere",
}


CYCLE = {}
CYCLE["itself"] = CYCLE


def rows(n=24):
    luck = random.Random(0)
    for _ in range(n):
        a, b = luck.randrange(90), luck.randrange(90)
        prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]
        yield {"prompt": prompt, "solution": str(a + b), "category": "sum"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes the recipe with some changes in a project; None leaves a key out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "team_rewards", raising=False)
    (tmp_path / "team_rewards.py").write_text(REWARDS)
    (tmp_path / "pyproject.toml").write_text("[tool.grpo-harness]\n")
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())

    def write(name="ours.yaml", **changes):
        content = {k: v for k, v in {**RECIPE, **changes}.items() if v is not None}
        (tmp_path / name).write_text(yaml.safe_dump(content))
        return tmp_path / name

    return write


def own():
    return sys.modules["team_rewards"]


# ------------------------------------------------------------------ training


def test_what_the_file_names_is_trained(write, tmp_path):
    run = train(load(write()), tmp_path / "out", device="cpu")
    assert own().CALLS[0] == [
        "category", "completion_ids", "log_extra", "log_metric", "prompts", "trainer_state",
    ]  # fmt: skip
    row = run.log[-1]
    parts = [row[f"rewards/{name}/mean"] for name in ("accuracy", "short", "odd")]
    assert all(part == part for part in parts), "a mean of None alone is not logged as NaN"
    assert len(run.log) == 2
    assert run.weights_moved > 0.5
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert kept["recipe"]["file"]["reward_weights"] == [1.0, 0.2, 0.1]
    assert not (tmp_path / "elsewhere").exists()


def test_a_function_may_return_the_data_set(write, tmp_path):
    (tmp_path / "team_data.py").write_text(
        "from datasets import load_dataset\n"
        "def rows():\n    return load_dataset('json', data_files='train.jsonl', split='train')\n"
    )
    path = write(dataset_name="team_data:rows", max_steps=1)
    assert len(train(load(path), tmp_path / "out", device="cpu").log) == 1


def test_the_policy_knows_its_rows_by_what_they_are(write, tmp_path):
    run = train(load(write()), tmp_path / "out", device="cpu")
    trained_on = load_policy(str(run.path)).checkpoint.trained_on()
    source = DatasetSource(name="other", path="train.jsonl", home=tmp_path)
    with pytest.raises(ValueError, match="24 problems of the evaluation were trained on"):
        check_disjoint(trained_on, (problem.id for problem in source.problems(99)))


def test_coroutines_wait_together_and_one_may_score_nothing(write, tmp_path):
    rewards = ["team_rewards.short", "team_rewards.slow"]
    path = write(reward_funcs=rewards, reward_weights=None, max_steps=1)
    run = train(load(path), tmp_path / "out", device="cpu")
    assert own().WAITING == [0, -1], "both had begun before one of them was done"
    assert len(run.log) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of TRL
def test_the_weights_are_loaded_as_the_file_says(write, tmp_path):
    recipe = load(write(dtype="bfloat16", attn_implementation="eager"))
    model = build(recipe, tmp_path / "out", device="cpu").model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_an_adapter_is_trained_and_saved_as_one(write, tmp_path):
    run = train(load(write(use_peft=True, lora_r=4, lora_alpha=8)), tmp_path / "out", device="cpu")
    assert (run.path / "adapter_config.json").is_file()
    assert not (run.path / "model.safetensors").exists()
    policy = load_policy(str(run.path))
    assert str(policy.fingerprint) == run.fingerprint
    base = load_policy("nano-base").fingerprint
    assert policy.fingerprint.weights != base.weights


def test_what_has_moved_is_the_tensor_that_moved_least(write, tmp_path):
    """Of an adapter: B is zero at first, so that the first step can change nothing else."""
    path = write(use_peft=True, lora_r=4, max_steps=1)
    run = train(load(path), tmp_path / "out", device="cpu")
    adapter = load_file(run.path / "adapter_model.safetensors")
    assert all(bool(weight.any()) for name, weight in adapter.items() if "lora_B" in name)
    assert run.weights_moved == 0.0


def test_a_trainer_of_ones_own_is_used(write, tmp_path):
    train(load(write(grpo_harness={"trainer": "team_rewards:Ours"})), tmp_path / "out")
    assert own().Ours.SEEN == [0, 1]


def test_a_checkpoint_follows_each_step_but_the_last(write, tmp_path):
    path = write(grpo_harness={"trainer": "team_rewards:Keeps"}, save_steps=1)
    train(load(path), tmp_path / "out", device="cpu")
    assert own().Keeps.SAVED == [1], "the last is followed by the result"


def test_a_gradient_that_is_no_number_ends_the_run(write, tmp_path):
    """The loss of its step is finite."""
    path = write(grpo_harness={"trainer": "team_rewards:Steep"})
    with pytest.raises(HarnessError, match="step 1: grad_norm is nan, which no step recovers"):
        train(load(path), tmp_path / "out", device="cpu")


def test_generated_problems_and_epochs(write, tmp_path):
    block = {"n_math": 4, "n_prog": 4, "problem_seed": 3, "max_prompt_length": 200}
    path = write(
        dataset_name=None, reward_funcs=None, reward_weights=None, grpo_harness=block,
        max_steps=None, num_train_epochs=1,
    )  # fmt: skip
    run = train(load(path), tmp_path / "out", device="cpu")
    assert len(run.log) == 4  # 8 problems, 2 a step
    assert "rewards/reward_func/mean" in run.log[0]
    short = load(write(dataset_name=None, grpo_harness={**block, "max_prompt_length": 3}))
    with pytest.raises(ValueError, match="max_prompt_length is 3"):
        train(short, tmp_path / "other", device="cpu")


def test_the_same_file_and_seed_give_the_same_weights(write, tmp_path):
    prints = {
        train(load(write()), tmp_path / name, device="cpu").fingerprint for name in ("a", "b")
    }
    assert len(prints) == 1
    other = train(load(write(seed=1)), tmp_path / "c", device="cpu").fingerprint
    assert other not in prints


def test_the_config_is_the_one_that_trl_reads(write):
    """An independent oracle: TRL's own parser on the file as it is."""
    path = write(beta=0.04, loss_type="dr_grpo", temperature=0.7, bf16=False, use_cpu=True)
    warnings.filterwarnings("ignore", "`gradient_checkpointing`", FutureWarning)
    _, theirs, *_ = make_parser().parse_args_and_config(["--config", str(path)])
    ours = load(path).config(path.parent / "out", device="cpu")
    pinned = {"output_dir", "report_to", "logging_nan_inf_filter", "disable_tqdm", "save_strategy",
              "dataloader_pin_memory", "logging_dir", "run_name", "save_total_limit"}  # fmt: skip
    for name, value in theirs.to_dict().items():
        if name not in pinned and "checkpointing" not in name:
            assert ours.to_dict()[name] == value, name


def test_as_many_checkpoints_are_kept_as_the_file_says(write, tmp_path):
    for said, kept in ((None, 2), (5, 5)):
        config = load(write(save_total_limit=said)).config(tmp_path / "out", device="cpu")
        assert config.save_total_limit == kept


def test_what_the_chat_template_is_given_shows_in_the_prompts(write, tmp_path):
    """Lengths are checked with it too."""
    shutil.copytree(find(PolicyName("nano-base")).path, tmp_path / "policy")
    template = tmp_path / "policy" / "chat_template.jinja"
    template.write_text("{{ mood }}: " + template.read_text())

    def made(mood):
        changes = {"model_name_or_path": str(tmp_path / "policy"), "use_cpu": True}
        given = {"chat_template_kwargs": {"mood": mood}, "grpo_harness": {"max_prompt_length": 60}}
        return job_of(load(write(**changes, **given)), tmp_path / "out")

    job = made("calm")
    assert "calm: " in prompt_of(job.policy, job.config, job.rows[0]["prompt"])
    with pytest.raises(ValueError, match="max_prompt_length is 60"):
        made("calm " * 60)


def test_values_are_taken_as_trl_takes_them(write, tmp_path):
    path = write(
        learning_rate="1e-6", num_iterations="2", scale_rewards=False, bf16="no", use_peft=True,
        lora_target_modules="all-linear", max_completion_length=12, lr_scheduler_type="cosine",
        gradient_checkpointing_kwargs='{"use_reentrant": false}', report_to="none",
    )  # fmt: skip
    path.write_text(path.read_text() + "<<: {seed: 3}\ngradient_checkpointing:  # none\n  false\n")
    _, config, model, _ = load(path).parsed
    assert (config.learning_rate, config.num_iterations, config.seed) == (1e-6, 2, 3)
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert model.lora_target_modules == "all-linear"


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generation": 8}, "has no 'num_generation'.*use num_generations"),
        ({"clip_range": 0.2}, "use epsilon"),
        ({"kl_coef": 0.1}, "use beta"),
        ({"max_prompt_length": 9}, "use max_prompt_length in the block grpo_harness"),
        ({"batch_size": 8}, "use per_device_train_batch_size"),
        ({"max_new_tokens": 9}, "use max_completion_length"),
        ({"model": "x"}, "has no 'model'"),
        ({"rewards": ["x"]}, "has no 'rewards'"),
        ({"learning_rate": float("nan")}, "must be finite"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': it must be a finite number"),
        ({"learning_rate": "1e400"}, "must be a finite number from 0 on"),
        ({"lr_scheduler_kwargs": {"min_lr": float("inf")}}, "must be finite"),
        ({"beta": "nan"}, "beta is 'nan'"),
        ({"loss_type": 7}, "loss_type is 7: it must be of the type str"),
        ({"num_generations": 1}, "num_generations is 1: it must be a whole number from 2 on"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"steps_per_generation": 0}, "steps_per_generation is 0: it must be a whole number"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"temperature": 0}, "temperature is 0: it must be a finite number above 0"),
        ({"top_p": 2}, "top_p is 2"),
        ({"min_p": 7}, "min_p is 7: it must be a number from 0 to 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be a finite number above 0"),
        ({"delta": -1}, "delta is -1: it must be a finite number above 0"),
        ({"seed": 2**32}, r"seed is 4294967296: it must be a whole number .* below 2\*\*32"),
        ({"logging_steps": -1}, "logging_steps is -1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
        ({"max_steps": 0}, "max_steps is 0: it must be a whole number from 1 on, or -1 with"),
        ({"max_steps": -5}, "max_steps is -5"),
        ({"generation_kwargs": {"top_kk": 5}}, "generation_kwargs has 'top_kk', which transf"),
        ({"datasets": ["a.jsonl"], "dataset_name": None}, "list of mappings, each with the path"),
        ({"datasets": [{"name": "a"}], "dataset_name": None}, "list of mappings, each with"),
        ({"model_init_kwargs": CYCLE}, "what begins in line 6 contains itself"),
        ({"save_steps": 0.5}, "save_steps is 0.5: it must be a whole number"),
        ({"save_strategy": "epoch"}, "save_strategy must be steps"),
        ({"logging_strategy": "no"}, "logging_strategy must be steps"),
        ({"logging_steps": 10}, "logging_steps is 10, and of 2 steps none"),
        ({"lr_scheduler_type": "cosin"}, "must be one of linear, cosine,"),
        ({"eval_strategy": False}, "eval_strategy is False: it must be one of no,.*, in quotes"),
        ({"reward_funcs": "team_rewards.short"}, r"must be of the type list\[str\] \| None"),
        ({"reward_funcs": [3]}, r"reward_funcs is \[3\]"),
        ({"reward_weights": 1.0}, "reward_weights is 1.0"),
        ({"lr_scheduler_kwargs": "foo"}, "lr_scheduler_kwargs is 'foo': it must be a mapping"),
        ({"model_init_kwargs": {"trust_remote_code": True}}, "never run"),
        ({"ignore_data_skip": True}, "the same as an uninterrupted one"),
        ({"warmup_ratio": 0.1}, "use warmup_steps"),
        ({"grpo_harnes": {}}, "use grpo_harness"),
        ({"grpo_harness": {3: 4}}, "a key of grpo_harness is no text"),
        ({"env": {"": "x"}}, "env has no possible variables"),
        ({"env": {"A": "\0"}}, "env has no possible variables"),
        ({"per_device_train_batch_size": 6}, "refuses it"),
        ({"model_name_or_path": None}, "model_name_or_path must name"),
        ({"dataset_name": None}, "must name its problems, once"),
        ({"grpo_harness": {"n_math": 4}}, "must name its problems, once"),
        ({"reward_funcs": None}, "reward_funcs must name"),
        ({"grpo_harness": {"n_maths": 4}}, "no key 'n_maths': did you mean n_math"),
        ({"grpo_harness": {"n_math": -1}}, "n_math is -1"),
        ({"grpo_harness": {"n_prog": 10**10}}, "n_prog is 10000000000: it must be a whole number"),
        ({"grpo_harness": 7}, "grpo_harness is 7: it must be a mapping"),
        ({"push_to_hub": True}, "push_to_hub cannot be set here"),
        ({"load_in_4bit": True}, "quantized weights"),
        ({"trust_remote_code": True}, "never run"),
        ({"streaming": True}, "streaming cannot be set here"),
        ({"logging_nan_inf_filter": True}, "a figure that is not finite ends the run"),
        ({"load_best_model_at_end": True}, "keeps the policy of its last step"),
        ({"loss_type": "dappo"}, "loss_type is 'dappo': it must be one of grpo, dr_grpo, dapo,"),
        ({"scale_rewards": "grup"}, "scale_rewards is 'grup': it must be one of group, batch,"),
        ({"importance_sampling_level": "word"}, "must be one of token, sequence"),
        ({"datasets": [{"path": "json"}]}, "must name its problems, once: dataset_name, datasets"),
        ({"n_math": 4}, "use n_math in the block grpo_harness"),
        ({"steps": 4}, "use max_steps"),
        ({"random_order": True}, "use shuffle_dataset"),
        ({"env": 7}, "env is 7"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(write, changes, said):
    with pytest.raises((ValueError, HarnessError), match=said) as raised:
        load(write(**changes))
    assert "\n" not in str(raised.value)
    assert "ours.yaml" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("a: 1\na: 2", "'a' twice"),
        ("beta: 0.1\nbeta: 0.2", "'beta' twice"),
        ("x: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text, said, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load(path)
    with pytest.raises(ValueError, match=r"there is no .*none\.yaml: name a recipe's \.yaml file$"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_funcs": ["team_rewards.none"], "reward_weights": None}, "reward_funcs: "),
        ({"reward_funcs": ["nowhere.at.all"], "reward_weights": None}, "'nowhere.at.all' is not"),
        ({"grpo_harness": {"trainer": "team_rewards:accuracy"}}, "is no subclass of GRPOTrainer"),
        ({"grpo_harness": {"trainer": "team_rewards:Theirs"}}, "not the module:Class"),
        ({"dataset_name": "other.jsonl"}, "ours.yaml: dataset_name: .*other.jsonl"),
        ({"model_name_or_path": "./nowhere"}, "nowhere"),
        ({"per_device_train_batch_size": 400}, "24 problems and asks 100 at once"),
        ({"reward_weights": [1.0]}, "ours.yaml: reward_weights has 1 numbers for 3 rewards"),
        ({"reward_model_name_or_path": "./none", "reward_weights": None}, "_path './none' is not"),
        ({"optim": "adamw_bnb_8bit"}, "ours.yaml: optim cannot be used"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "ours.yaml: lr_scheduler_type and lr_scheduler_kw"),
        ({"use_vllm": True}, "ours.yaml: use_vllm needs a package"),
        ({"eval_strategy": "epoch"}, "eval_strategy needs a test split, and train.jsonl"),
        ({"dataset_name": "team_rewards:pictures"}, "ours.yaml: the data set has the column image"),
        ({"dataset_name": "team_rewards:shown"}, "ours.yaml: the prompt of .* has images, and"),
        ({"dataset_name": "team_rewards:parts"}, "ours.yaml: the prompt of .* template cannot be"),
    ],
)
def test_what_the_file_names_must_be_there(write, changes, said, tmp_path):
    with pytest.raises((ValueError, HarnessError), match=said):
        train(load(write(**changes)), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations_eval": 3, "router_aux_loss_coef": 0.1}, "ours.yaml: the trainer of TRL"),
        (
            {"grpo_harness": {"trainer": "team_rewards:Unready"}},
            "ours.yaml: grpo_harness.trainer 'team_rewards:Unready' .*SystemExit: no licence",
        ),
        (
            {"grpo_harness": {"trainer": "team_rewards:Late"}},
            "ours.yaml: grpo_harness.trainer 'team_rewards:Late' .*KeyError: 'loader'",
        ),
        ({"grpo_harness": {"trainer": "team_rewards:Mute"}}, "step 2: .* has logged no loss"),
        (
            {
                "max_steps": -1,
                "num_train_epochs": 1,
                "logging_steps": 3,
                "grpo_harness": {"trainer": "team_rewards:Few"},
            },
            "logging_steps is 3, and of 1 steps none",
        ),
    ],
)
def test_what_the_trainer_refuses_is_one_clear_line(write, changes, said, tmp_path):
    from grpo_harness.training import TrainingError

    with pytest.raises(TrainingError, match=said) as raised:
        train(load(write(**changes)), tmp_path / "out", device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("epochs", "changes", "number"),
    [(1, {}, 12), (1.5, {}, 18), (1, {"gradient_accumulation_steps": 2, "num_iterations": 3}, 18)],
)
def test_a_run_of_epochs_that_would_log_nothing_is_refused_with_its_steps(
    write, epochs, changes, number, tmp_path
):
    """24 rows, two at once; before the weights are loaded."""
    changes = {"max_steps": -1, "num_train_epochs": epochs, **changes}
    wrong = load(write(**changes, logging_steps=number + 1))
    with pytest.raises(ValueError, match=rf"logging_steps is {number + 1}, and of {number} steps"):
        job_of(wrong, tmp_path / "out", device="cpu")
    right = job_of(load(write(**changes, logging_steps=number)), tmp_path / "out", device="cpu")
    assert right.config.max_steps == -1


def test_the_steps_of_an_epoch_are_those_that_the_trainer_takes(write, tmp_path):
    few = {"max_steps": -1, "num_train_epochs": 0.5, "max_completion_length": 2}
    recipe = load(write(**few, gradient_accumulation_steps=2, num_iterations=3))
    run = train(recipe, tmp_path / "out", device="cpu")
    assert len(run.log) == steps(recipe.config(tmp_path / "unused", device="cpu"), 24) == 9


@pytest.mark.parametrize(
    "changes",
    [
        # Three generations an epoch, of 24 rows; a step has two.
        {"per_device_train_batch_size": 16, "steps_per_generation": 2, "num_generations": 4},
        {"per_device_train_batch_size": 28, "steps_per_generation": 1, "seed": 3},
    ],
)
def test_each_step_asks_the_prompts_that_are_known_beforehand(changes, write, tmp_path):
    """The trainer's own reward sees them: parts of steps, and epochs that do not divide."""
    seen = []

    def reward(prompts, completions, trainer_state, **_):
        seen.append((trainer_state.global_step + 1, [of[0]["content"] for of in prompts]))
        return [float(len(c)) for c in completions]

    more = {"max_steps": 5, "max_completion_length": 2, "learning_rate": 0.0, **changes}
    recipe = load(write(gradient_accumulation_steps=2, reward_weights=None, **more))
    train(recipe, tmp_path / "out", device="cpu", reward=reward)
    contents = [row["prompt"][0]["content"] for row in rows()]
    found = islice(asked(recipe.config(tmp_path / "unused", device="cpu"), 24), len(seen))
    assert [(step, [contents[i] for i in of for _ in range(4)]) for step, of in found] == seen
    assert len({step for step, _ in seen}) > 2


def test_an_adapter_of_one_kind_of_module_is_a_list_of_one(write, tmp_path):
    """TRL makes a text of it, which PEFT takes for a pattern of whole names."""
    for named in (["q_proj"], [".*q_proj"]):
        recipe = load(write(use_peft=True, lora_r=2, lora_target_modules=named))
        built = build(recipe, tmp_path / "out", device="cpu")
        adapted = {n for n, p in built.model.named_parameters() if p.requires_grad}
        assert adapted
        assert all(".q_proj.lora_" in name for name in adapted)
    recipe = load(write(use_peft=True, lora_r=2, lora_target_modules=["all-linear"]))
    every = build(recipe, tmp_path / "out", device="cpu").model.named_parameters()
    assert len([name for name, p in every if p.requires_grad]) > 2 * len(adapted)


def test_a_large_file_is_read_at_once(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text("".join(f"a{i}: 1\n" for i in range(20_000)))
    with pytest.raises(ValueError, match="has no 'a0'"):
        load(path)


def test_a_reward_that_raises_names_the_step(write, tmp_path):
    from grpo_harness.training import TrainingError

    path = write(reward_funcs=["team_rewards.raises"], reward_weights=None)
    with pytest.raises(TrainingError, match=r"step 1: the reward raises.*oops"):
        train(load(path), tmp_path / "out", device="cpu")


# ------------------------------------------------------------------ the command


def test_the_command_overrides_what_the_file_says(write, tmp_path, capsys, monkeypatch):
    write(max_steps=50)
    command = ["train", "ours.yaml", "--out", "out", "--steps", "1", "--set", "beta=0.5",
               "--set", "lr_scheduler_type=constant", "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "step    1/1" in said
    again = ["--steps", "2", "--set", "num_iterations=2", "--device", "cpu"]
    assert main(["train", "ours.yaml", "--out", "again", *again]) == 0
    assert re.search(
        r"step    2/2  reward +\+nan  length   nan  entropy \d", capsys.readouterr().out
    )
    config = json.loads((tmp_path / "out" / "recipe.json").read_text())["config"]
    assert (config["beta"], config["lr_scheduler_type"], config["max_steps"]) == (
        0.5, "constant", 1,
    )  # fmt: skip
    monkeypatch.setenv("OURS", "0")
    assert load("ours.yaml", [("env", {"OURS": 2})]).env == {"OURS": "2"}
    assert os.environ["OURS"] == "2"
    assert main(["train", "ours.yaml", "--out", "new", "--set", "kl_coef=1"]) == 2
    assert "use beta" in capsys.readouterr().err
    assert main(["train", "ours.yaml", "--out", "x", "--steps", "0"]) == 2
    assert "--steps 0: there must be at least one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said", "line"),
    [
        (
            {"grpo_harness": {"trainer": "team_rewards:Odd"}},
            "step 2: Odd raised ValueError",
            "Value",
        ),
        ({"reward_funcs": ["team_rewards.raises"], "reward_weights": None}, "step 1: the r", "Key"),
    ],
)
def test_what_ones_own_code_raises_in_a_step_keeps_its_traceback(
    write, changes, said, line, capsys
):
    write(**changes)
    assert main(["train", "ours.yaml", "--out", "out", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "team_rewards.py" in told
    assert f"raise {line}Error(" in told
    assert told.splitlines()[-1].startswith(f"grpo-harness train: {said}")


def test_assignments_are_yaml():
    assert assignment("a=1e-3") == ("a", "1e-3")  # as in a file, where TRL makes a number of it
    assert assignment("a=[1.0, 2]") == ("a", [1.0, 2])
    assert assignment("a=true") == ("a", True)
    assert assignment("a=b=c") == ("a", "b=c")
    for wrong in (
        "a",
        "=1",
        "a=[",
        "a={b: 1, b: 2}",
        "a=&x [*x]",
        "a=2024-99-99",
        "a=" + "[" * 4000,
    ):
        with pytest.raises(ValueError, match="--set"):
            assignment(wrong)


def test_a_recorded_file_names_what_changed(write, tmp_path):
    recipe = load(write())
    record(recipe, tmp_path / "baselines")
    was = recorded(recipe.name, tmp_path / "baselines")
    assert differences(recipe, was, device="cpu") == []
    for key, value in {
        "learning_rate": 1e-4, "reward_weights": [1.0, 0.4, 0.1], "beta": 0.1, "use_peft": True,
        "dataset_name": "test.jsonl", "per_device_train_batch_size": 16,
        "reward_funcs": ["team_rewards.short"] * 3, "bf16": True, "gradient_checkpointing": True,
        "env": {"OUR_MODE": "other"}, "shuffle_dataset": False,
    }.items():  # fmt: skip
        changed = differences(load(write(**{key: value})), was, device="cpu")
        assert any(line.startswith(f"{key} is ") for line in changed), key


# ------------------------------------------------------------------ smoke runs


@pytest.mark.parametrize(
    ("changes", "batch", "steps"),
    [
        ({}, 8, 3),
        ({"per_device_train_batch_size": 256}, 4, 3),
        ({"per_device_train_batch_size": 64, "gradient_accumulation_steps": 8}, 1, 3),
        ({"per_device_train_batch_size": 64, "steps_per_generation": 2, "num_iterations": 2}, 2, 8),
        ({"max_steps": 900, "max_completion_length": 4096}, 8, 3),
        ({"num_iterations": 8, "model_revision": "v2"}, 8, 8),
    ],
)
def test_a_smoke_run_is_small_and_computes_the_same(write, changes, batch, steps):
    recipe = load(write(**changes))
    small = recipe.small("nano-trained")
    ours, theirs = small.config(recipe.path.parent / "out", device="cpu"), recipe.parsed.config
    assert (small.policy, ours.max_steps) == ("nano-trained", steps)
    assert ours.per_device_train_batch_size == batch
    assert ours.max_completion_length <= 32
    for name in ("num_generations", "gradient_accumulation_steps", "steps_per_generation", "beta",
                 "num_iterations", "reward_weights", "loss_type", "learning_rate"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of TRL
def test_a_smoke_run_leaves_out_by_name_what_has_no_formula(write, tmp_path):
    """TRL's own LoRA has dropout, and its own precision is half: the loss is looked at anyway."""
    ours = load(write(use_peft=True, lora_r=2, dtype="bfloat16"))
    run = watch(build(ours.small("nano-base"), tmp_path / "out", device="cpu"))
    run.holds("loss_equals_the_oracles")
    assert not {"dropout", "half precision"} & set(run.not_looked_at.values())
    assert set(ours.smoke_without(device="cpu")) == {"lora_dropout", "dtype, bf16, fp16"}
    vllm = load(write(use_peft=False, dtype=None, use_vllm=True))
    assert set(vllm.smoke_without(device="cpu")) == {"use_vllm"}
    assert load(write(use_vllm=False, use_peft=False)).smoke_without(device="cpu") == {}
    # On a GPU, TRL trains in half precision unless it is told otherwise.
    half = ours.small("nano-base").values
    assert (half["bf16"], half["fp16"], half["dtype"]) == (False, False, "float32")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of TRL
def test_the_trainer_is_the_one_that_trl_would_make(write, tmp_path):
    recipe = load(write(grpo_harness={"trainer": "team_rewards:Ours"}))
    trainer = build(recipe.small("nano-base"), tmp_path / "out", device="cpu")
    assert type(trainer) is own().Ours
    assert [f.__name__ for f in trainer.reward_funcs] == ["accuracy", "short", "odd"]
    assert trainer.state.global_step == 0
    trainer.train()
    assert trainer.state.global_step == 3


# ------------------------------------------------------------------ the suite


@pytest.mark.heavy  # six runs of pytest, four of which train
def test_the_suites_guard_what_a_recipe_means(project, write, monkeypatch, capsys):
    suites = Path(__file__).parents[1] / "suites"
    data, rewards = (Path(name).resolve() for name in ("train.jsonl", "team_rewards.py"))
    monkeypatch.chdir(project.path)
    (project.path / "test_own.py").write_text((suites / "test_recipe.py").read_text())
    for file in (data, rewards):
        shutil.copy(file, project.path / file.name)
    shutil.copy(write(), project.path / "ours.yaml")
    # Without one of its own the project is asked the built-in ones, of which it has no records.
    run(project, failed=5).stdout.fnmatch_lines(["*recorded of the recipe 'tutorial'*"])
    (project.path / "test_own_training.py").write_text((suites / "test_training.py").read_text())
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace("problems = 64", 'recipe = "ours.yaml"', 1))
    result = run(project, passed=1, failed=1)
    assert result.parseoutcomes()["deselected"] > 290, "the contract of the built-in recipes"
    result.stdout.fnmatch_lines(["*no config is recorded of the recipe 'ours'*"])
    capsys.readouterr()
    assert main(["recipes", "--record"]) == 0
    assert main(["recipes"]) == 0
    assert "ours: as recorded" in capsys.readouterr().out
    run(project, passed=2)
    (project.path / "train.jsonl").rename(project.path / "moved.jsonl")
    result = run(project, passed=1, failed=1)
    result.stdout.fnmatch_lines(["*data 'dataset': train.jsonl *"])
    result.stdout.no_fnmatch_line("*dataset.py:*")  # one line, no traceback
    (project.path / "moved.jsonl").rename(project.path / "train.jsonl")
    shutil.copy(write(beta=0.04), project.path / "ours.yaml")
    run(project, passed=1, failed=1).stdout.fnmatch_lines(["*beta is 0.04: it was 0.0*"])
    shutil.copy(write(use_vllm=True), project.path / "ours.yaml")
    without = run(project, passed=1, failed=1).stdout
    without.fnmatch_lines(["use_vllm is True: it was False*"])
    without.fnmatch_lines(["*the smoke run samples without vLLM (use_vllm)"])
    shutil.copy(write(betta=0.04), project.path / "ours.yaml")
    run(project, errors=2).stdout.fnmatch_lines(["*has no 'betta'*"])
    result = run(project)
    result.stdout.no_fnmatch_line("*files.py:*")  # one line, no traceback
    table.write_text(table.read_text().replace("ours.yaml", "none.yaml"))
    result = run(project)
    result.stderr.fnmatch_lines(["*recipe: there is no file 'none.yaml'*"])
