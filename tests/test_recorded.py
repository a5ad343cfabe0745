"""What flips in an upgrade is named: the recipes resolve to what was recorded of them."""

import dataclasses
import json
from pathlib import Path

import pytest
from trl import GRPOConfig

from grpo_harness.errors import HarnessError
from grpo_harness.training import load
from grpo_harness.training.builtin import BUILT_IN
from grpo_harness.training.recorded import differences, path_of, record, recorded

BASELINES = Path(__file__).parent.parent / "baselines"


@pytest.mark.parametrize("name", BUILT_IN)
def test_resolved_config(name):
    was = recorded(name, BASELINES)
    changed, versions = differences(load(name), was, device="cpu"), was["versions"]
    assert not changed, f"recorded with {versions}: " + "; ".join(map(str, changed))


def test_every_recipe_is_recorded_and_no_other():
    assert {path.stem for path in path_of("x", BASELINES).parent.iterdir()} == set(BUILT_IN)


def test_default_that_flips_is_named(monkeypatch):
    @dataclasses.dataclass
    class Upgraded(GRPOConfig):
        multi_objective_aggregation: str = "normalize_then_sum"
        novelty: int = 3

    monkeypatch.setattr("trl.GRPOConfig", Upgraded)
    changed = differences(load("smoke"), recorded("smoke", BASELINES), device="cpu")
    assert changed == [
        "multi_objective_aggregation is 'normalize_then_sum': it was 'sum_then_normalize'",
        "novelty is new: 3",
    ]


def test_key_that_is_gone_and_recipe_that_changed_are_named():
    was = recorded("smoke", BASELINES)
    was["config"]["clip_range"] = 0.2
    recipe = load("smoke").with_values(beta=0.04)
    changed = differences(recipe, was, device="cpu")
    assert changed == ["beta is 0.04: it was 0.0", "clip_range is gone: it was 0.2"]


def test_recording_again_changes_nothing(tmp_path):
    for recipe in map(load, BUILT_IN):
        path = record(recipe, tmp_path)
        assert json.loads(path.read_text())["config"] == recorded(recipe.name, BASELINES)["config"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"config": {}', '{"config": 1, "versions": {}}']
)
def test_record_that_cannot_be_read_is_an_error(text, tmp_path):
    path = path_of("smoke", tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(HarnessError, match=r"smoke\.json is not a recorded config"):
        recorded("smoke", tmp_path)
    with pytest.raises(HarnessError, match="recipes --record"):
        recorded("nano", tmp_path)
