"""The command line says in one line what is wrong, and what an interruption left."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trl import GRPOConfig

from grpo_harness.cli import main, parser
from grpo_harness.training.builtin import BUILT_IN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no recipe 'nonsense': there are tutorial, nano, collapse, smoke"),
        (["smoke", "--policy", "no-such-policy"], "no policy 'no-such-policy'"),
        (["smoke", "--steps", "0"], "--steps 0: there must be at least one"),
        (["smoke", "--processes", "0"], "--processes 0: there must be at least one"),
        (["smoke", "--set", "kl_coef=1"], "recipe 'smoke': TRL 1.16.0 has no 'kl_coef'"),
        (["smoke", "--set", "n_math=-1"], "recipe 'smoke': grpo_harness n_math is -1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-harness train: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_out_that_exists_is_refused_before_anything_is_shown(tmp_path, capsys):
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    assert main(["train", "smoke", "--device", "cpu", "--out", str(out)]) == 2
    printed, error = capsys.readouterr()
    assert not printed
    assert error == (
        f"grpo-harness train: {out} exists already: name another folder, or remove it\n"
    )


def test_out_that_cannot_be_is_refused_at_the_start(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert (
        main(["train", "smoke", "--policy", str(tiny), "--device", "cpu", "--out", str(out)]) == 2
    )
    error = capsys.readouterr().err
    assert f"{out}.unfinished, where the checkpoints of {out} are kept, cannot be made" in error
    assert error.count("\n") == 1


def test_a_training_shows_its_config_its_steps_and_what_it_took(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--policy", str(tiny), "--steps", "2", "--device", "cpu"]
    assert main(["train", "smoke", "--out", str(out), *options]) == 0
    printed, error = capsys.readouterr()
    assert "CHANGED" not in error
    config, rest = printed.split("step    1/2")
    assert "learning_rate = 0.0002   (TRL: 1e-06)" in config
    assert "max_steps = 2 " in config
    assert f"\n  model_name_or_path = {tiny}\n" in config, "whose policy, data and rewards"
    assert "\n  n_math = " in config
    assert "step    2/2" in rest
    assert "0:00 left" in rest
    fingerprint = json.loads((out / "recipe.json").read_text())["fingerprint"]
    assert f"fingerprint {fingerprint}" in rest
    assert "completion tokens a second" in rest

    other = shutil.copytree(out, tmp_path / "other")
    took = json.loads((other / "resources.json").read_text())
    (other / "resources.json").write_text(json.dumps({**took, "hardware": "abacus"}))
    assert main(["resources", str(out), str(out)]) == 0
    assert "step_seconds: 1.00 times" in capsys.readouterr().out
    assert main(["resources", str(out), str(other)]) == 2
    assert "not comparable: hardware was abacus" in capsys.readouterr().err


def test_default_that_has_flipped_is_said_loudly(monkeypatch, tmp_path, capsys):
    @dataclasses.dataclass
    class Upgraded(GRPOConfig):
        delta: float = 4.0

    monkeypatch.setattr("trl.GRPOConfig", Upgraded)
    arguments = ["smoke", "--policy", "nowhere", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("CHANGED: the recipe smoke is not what was recorded of it with {'trl'")
    assert "\n  delta is 4.0: it was None\n" in error
    assert main(["recipes"]) == 0
    assert "smoke: changed\n  delta is 4.0: it was None\n" in capsys.readouterr().out


def test_recipes_are_as_recorded_and_can_be_recorded_again(monkeypatch, tmp_path, capsys):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == "".join(f"{name}: as recorded\n" for name in BUILT_IN)
    # Elsewhere they are another project's, and written there.
    monkeypatch.chdir(tmp_path)
    table = '[tool.grpo-harness]\nbaselines = "refs"\ntrained = "not-yet/checkpoint-*"'
    (tmp_path / "pyproject.toml").write_text(table)
    assert main(["recipes"]) == 2
    assert "no config is recorded of the recipe 'tutorial'" in capsys.readouterr().err
    assert main(["recipes", "--record"]) == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert written == {f"refs/recipes/{name}.json" for name in BUILT_IN}
    assert main(["recipes"]) == 0


def test_settings_are_those_of_a_run_with_where_each_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.grpo-harness]\nproblems = 128\n"
        '[tool.pytest.ini_options]\naddopts = "--grpo-samples=2"\n'
    )
    command = [sys.executable, "-m", "grpo_harness.cli", "settings", "--grpo-greedy"]
    run = subprocess.run([*command[:-1]], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in run.stdout.splitlines()}
    assert lines["problems"] == ["128", str(tmp_path / "pyproject.toml")]
    assert lines["samples"] == ["2", "command line"]
    assert lines["sampling.top_p"] == ["0.9", "default"]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--grpo-greedy draws one completion per problem" in wrong.stderr


def started(tiny, out, *options):
    """Start a training as a user does, and return the process when it has made three steps."""
    # A shell's background job, as these tests may be, has all that it starts ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "grpo_harness.cli", "train", "smoke", "--out", str(out)),
            *("--policy", str(tiny), "--steps", "6", "--device", "cpu", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if line.startswith("step    3/6"):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.heavy)]
)
def test_interrupted_training_goes_on(sent, tiny, tmp_path, capsys):
    process = started(tiny, tmp_path / "out")
    os.killpg(process.pid, sent)
    _, error = process.communicate()
    kept = tmp_path / "out.unfinished" / "checkpoint-2"
    if sent != signal.SIGKILL:
        assert process.returncode == 130
        assert error == (
            f"grpo-harness train: interrupted; {kept} is kept: the same command continues from "
            "there, another recipe needs another --out\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]

    again = ["--policy", str(tiny), "--steps", "6", "--device", "cpu"]
    assert main(["train", "smoke", "--out", str(tmp_path / "out"), *again]) == 0
    printed = capsys.readouterr().out
    assert f"going on from {kept}\n" in printed
    assert "step    2/6" not in printed
    assert "step    3/6" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_command_of_the_readme_is_one():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    launched = r"^(?:grpo-harness|accelerate .* -m grpo_harness\.cli) (.*)$"
    commands = re.findall(launched, readme, re.MULTILINE)
    commands += re.findall(r"`grpo-harness (\w+ -[^`]*)`", readme)
    told = {"admit", "bisect", "compare", "diff", "export", "history", "init", "log", "recipes"}
    told |= {"resources", "store", "train"}
    assert {command.split()[0] for command in commands} == told
    for command in commands:
        arguments, _ = parser().parse_known_args(command.split())
        assert (getattr(arguments, "recipe", None) or "nano") in {*BUILT_IN, "train.yaml"}
