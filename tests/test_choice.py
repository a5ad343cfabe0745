"""The commands compare and bisect, on real checkpoints whose drop is where it was put."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo_harness
from grpo_harness.choice.named import ChoiceError, between, policies
from grpo_harness.cli import main
from grpo_harness.policy import PolicyName
from grpo_harness.report.files import read
from grpo_harness.store import FILE

NANO = Path(grpo_harness.__file__).parent / "nano"
GCD = ("--task", "gcd", "--device", "cpu")


def mix(folder, part, seed=0):
    """Write a checkpoint: the trained policy, ``part`` of the way back to its base, and noise."""
    shutil.copytree(NANO / "trained", folder)
    generator = torch.Generator().manual_seed(seed)
    trained, base = (load_file(NANO / name / "model.safetensors") for name in ("trained", "base"))
    mixed = {
        name: (1 - part) * tensor
        + part * base[name]
        + 1e-4 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in trained.items()
    }
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run_(tmp_path_factory):
    """A training's folder: up to step 90 it is as good as nano-trained, from 100 on as its base."""
    folder = tmp_path_factory.mktemp("training")
    for step in (8, 20, 90, 100, 1000):
        mix(folder / f"out/checkpoint-{step}", 0.95 if step >= 100 else 0.02, seed=step)
    mix(folder / "half-95", 0.86)
    return folder


@pytest.fixture
def here(run_, monkeypatch, capfd):
    """A function that runs a command in that folder, and returns what it said."""
    monkeypatch.chdir(run_)
    monkeypatch.setenv("COLUMNS", "200")

    def said(command, status=0):
        capfd.readouterr()
        assert main(command.split()) == status
        output = capfd.readouterr()
        if status == 2:
            assert output.err.startswith(f"grpo-harness {command.split()[0]}: ")
            assert output.err.count("\n") == 1
            return output.err
        return output.out

    return said


BISECT = "bisect --good nano-trained --bad nano-base"


def test_bisect_finds_the_first_checkpoint_after_the_drop(here, run_):
    command = f"{BISECT} out/checkpoint-* --problems 128 --seed 5 {' '.join(GCD)}"
    said = here(command)
    assert "5 checkpoints between nano-trained and nano-base, up to 128 problems, seed 5" in said
    # By their steps: 90 is before 100, and 8 before 20.
    assert "first after the drop: out/checkpoint-100; the last before it: out/checkpoint-90" in said
    assert re.search(
        r"^out/checkpoint-90: before the drop, lost -?\d+\.\d points", said, re.MULTILINE
    )
    assert re.search(
        r"^out/checkpoint-100: after the drop, lost \d\d\.\d points", said, re.MULTILINE
    )
    asked, completions = re.search(
        r"asked (\d) of 5 checkpoints, ([\d,]+) completions in", said
    ).groups()
    assert int(asked) <= 3
    full = 7 * 128 * 4
    assert f"to judge each in full would take {full:,}" in said
    assert int(completions.replace(",", "")) < full / 2
    assert (run_ / ".pytest_cache/d/grpo-harness/samples.db").is_file()
    # A repetition finds all in the store.
    assert f"{completions} completions, {completions} of them stored before," in here(command)


def test_what_is_not_decided_is_a_range(here, monkeypatch):
    # A claim then means more or less than half of the loss, and this one has lost about half.
    monkeypatch.setattr("grpo_harness.choice.search.WOBBLE", 0.5)
    said = here(
        f"{BISECT} out/checkpoint-90 half-95 out/checkpoint-100 --problems 64 --seed 3 "
        + " ".join(GCD),
        status=1,
    )
    assert "half-95: undecided, lost " in said
    assert "UNPROVEN: the drop is after out/checkpoint-90 and at " in said


def test_without_a_drop_there_is_nothing_to_bisect(here):
    said = here(
        "bisect --good nano-base --bad nano-trained out/checkpoint-8 --problems 64 --samples 1 "
        + " ".join(GCD),
        status=2,
    )
    assert (
        "there is nothing to bisect: nano-trained is not proven to be worse than nano-base" in said
    )
    assert "it lost -" in said


def test_compare_ranks_policies_and_writes_a_report(here, run_):
    said = here(
        "compare nano-trained out/checkpoint-8 nano-base --problems 64 --samples 2 --seed 1 "
        "--report report --task gcd --task sort --device cpu"
    )
    assert said.startswith("3 policies, seed 1\n")
    rows = re.findall(r"^(gcd|sort|all) +(\S+) +(.+?) {2,}(\S+) +\d+ × 2", said, re.MULTILINE)
    relations = {(task, policy, other): relation for task, policy, relation, other in rows}
    assert len(relations) == 9
    assert relations["all", "nano-base", "nano-trained"] == "worse"
    assert relations["all", "nano-base", "out/checkpoint-8"] == "worse"
    assert relations["all", "out/checkpoint-8", "nano-trained"] in ("not told apart", "equivalent")
    assert (
        "no policy is proven best on all tasks together; not proven worse than any other: "
        "nano-trained and out/checkpoint-8"
    ) in said
    report = read(run_ / "report")
    assert len(report.checks) == 9
    assert len(report.evaluations) == 6
    assert report.run["trained"] == ["out/checkpoint-8", "nano-base"]
    verdicts = {(c["policy"], c["reference"], c["task_type"]): c["verdict"]
                for c in report.checks.values()}  # fmt: skip
    assert verdicts["nano-base", "nano-trained", "all"] == "FAIL"
    content = json.loads((run_ / "report/report.json").read_text())
    assert all(len(row["problems"]) == 64 for row in content["evaluations"])
    first, *_ = re.findall(
        '<section id="table">(.*?)</table>', (run_ / "report/report.html").read_text(), re.DOTALL
    )
    assert "<h2>Every two policies</h2>" in first
    assert len(re.findall("<tr>", first)) == 1 + 9
    shown = {(r["policy"], r["against"], r["task type"]): r for r in report.pairs().rows}
    for (task, policy, other), relation in relations.items():
        words = {"equivalent": "is ruled out"}.get(relation, relation)
        assert words in shown[policy, other, task]["found"]
    assert report.notices[0] in said
    two = here("compare nano-base nano-trained --problems 64 --samples 2 --seed 1 " + " ".join(GCD))
    assert "best on gcd: nano-trained, proven better than the other" in two


@pytest.fixture
def other_tokenizer(run_):
    """A checkpoint whose tokenizer has another word."""
    folder = run_ / "other-1"
    if not folder.exists():
        shutil.copytree(run_ / "out/checkpoint-8", folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["added_tokens"][0]["content"] = "<another>"
        file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare nano-base", "nano-base alone: name two policies or more"),
        ("compare nano-base nano-base", "nano-base alone: name two policies or more"),
        ("compare nano-base nowhere-*", "policy 'nowhere-*' matches no folder"),
        ("compare nano-base nowhere", "no policy 'nowhere'"),
        ("compare nano-base nano-trained --task poetry", "--task poetry is none of gcd, math"),
        (
            "compare nano-base nano-trained --problems 63",
            "63 problems of math are too few to judge",
        ),
        ("compare nano-base nano-trained --problems few", "--problems is 'few': it must be"),
        ("compare nano-base nano-trained --samples 0", "--samples is 0: it must be a whole number"),
        ("compare nano-trained same", "nano-trained and same have the same weights"),
        (f"{BISECT} nowhere/checkpoint-*", "candidates 'nowhere/checkpoint-*' matches no folder"),
        (f"{BISECT} nano-base", "there is no checkpoint between nano-trained and nano-base"),
        (f"{BISECT} nowhere", "no policy 'nowhere'"),
        ("bisect --good nano-base --bad nano-base out/checkpoint-8", "the same weights"),
        (f"{BISECT} out/checkpoint-* --problems 63", "63 problems of math are too few to judge"),
        (f"{BISECT} other-1", "policy 'other-1' has another tokenizer than policy"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, run_, other_tokenizer, command, message):
    if not (run_ / "same").exists():
        shutil.copytree(NANO / "trained", run_ / "same")
    assert message in here(command, status=2)


def test_candidates_are_those_between_good_and_bad_by_their_steps(tmp_path):
    for step in (5, 40, 100, 1000, 200):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "best").symlink_to("out/checkpoint-40")

    def steps(good, bad):
        found = between(PolicyName(good, tmp_path), PolicyName(bad, tmp_path), ["out/*"], tmp_path)
        return [int(name.text.rpartition("-")[2]) for name in found]

    assert steps("nano-base", "nano-trained") == [5, 40, 100, 200, 1000]
    assert steps("out/checkpoint-5", "out/checkpoint-1000") == [40, 100, 200]
    assert steps("best", "nano-base") == [100, 200, 1000]
    with pytest.raises(ChoiceError, match="among the 5 candidates"):
        steps("out/checkpoint-40", "out/checkpoint-5")


def test_policies_are_in_the_order_in_which_they_are_named_each_once(tmp_path):
    for step in (9, 10):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    named = policies(["nano-trained", "out/*", "nano-base", "out/checkpoint-9"], tmp_path)
    texts = [name.text for name in named]
    assert texts == ["nano-trained", "out/checkpoint-9", "out/checkpoint-10", "nano-base"]


def test_the_store_is_found_where_warnings_are_errors(tmp_path):
    """A plugin of pytest, such as that of anyio, may be imported by what was done before."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest]\nfilterwarnings = ["error"]\n')
    code = (
        "import anyio, anyio.pytest_plugin\n"
        "from grpo_harness.plugin.options import store_of\n"
        "print(store_of(()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith(FILE), found.stderr
