"""Beside older releases of TRL a recipe means the same, and what flipped since is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_harness.training.builtin import BUILT_IN
from grpo_harness.training.recorded import recorded

pytestmark = pytest.mark.heavy

BASELINES = Path(__file__).parent.parent / "baselines"

FLIPPED = {
    "0.29.0": {"vllm_mode", "vllm_importance_sampling_cap"},
    "1.0.0": {"vllm_importance_sampling_cap"},
    "1.10.0": set(),
}
"""What each release defaults otherwise than the locked one, among the keys that both have."""

PROBE = """
import json, sys
from importlib.metadata import version
from pathlib import Path

import trl

from grpo_harness.training import load, train
from grpo_harness.training.builtin import BUILT_IN
from grpo_harness.training.recorded import differences, portable, recorded

policy, folder, baselines = sys.argv[1:]
assert Path(trl.__file__).is_relative_to(folder), trl.__file__
smoke = load("smoke")
try:
    load("smoke", {"router_aux_loss": 512})
    error = ""
except ValueError as raised:
    error = str(raised)
short = smoke.with_values(
    model_name_or_path=policy, max_steps=2, save_steps=1, max_completion_length=8
)
print(json.dumps({
    "version": version("trl"),
    "configs": {
        name: portable(load(name), "cpu") for name in BUILT_IN
    },
    "differences": [
        (text.split()[0], text)
        for text in differences(smoke, recorded("smoke", Path(baselines)), device="cpu")
    ],
    "error": error,
    "steps": [row["step"] for row in train(short, Path(folder, "out"), device="cpu").log],
}))
"""


@pytest.fixture(scope="module", params=FLIPPED)
def older(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(folder), f"trl=={request.param}"], check=True)
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1] / "harness")])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tiny), str(folder), str(BASELINES)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == request.param
    return told


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_recipe_means_the_same(older, name):
    now, then = recorded(name, BASELINES)["config"], older["configs"][name]
    shared = now.keys() & then.keys()
    assert {key for key in shared if now[key] != then[key]} == FLIPPED[older["version"]]
    asked = {"num_generations", "max_completion_length", "learning_rate", "epsilon", "beta"}
    assert asked | {"top_k", "loss_type", "scale_rewards", "use_bias_correction_kl"} <= shared


def test_what_it_defaults_otherwise_is_named(older):
    named = dict(older["differences"])
    assert named.keys() >= FLIPPED[older["version"]]
    gone = recorded("smoke", BASELINES)["config"].keys() - older["configs"]["smoke"].keys()
    assert {key for key, text in named.items() if "is gone" in text} == gone


def test_key_that_it_does_not_have_is_an_error(older):
    assert f"TRL {older['version']} has no 'router_aux_loss'" in older["error"]


def test_it_trains(older):
    assert older["steps"] == [1, 2]
