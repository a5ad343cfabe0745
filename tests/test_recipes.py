"""A recipe holds only values that a run can be made of."""

import copy
import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.training.recipes import RECIPES, named

SMOKE = RECIPES["smoke"]


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "a whole number from 1 on"),
        ("steps", -1, "a whole number from 1 on"),
        ("steps", True, "a whole number from 1 on"),
        ("num_generations", 1, "a whole number from 2 on"),
        ("gradient_accumulation_steps", 0, "a whole number from 1 on"),
        ("max_prompt_length", math.nan, "a whole number from 1 on"),
        ("max_completion_length", 2.5, "a whole number from 1 on"),
        ("n_prog", -1, "a whole number from 0 on"),
        ("seed", None, "a whole number from 0 on"),
        ("save_steps", "2", "a whole number from 0 on"),
        ("problem_seed", "x", "a whole number"),
        ("learning_rate", math.nan, "a finite number from 0 on"),
        ("learning_rate", math.inf, "a finite number from 0 on"),
        ("learning_rate", -1e-3, "a finite number from 0 on"),
        ("epsilon", "0.2", "a finite number from 0 on"),
        ("beta", -1.0, "a finite number from 0 on"),
        ("temperature", 0.0, "a finite number above 0"),
        ("top_p", 0.0, "a number above 0 and up to 1"),
        ("top_p", 2, "a number above 0 and up to 1"),
        ("loss_type", None, "a text"),
        ("policy", "", "a text"),
        ("config", None, "a mapping from names to values"),
        ("config", {1: 2}, "a mapping from names to values"),
    ],
)
def test_value_that_no_run_is_made_of_is_an_error(field, value, wanted):
    with pytest.raises(ValueError, match=f"^recipe 'smoke': {field} is .*, not {wanted}$") as bad:
        dataclasses.replace(SMOKE, **{field: value})
    assert repr(value) in str(bad.value)


@given(
    st.sampled_from([f.name for f in dataclasses.fields(SMOKE)]),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    ),
)
def test_whatever_a_field_is_given_it_is_taken_or_refused_by_name(field, value):
    try:
        recipe = dataclasses.replace(SMOKE, **{field: value})
    except ValueError:
        with pytest.raises(ValueError, match=f": {field} is "):
            dataclasses.replace(SMOKE, **{field: value})
    else:
        assert getattr(recipe, field) == value


def test_recipes_share_nothing_that_can_be_changed():
    config = {"epsilon_high": 0.28}
    one = dataclasses.replace(SMOKE, config=config)
    config["epsilon_high"] = 1.0
    assert one.config == {"epsilon_high": 0.28}
    assert dataclasses.replace(one).config is not one.config
    assert copy.deepcopy(one) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.beta = 0.1


def test_unknown_name_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match="no recipe 'nan': there are tutorial, nano, collapse"):
        named("nan")
