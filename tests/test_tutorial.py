"""The tutorial's own pair, word for word as the README says it, on an untrained stand-in.

Everything is real but the weights: ModelScope's folders on disk, the tutorial's recipe, TRL's
trainer, the checkpoint it leaves, and pytest judging the two.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from grpo_harness.cli import main

ROOT = Path(__file__).parent.parent
QWEN = "qwen/Qwen2-0.5B-Instruct"


@pytest.fixture
def project(pytester, save_tiny, monkeypatch):
    """A project without settings, and the tutorial's model in ModelScope's cache."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(pytester.path / "cache"))
    save_tiny(pytester.path / "cache" / "models" / "qwen" / "Qwen2-0___5B-Instruct", seed=3)
    # An untrained policy hardly ever ends an answer by itself.
    pytester.makepyprojecttoml(
        "[tool.grpo-harness.sampling]\nmax_new_tokens = 4\n"
        "[tool.grpo-harness.gate]\nallow_floor = true\n"
    )
    for name in ("test_policies.py", "test_accuracy.py"):
        shutil.copy(ROOT / "suites" / name, pytester.path)
    return pytester


def test_train_then_record_then_judge(project, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (train,) = re.findall(r"^grpo-harness (train tutorial .*)$", readme, re.MULTILINE)
    assert main([*train.split(), "--device", "cpu"]) == 0
    assert "30 steps" in capsys.readouterr().out
    recipe = json.loads(Path("checkpoints/tutorial/recipe.json").read_text())
    assert recipe["base"]["name"] == QWEN
    assert recipe["config"]["num_generations"] == 2

    command = rf"^pytest suites/ (--grpo-base {QWEN} [^\\]*)\\\n +(.*)$"
    _, judge = re.findall(command, readme, re.MULTILINE)
    arguments = " ".join(judge).split()
    few = ("--grpo-problems", "64", "-k", "palindrome", "-p", "no:xdist", "-p", "no:benchmark")
    project.runpytest_inprocess(*arguments, "--grpo-record", *few).assert_outcomes(
        skipped=2, deselected=14 + 35
    )
    result = project.runpytest_inprocess(*arguments, *few)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"palindrome *{QWEN}*", "palindrome *checkpoints/tutorial*"])
    recorded = Path("baselines-qwen")
    assert {path.name for path in recorded.iterdir()} == {"qwen--Qwen2-0.5B-Instruct", "tutorial"}
