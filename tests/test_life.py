"""What a run does not do: draw in vain, load in vain, say a thing twice, orphan a recording."""

import json
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing

import pytest

from tests.projects import run


def recorded(project):
    return {str(p.relative_to(project.path)) for p in project.path.glob("baselines/*/*.json")}


def test_a_rerun_of_a_seed_loads_no_weights(project, monkeypatch):
    run(project, "--grpo-record")
    run(project, "--grpo-seed=3", passed=2)

    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)
    run(project, "--grpo-seed=3", passed=2)
    assert "weights were loaded" in run(project, "--grpo-seed=4", errors=2).stdout.str()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--grpo-problems=63", "63 problems are too few"),
        ("--grpo-problems=65", "1 are not among its 64"),
        ("--grpo-greedy", "greedy was False and is True"),
        ("--grpo-baselines=nowhere", "there is no baseline"),
    ],
)
def test_a_check_that_will_be_an_error_draws_nothing(project, monkeypatch, option, says):
    run(project, "--grpo-record")

    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)
    result = run(project, option, "--grpo-report=out", errors=2)
    result.stdout.fnmatch_lines(["ERROR: accuracy of *", f"*{says}*"])
    assert "weights were loaded" not in result.stdout.str()
    checks = json.loads((project.path / "out" / "report.json").read_text())["checks"]
    assert {(check["rule"], check["verdict"]) for check in checks} == {("accuracy", "ERROR")}


def test_a_run_whose_every_check_will_be_an_error_says_so(project):
    result = run(project, errors=2)
    result.stdout.fnmatch_lines(
        ["plan: * all 2 accuracy checks will be an ERROR, and draw nothing: no baseline*"]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grpo-base=no-such-policy", "-k", "base"],
        ["--grpo-baselines=nowhere", "-k", "base"],
        ["--grpo-problems=65", "-k", "base"],
    ],
)
def test_an_error_is_said_once(project, arguments):
    run(project, "--grpo-record")
    result = run(project, *arguments, errors=1)
    printed = result.stdout.str()
    assert "During handling of the above exception" not in printed
    assert "direct cause of the following" not in printed
    assert "Traceback" not in printed
    (error,) = [line for line in printed.splitlines() if line.startswith("___")]
    body = printed.split(error)[1].split("\n====")[0].split("\n- ")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 3


def test_a_link_is_known_by_its_name_wherever_it_points(project, save_tiny):
    """Repointing it orphans no recording, and lets none be pruned."""
    save_tiny(project.path / "out" / "checkpoint-300", seed=2)
    save_tiny(project.path / "out" / "checkpoint-600", seed=2)
    latest = project.path / "latest"
    latest.symlink_to("out/checkpoint-300")
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace('"trained-policy"', '"latest"'))
    run(project, "--grpo-record")
    assert recorded(project) == {
        "baselines/base-policy/palindrome.json",
        "baselines/latest/palindrome.json",
    }
    latest.unlink()
    latest.symlink_to("out/checkpoint-600")
    result = run(project, passed=2)
    assert "stale" not in result.stdout.str()
    result.stdout.fnmatch_lines(["*latest*"])


def test_an_untracked_report_folder_does_not_block_a_recording(project):
    (project.path / ".gitignore").write_text(".pytest_cache\n__pycache__\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *command], check=True, cwd=project.path)
    run(project, "--grpo-report=report", errors=2)
    assert run(project, "--grpo-record", skipped=2).ret == 0


def test_a_damaged_cache_is_said_once_and_mended(project):
    run(project, "--grpo-record")
    run(project, "--grpo-seed=3", passed=2)
    cache = project.path / ".pytest_cache" / "d" / "grpo-harness"
    with closing(sqlite3.connect(cache / "samples.db")) as database, database:
        of_base = "draw IN (SELECT draw FROM draws WHERE policy = ?)"
        database.execute(
            f"UPDATE samples SET text = ? WHERE number = 0 AND {of_base}",  # noqa: S608
            (b"\xff", b"base-policy"),
        )
    attempts = cache / "attempts.jsonl"
    attempts.write_bytes(attempts.read_bytes() + b"\n\xff\xfe\x00")
    said = [" ".join(run(project, "--grpo-seed=3", passed=2).outlines) for _ in range(2)]
    # The report wraps what it says at any space.
    assert [len(re.findall(r"\bof +the +(?:lines|samples) +in\b", t)) for t in said] == [2, 0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('no')", "raised RuntimeError: no"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("import pytest; pytest.skip('x')", "raised Skipped: x"),
        ("import pytest; pytest.fail('x')", "raised Failed: x"),
        ("raise type('E', (Exception,), {'__str__': lambda e: 1 / 0})", "raised E: <E>"),
        (
            "return [type('N', (), {'__repr__': lambda n: 1 / 0})()] * len(completions)",
            "returned <N> for the completion",
        ),
        (
            "return [type('N', (), {'__float__': lambda n: {}['x']})()] * len(completions)",
            "for the completion",
        ),
        ("return type('A', (), {'tolist': lambda a: {}['x']})()", "raised KeyError"),
        ("return 1.0", "returned float: it must return a list"),
        ("return 'abc'", "returned str"),
        ("return {1.0 for _ in completions}", "returned set"),
        ("return [1.0]", "returned 1 numbers for "),
        ("return ['x'] * len(completions)", "returned 'x' for the completion"),
        ("return [float('nan')] * len(completions)", "returned nan"),
        ("return {}", "returned dict"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named_before_anything_is_drawn(
    project, monkeypatch, body, says
):
    run(project, "--grpo-record")
    project.makepyfile(our_rewards=f"def reward(prompts, completions, **_):\n    {body}\n")
    table = project.path / "pyproject.toml"
    table.write_text(
        table.read_text().replace('tasks = ["pal', 'reward = "our_rewards:reward"\ntasks = ["pal')
    )
    project.syspathinsert()

    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)
    result = run(project, "-k", "base")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if "palindrome: the reward reward" in line]
    assert says in line
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_a_checkpoint_that_is_not_whole_is_not_recorded(project):
    from safetensors.torch import load_file, save_file

    path = project.path / "trained-policy" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    result = run(project, "--grpo-record", "-k", "trained", errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*lack the tensor model.layers.0.mlp.down_proj.weight*"])
    assert not recorded(project)


def test_one_policy_in_two_roles_is_loaded_once(project, monkeypatch):
    shutil.rmtree(project.path / "trained-policy")
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace('"trained-policy"', '"base-policy"'))
    from grpo_harness.engines import weights

    loads, own = [], weights.load_weights

    def load_weights(policy, *how):
        loads.append(policy.name)
        return own(policy, *how)

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)
    run(project, "--grpo-record")
    run(project, passed=2)
    assert loads == ["base-policy"] * 2  # once a run
