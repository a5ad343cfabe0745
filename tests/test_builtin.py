"""The built-in recipes are files like a user's own, and every recipe holds only usable values."""

import dataclasses
import math
import subprocess
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trl.scripts.grpo import make_parser

from grpo_harness.errors import HarnessError
from grpo_harness.training import load
from grpo_harness.training.builtin import BUILT_IN, path_of
from grpo_harness.training.config import settings
from grpo_harness.training.keys import OF_THE_BLOCK, RecipeError, check_keys

SMOKE = load("smoke")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_copy_of_the_file_means_the_same(name, tmp_path):
    """A built-in recipe has nothing that a file of one's own could not have."""
    copy = tmp_path / f"{name}.yaml"
    copy.write_bytes(BUILT_IN[name].read_bytes())
    one, other = load(name), load(copy)
    assert settings(one.config(tmp_path)) == settings(other.config(tmp_path))
    assert (one.values, one.block, one.beside()) == (other.values, other.block, other.beside())
    assert (one.name, other.name) == (name, name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_trls_own_command_reads_the_file(name, tmp_path):
    """An independent oracle: TRL's parser on the file as it is; what is left is our block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing`", FutureWarning)
        arguments = ["--config", str(BUILT_IN[name]), "--output_dir", "x", "--use_cpu", "true"]
        found = make_parser().parse_args_and_config(
            [*arguments, "--bf16", "false"], fail_with_unknown_args=False
        )
    content = yaml.safe_load(BUILT_IN[name].read_text())
    block = content.pop("grpo_harness")
    assert block.keys() <= OF_THE_BLOCK
    config, model = found[1], found[2]
    ours = load(name).config(tmp_path, device="cpu")
    for key, value in content.items():
        theirs = getattr(config if hasattr(config, key) else model, key)
        assert theirs == value
        if hasattr(config, key):
            assert getattr(ours, key) == value


def test_they_are_in_the_package():
    folder = files("grpo_harness.training") / "recipes"
    assert {Path(str(file)).stem for file in folder.iterdir()} == set(BUILT_IN)


@pytest.mark.heavy  # builds and installs a wheel
def test_they_are_in_the_wheel(installed):
    code = (
        "from grpo_harness.training.builtin import BUILT_IN\n"
        "print([path.is_file() for path in BUILT_IN.values()])"
    )
    told = subprocess.run([installed, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([True] * len(BUILT_IN))


def test_unknown_name_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match="no recipe 'nan': there are tutorial, nano, collapse"):
        path_of("nan")
    assert path_of("a/b.yml") == Path("a/b.yml")


@pytest.mark.parametrize("name", sorted(OF_THE_BLOCK))
def test_no_key_of_the_block_is_one_of_trls(name):
    with pytest.raises(RecipeError, match=f"use {name} in the block grpo_harness"):
        check_keys("the file", {name: 1})


def test_a_recipe_with_other_values_leaves_the_first_as_it_is():
    other = SMOKE.with_values(beta=0.5, n_math=2)
    assert (other.values["beta"], other.block.n_math, other.block.n_prog) == (0.5, 2, 24)
    assert (SMOKE.values["beta"], SMOKE.block.n_math) == (0.0, 8)
    assert SMOKE.with_values(beta=0.5).with_values(beta=0.0) == SMOKE
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.name = "other"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_generations", 1, "a whole number from 2 on"),
        ("gradient_accumulation_steps", 0, "a whole number from 1 on"),
        ("max_prompt_length", math.nan, "a number of tokens from 1 on"),
        ("max_completion_length", 2.5, "a whole number from 1 on"),
        ("n_prog", -1, "a number of generated problems"),
        ("seed", None, "a whole number from 0 on"),
        ("problem_seed", "x", "a whole number"),
        ("learning_rate", math.nan, "finite"),
        ("learning_rate", -1e-3, "a finite number from 0 on"),
        ("beta", -1.0, "a finite number from 0 on"),
        ("temperature", 0.0, "a finite number above 0"),
        ("top_p", 2, "a number above 0 and up to 1"),
        ("loss_type", None, "of the type str"),
        ("weight_decay", "much", "a finite number from 0 on"),
    ],
)
def test_value_that_no_run_is_made_of_is_an_error(key, value, wanted):
    with pytest.raises(Exception, match=rf"^recipe 'smoke': .*{key} is .*{wanted}") as bad:
        SMOKE.with_values(**{key: value})
    assert "\n" not in str(bad.value)


@given(
    st.sampled_from([*SMOKE.values, *OF_THE_BLOCK]),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    ),
)
def test_whatever_a_key_is_given_it_is_taken_or_refused_by_name(key, value):
    told = ""
    try:
        recipe = SMOKE.with_values(**{key: value})
    except HarnessError as error:
        told = str(error)
    if told:
        assert told.startswith("recipe 'smoke'")
        assert key in told
        assert "\n" not in told
    else:
        assert {**recipe.values, **recipe.kept()["block"]}[key] == value
