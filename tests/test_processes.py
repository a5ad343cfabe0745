"""Two processes train as one does, and end together when one of them fails."""

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
