"""What changed between two recordings is said in a sentence, and nothing else changes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from grpo_harness.baselines.diff import differences, sentence, summary
from grpo_harness.baselines.file import BaselineError, load
from grpo_harness.cli import main
from tests.projects import run

BASELINES = Path(__file__).parents[1] / "baselines"
GCD = BASELINES / "nano-trained" / "gcd.json"


def between(new, old):
    one, two = load(new), load(old)
    return sentence(one.header, one.records, two.header, two.records)


def test_what_is_equal_has_no_difference(tmp_path):
    shutil.copytree(BASELINES, tmp_path / "old")
    assert between(GCD, tmp_path / "old" / "nano-trained" / "gcd.json") == "nothing"
    said = [*differences(tmp_path / "old", BASELINES)]
    assert len(said) == 12
    assert all(line.endswith(": nothing") for line in said)


def test_another_policy_is_named_with_its_change():
    base = BASELINES / "nano-base" / "gcd.json"
    said = between(GCD, base)
    then, now = (
        fmean(r["correct"] / r["k"] for r in json.loads(path.read_text())["problems"].values())
        for path in (base, GCD)
    )
    assert said.startswith("the policy was nano-base (")
    assert f"accuracy {then:.1%} -> {now:.1%}, {100 * (now - then):+.1f} points" in said


def test_a_task_that_is_new_or_gone_is_said(tmp_path):
    shutil.copytree(BASELINES, tmp_path / "old")
    (tmp_path / "old" / "nano-base" / "sort.json").unlink()
    old, new = tmp_path / "old", BASELINES
    assert "nano-base on sort: new" in [*differences(old, new)]
    assert "nano-base on sort: gone" in [*differences(new, old)]


@pytest.mark.parametrize("names", [("none", GCD), (GCD, BASELINES), ("empty", "empty")])
def test_what_cannot_be_compared_is_one_line(tmp_path, names, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["diff", *(str(tmp_path / name) for name in names)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo-harness diff: ")


def test_a_damaged_one_is_an_error(tmp_path):
    (tmp_path / "gcd.json").write_text(GCD.read_text().replace('"correct": 6', '"correct": 5', 1))
    with pytest.raises(BaselineError, match="damaged"):
        between(tmp_path / "gcd.json", GCD)


def test_an_unchanged_policy_recorded_again_changes_few_lines(project):
    run(project, "--grpo-record")
    (path,) = project.path.glob("baselines/*trained*/*.json")
    before = path.read_text().splitlines()
    run(project, "--grpo-record")
    after = path.read_text().splitlines()
    assert len(after) == len(before)
    changed = {b.split(":")[0].strip() for a, b in zip(before, after, strict=True) if a != b}
    # The commit, the time and the speed too, if they are others.
    few = {"change", "checksum", "commit", "completions_per_second", "parent", "recorded"}
    assert {'"change"', '"checksum"', '"parent"'} <= changed <= {f'"{name}"' for name in few}
    assert load(path).header.change == "nothing"


def test_git_shows_the_figures(tmp_path):
    def git(*words):
        done = subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = f"{sys.executable} -m grpo_harness.cli diff"
    git("init", "-q")
    git("config", "diff.grpo-harness.textconv", command)
    (tmp_path / ".gitattributes").write_text("*.json diff=grpo-harness\n")
    stored = tmp_path / "gcd.json"
    shutil.copy(BASELINES / "nano-base" / "gcd.json", stored)
    git("add", ".")
    shutil.copy(GCD, stored)
    said = git("diff")
    (gone,) = (line for line in said.splitlines() if line.startswith("-accuracy"))
    (new,) = (line for line in said.splitlines() if line.startswith("+accuracy"))
    assert (gone, new) == tuple(
        f"{sign}accuracy {load(path).header.accuracy:.2%}"
        for sign, path in (("-", BASELINES / "nano-base" / "gcd.json"), ("+", GCD))
    )
    assert summary(load(GCD)).splitlines()[2] == new[1:]
