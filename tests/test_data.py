"""The data of a recipe is what `trl grpo` would train and evaluate on."""

import json

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from grpo_harness.training import load, train
from grpo_harness.training.data import read_data
from grpo_harness.training.job import job_of

REWARD = "def right(completions, solution, **_):\n    return [-len(c) / 9 for c in completions]\n"

BASE = {
    "model_name_or_path": "nano-base",
    "reward_funcs": ["mixed_rewards.right"],
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "logging_steps": 1,
}


def rows(word, n, **more):
    return [{"prompt": f"{word} {i}", "solution": str(i), **more} for i in range(n)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mixed_rewards.py").write_text(REWARD)
    for name, content in (("sums", rows("sum", 20, note="x")), ("gcds", rows("gcd", 8))):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)
    splits = {name: Dataset.from_list(rows(name, n)) for name, n in (("train", 9), ("test", 4))}
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))

    def write(**changes):
        (tmp_path / "ours.yaml").write_text(yaml.safe_dump({**BASE, **changes}))
        return load(tmp_path / "ours.yaml")

    return write


SUMS = {"path": "json", "data_files": "sums.jsonl", "columns": ["prompt", "solution"]}
GCDS = {"path": "json", "data_files": "gcds.jsonl"}


def prompts(of):
    return [row["prompt"] for row in of]


def test_a_mixture_is_the_one_that_trl_makes(write):
    """An independent oracle: TRL's own function on the same data sets."""
    for more in ({}, {"fraction": 0.5}):
        mixed = [{**SUMS, **more}, {**GCDS, **more}]
        data = read_data(write(datasets=mixed))
        config = DatasetMixtureConfig(datasets=[DatasetConfig(**of) for of in mixed])
        assert data.rows.to_list() == get_dataset(config)["train"].to_list()
        assert [p.prompt for p in data.problems] == prompts(data.rows)
        assert data.evaluated is None
    assert len(data.rows) == 16  # half each, of eight


def test_the_test_split_of_a_mixture_is_drawn_by_the_seed(write):
    recipe = write(datasets=[SUMS, GCDS], test_split_size=0.25, eval_strategy="steps")
    one, again = read_data(recipe), read_data(recipe)
    assert (len(one.rows), len(one.evaluated)) == (21, 7)
    assert not set(prompts(one.rows)) & set(prompts(one.evaluated))
    assert (one.rows.to_list(), one.evaluated.to_list()) == (
        again.rows.to_list(), again.evaluated.to_list(),
    )  # fmt: skip
    other = read_data(recipe.with_values(seed=1))
    assert set(prompts(other.evaluated)) != set(prompts(one.evaluated))


def test_what_is_trained_is_evaluated_where_the_file_asks(write, tmp_path):
    recipe = write(dataset_name="saved", eval_strategy="steps", eval_steps=2, max_steps=3)
    run = train(recipe, tmp_path / "out", device="cpu")
    assert [("eval_reward" in row) for row in run.log] == [False, True, True], "and at the end"
    kept = json.loads((tmp_path / "out" / "log.json").read_text())
    assert kept[1]["eval_reward"] == run.log[1]["eval_reward"] < 0
    assert len((tmp_path / "out" / "problems.txt").read_text().split()) == 9, "those of training"


def test_rows_are_asked_in_the_order_of_the_file_where_it_says_so(write, tmp_path):
    """TRL's own word for it; the seed decides the order otherwise."""
    asked = {}
    for shuffles in (True, False):
        seen = []

        def reward(prompts, completions, seen=seen, **_):
            seen.extend(prompts[::4])
            return [-float(len(c)) for c in completions]

        recipe = write(dataset_name="gcds.jsonl", shuffle_dataset=shuffles)
        train(recipe, tmp_path / str(shuffles), device="cpu", reward=reward)
        asked[shuffles] = seen
    assert asked[False] == ["gcd 0", "gcd 1", "gcd 2", "gcd 3"]
    assert asked[True] != asked[False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": [{**SUMS, "path": "nowhere/at-all"}]}, "datasets: data 'dataset': nowhere"),
        ({"datasets": [{**SUMS, "columns": ["prompts"]}]}, "datasets: .*prompts"),
        ({"datasets": [{**SUMS, "split": "dev"}]}, "datasets: .*dev"),
        ({"datasets": [{**SUMS, "fraction": 0.5}, GCDS]}, "datasets: .*fraction"),
        ({"datasets": [SUMS], "eval_strategy": "steps"}, "datasets: .*see test_split_size"),
        ({"dataset_name": "no.jsonl"}, "dataset_name: .*see dataset_name, dataset_config and"),
        ({"dataset_name": "gcds.jsonl", "eval_strategy": "steps"}, ".*gcds.jsonl is one file"),
        (
            {"dataset_name": "gcds.jsonl", "dataset_train_split": "dev"},
            "dataset_train_split is 'dev', and gcds.jsonl is one file",
        ),
        (
            {"dataset_name": "gcds.jsonl", "dataset_train_split": "train[:4]"},
            r"dataset_train_split is 'train\[:4\]', and gcds.jsonl is one file",
        ),
        (
            {"dataset_name": "saved", "dataset_train_split": "dev"},
            "dataset_name: .*splits train, test",
        ),
        (
            {"dataset_name": "saved", "eval_strategy": "steps", "dataset_test_split": "dev"},
            "dataset_test_split: .*splits train, test",
        ),
        (
            {"grpo_harness": {"n_math": 9}, "eval_strategy": "steps"},
            "eval_strategy needs a test split of a data set",
        ),
    ],
)
def test_data_that_cannot_be_used_is_one_clear_line(write, changes, said, tmp_path):
    with pytest.raises(ValueError, match=rf"ours\.yaml: {said}") as raised:
        job_of(write(**changes), tmp_path / "out", device="cpu")
    assert "\n" not in str(raised.value)


def test_a_misspelt_key_of_a_data_set_is_refused(write):
    with pytest.raises(ValueError, match=r"ours\.yaml: .*columm"):
        write(datasets=[{**SUMS, "columm": ["prompt"]}])
