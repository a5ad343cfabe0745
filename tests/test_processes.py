"""Two processes train as one does, are watched as one, and end together when one of them fails."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.heavy


def several(what, processes, *arguments):
    return subprocess.run(
        [
            *(sys.executable, str(Path(__file__).parent / "several.py"), what, str(processes)),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def flat(path):
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_of_two_processes_is_the_step_of_one(parts, tiny, tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        done = several(
            "one_step", processes, tiny, tmp_path / str(processes), tmp_path / "given.json", parts
        )
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "1", tmp_path / "2"

    drawn = [[tuple(ids) for ids in json.loads((two / f"{r}.json").read_text())] for r in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 8
    assert not set(drawn[0]) & set(drawn[1]), "the two processes draw the same problems"
    alone = Counter(map(tuple, json.loads((one / "0.json").read_text())))
    assert Counter(drawn[0] + drawn[1]) == alone, "together they do not draw the whole batch"

    rows = [json.loads((folder / "trained" / "log.json").read_text())[0] for folder in (one, two)]
    # The logged entropy is the mean over parts, which weigh alike however many tokens they have.
    for name in rows[0].keys() - {"step_time", "entropy"}:
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5, abs=1e-6), name
    gradient = flat(one / "0.safetensors")
    assert gradient.norm() > 1e-3
    for rank in (0, 1):
        other = flat(two / f"{rank}.safetensors")
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    start = load_file(tiny / "model.safetensors")
    moved = [load_file(folder / "trained" / "model.safetensors") for folder in (one, two)]
    step = torch.cat([(moved[0][n] - start[n]).flatten() for n in sorted(start)])
    apart = torch.cat([(moved[1][n] - moved[0][n]).flatten() for n in sorted(start)])
    assert apart.norm() <= 1e-3 * step.norm()


def test_error_in_one_process_ends_all_with_one_message():
    done = several("fail", 2)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "grpo_harness.training.processes.ProcessError: "
        "process 1: the second one has run out of luck"
    )


HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
WATCHED = {
    "plain": ["OwnTrainer", {}, None],
    # Six completions in each process: the second of three groups is in both.
    "a group in both": [
        "GRPOTrainer",
        {
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "beta": 0.1,
            "loss_type": "grpo",
            "scale_rewards": "batch",
            "log_completions": True,
            "num_completions_to_print": 0,
        },
        None,
    ],
    "bnpo": ["GRPOTrainer", {**HALVES, "loss_type": "bnpo"}, None],
    "masked": [
        "GRPOTrainer",
        {**HALVES, "mask_truncated_completions": True, "conversations": True},
        None,
    ],
    "used again": [
        *("GRPOTrainer", {"num_iterations": 2, "max_steps": 2, "learning_rate": 5e-3}),
        None,
    ],
    "an environment": [
        "InAnEnvironment",
        {"per_device_train_batch_size": 4, "max_steps": 1, "conversations": True},
        None,
    ],
    "its own σ": [
        *("OfItsOwnBatch", {"scale_rewards": "batch", "max_steps": 1}),
        "advantages_are_group_relative",
    ],
    "its own tokens": ["OfItsOwnTokens", {"max_steps": 1}, "gradient_equals_the_oracles"],
    "its own mean": ["OfItsOwnFigures", {"max_steps": 1}, "rewards_are_the_completions"],
    "the same prompts": ["SamePrompts", {"max_steps": 1}, "every_problem_has_its_turn"],
    "the same seed": ["SameSeed", {"max_steps": 1}, "every_draw_has_its_own_random_numbers"],
    "its own gradients": ["NotAveraged", {}, "every_process_has_the_same_weights"],
}
"""Trainers of two processes, and the invariant that each breaks."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    listed = folder / "trainers.json"
    listed.write_text(json.dumps({name: entry[:2] for name, entry in WATCHED.items()}))
    done = several("watched", 2, folder, listed)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", WATCHED)
def test_two_processes_are_watched_as_one(name, watched):
    invariant = WATCHED[name][2]
    for rank, said in enumerate(watched):
        report, left_out = said[name]
        if name == "used again":
            assert left_out == {"on_policy_the_ratio_is_one": "completions that several steps use"}
        else:
            assert bool(left_out) == (name == "an environment")
        assert bool(report) == bool(invariant), report
        if invariant and rank == 0:
            assert f"\n{invariant}: " in report
        if invariant and rank == 1:
            assert report.endswith(" of 23 invariants differ: process 0 has the report")


CRASHING = """
import os
import sys

sys.path.append({tests!r})
from trainers import build, reward_digits

from grpo_harness.contract import watch


def reward(completions, **kwargs):
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("in the reward")
    return reward_digits(completions)


def test_ours(tmp_path):
    watch(build(tmp_path, rewards=reward)).holds()


def test_another(tmp_path):
    watch(build(tmp_path)).holds()
"""


def test_a_crash_in_one_process_ends_all_and_is_named(tmp_path):
    (tmp_path / "test_crash.py").write_text(CRASHING.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_crash.py")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout
    assert (
        "AssertionError: the training of GRPOTrainer crashed in process 1, step 1: "
        "ZeroDivisionError: in the reward"
    ) in done.stdout
    assert "! the training of several processes crashed !" in done.stdout
