"""What a recipe trains and evaluates on: its problems, and the rows that the trainer is given.

They are those of ``trl grpo``: a data set, a mixture of several, or generated problems.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.scripts.utils import DatasetMixtureConfig, get_dataset

from grpo_harness.policy import Policy
from grpo_harness.tasks import Problem
from grpo_harness.tasks.dataset import DataError, DatasetSource
from grpo_harness.text import escape
from grpo_harness.training.files import Recipe
from grpo_harness.training.keys import RecipeError


@dataclass(frozen=True)
class Data:
    """Training problems with their rows, and the rows of the evaluations if there are any."""

    problems: Sequence[Problem]
    rows: Dataset
    evaluated: Dataset | None = None


@dataclass(frozen=True)
class _Mixture(DatasetSource):
    """The rows of several data sets, mixed and split by TRL."""

    mixture: DatasetMixtureConfig | None = None
    seed: int = 0

    def table(self, cache: str) -> Any:
        """Return the rows of one split. The rows of a test split are drawn by the seed."""
        assert self.mixture is not None
        with _numpy_seeded(self.seed):  # TRL divides by numpy's global state
            mixed = get_dataset(self.mixture)
        if self.split not in mixed:
            raise ValueError(f"it has the splits {', '.join(mixed)}: see test_split_size")
        return mixed[self.split]


def read_data(recipe: Recipe) -> Data | None:
    """Read the data sets that a recipe names, or return None if it generates its problems.

    Raises ``RecipeError`` with the file and the key.
    """
    script, config, _, mixture = recipe.parsed
    source = DatasetSource(
        name="dataset",
        path=script.dataset_name or "",
        home=Path.cwd(),
        config=script.dataset_config,
        settings="dataset_name, dataset_config and dataset_train_split",
    )
    key, train, test = "dataset_name", script.dataset_train_split, script.dataset_test_split
    if mixture.datasets:
        key = "datasets"
        paths = ", ".join(of.path for of in mixture.datasets)
        source = _Mixture(
            name="dataset", path=paths, settings=key, mixture=mixture, seed=config.seed
        )
    evaluates = config.eval_strategy != "no"
    if not source.path:
        if evaluates:
            raise RecipeError(
                f"{recipe.where}: eval_strategy needs a test split of a data set: generated "
                "problems are evaluated by the suites"
            )
        return None
    one_file = key == "dataset_name" and (Path.cwd() / source.path).is_file()
    if one_file and train != "train":
        raise RecipeError(
            f"{recipe.where}: dataset_train_split is {escape(repr(train), 60)}, and {source.path} "
            "is one file, whose only split is train: leave dataset_train_split out"
        )
    with _named(recipe, key):
        # The default split, which a table without splits has too.
        split = None if key == "dataset_name" and train == "train" else train
        problems = replace(source, split=split).in_order
        rows = _rows(source, problems)
    if not evaluates:
        return Data(problems, rows)
    if one_file:
        raise RecipeError(
            f"{recipe.where}: eval_strategy needs a test split, and {source.path} is one file: "
            "name a data set with splits, or datasets with a test_split_size"
        )
    with _named(recipe, "dataset_test_split" if key == "dataset_name" else key):
        return Data(problems, rows, _rows(source, replace(source, split=test).in_order))


def generated(recipe: Recipe, policy: Policy) -> Data:
    """Return the generated problems of a recipe, rendered by the policy's chat template."""
    problems = recipe.problems()
    rendered = [_once_special(policy.tokenizer, policy.render(p.prompt)) for p in problems]
    return Data(problems, Dataset.from_list([{"prompt": prompt} for prompt in rendered]))


def _rows(source: DatasetSource, problems: Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": p.prompt, **source.columns(p)} for p in problems])


@contextmanager
def _named(recipe: Recipe, key: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise RecipeError(f"{recipe.where}: {key}: {error}") from error


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _once_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # The chat template has written the special tokens, and TRL tokenizes a string prompt with
    # those that the tokenizer adds itself: the begin token must not be there twice.
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer(text)["input_ids"] == wanted:
        return text
    shorter = text.removeprefix(tokenizer.bos_token or "")
    if tokenizer(shorter)["input_ids"] == wanted:
        return shorter
    raise RecipeError(
        "the tokenizer adds special tokens to a prompt that the chat template has completed "
        "already: switch that off in its tokenizer_config.json (add_bos_token, add_eos_token)"
    )
