"""What the README says is so."""

import json
import re
import sys
from pathlib import Path

import pytest

import grpo_harness
import grpo_harness.training.run
from grpo_harness import rule_reward
from grpo_harness.asked import Data
from grpo_harness.cli import main
from grpo_harness.gate.bounds import Sizes
from grpo_harness.rules import RULES
from grpo_harness.settings import Table, resolve
from grpo_harness.tasks import load_task_type

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


GATE, TABLE, SERVED, DATA, GUARD = blocks("toml")
SUITE, ROMAN, REWARDS, REWARDS_SUITE, WATCH = blocks("python")
(ROW,) = blocks("json")


ALLOW_FLOOR = "\n[tool.grpo-harness.gate]\nallow_floor = true\n"
"""Untrained policies can do nothing, so there is nothing to lose."""


@pytest.fixture
def roman(tmp_path):
    path = tmp_path / "tasks" / "roman.py"
    path.parent.mkdir()
    path.write_text(ROMAN)
    return path


def test_the_task_type_is_one(roman):
    task_type = load_task_type(str(roman))
    numerals = {4: "IV", 9: "IX", 14: "XIV", 40: "XL", 99: "XCIX", 399: "CCCXCIX"}
    for n, numeral in numerals.items():
        assert task_type.answer({"type": "roman", "n": n}) == numeral
    for problem in task_type.problems(30):
        right = task_type.canonical(problem.task)
        assert rule_reward(problem.prompt, right, problem.task) > 0.9
        assert rule_reward(problem.prompt, "", problem.task) < 0


def test_a_repository_that_follows_it_goes_green(pytester, roman, save_tiny):
    """Its table, suite and task type as they stand there, with policies that are small and here."""
    save_tiny(pytester.path / "checkpoints" / "base", seed=1)
    save_tiny(pytester.path / "checkpoints" / "latest", seed=2)
    table = TABLE.replace("Qwen/Qwen2-0.5B-Instruct", "checkpoints/base")
    (pytester.path / "pyproject.toml").write_text(
        table.replace("max_new_tokens = 256", "max_new_tokens = 2") + ALLOW_FLOOR
    )
    for folder in ("our_package", "tasks"):
        (pytester.path / folder).mkdir()
    (pytester.path / "our_package" / "rewards.py").write_text(
        "from grpo_harness import reward_func as reward\n"
    )
    (pytester.path / "tasks" / "roman.py").write_text(ROMAN)
    (pytester.path / "test_policies.py").write_text(SUITE)
    pytester.syspathinsert()
    options = ("-p", "no:xdist", "-p", "no:benchmark")
    recorded = pytester.runpytest_inprocess("--grpo-record", *options)
    recorded.assert_outcomes(skipped=6, deselected=12)
    judged = pytester.runpytest_inprocess(*options)
    judged.assert_outcomes(passed=18)
    judged.stdout.fnmatch_lines(["roman *checkpoints/latest * PASS*"])


def test_data_and_rewards_that_follow_it_go_green(pytester, save_tiny):
    """The table, the row, the rewards and the tests as they stand there, with tiny policies."""
    save_tiny(pytester.path / "checkpoints" / "base", seed=1)
    save_tiny(pytester.path / "checkpoints" / "latest", seed=2)
    assert DATA.count("max_new_tokens = 256") == ROW.count("3 + 4") == ROW.count('"7"') == 1
    (pytester.path / "pyproject.toml").write_text(
        DATA.replace("max_new_tokens = 256", "max_new_tokens = 4") + ALLOW_FLOOR
    )
    for folder in ("our_package", "data"):
        (pytester.path / folder).mkdir()
    (pytester.path / "our_package" / "rewards.py").write_text(REWARDS)
    rows = [ROW.replace("3 + 4", f"{i} + 4").replace('"7"', f'"{i + 4}"') for i in range(80)]
    (pytester.path / "data" / "problems.jsonl").write_text("".join(rows))
    (pytester.path / "test_policies.py").write_text(REWARDS_SUITE)
    options = ("-p", "no:xdist", "-p", "no:benchmark")
    sys.modules.pop("our_package.rewards", None)
    sys.modules.pop("our_package", None)
    recorded = pytester.runpytest_inprocess("--grpo-record", *options)
    recorded.assert_outcomes(skipped=2, deselected=4)
    judged = pytester.runpytest_inprocess("--grpo-report=report", *options)
    judged.assert_outcomes(passed=6)
    judged.stdout.fnmatch_lines(["word-problems *checkpoints/latest * PASS*"])
    checks = json.loads((pytester.path / "report" / "report.json").read_text())["checks"]
    rewards = {"reward", "rewards.accuracy", "rewards.form", "rewards.short"}
    assert {check["rule"] for check in checks} == {"accuracy", *rewards}


def test_the_served_policies_are_those_of_the_table(tmp_path):
    (tmp_path / "pyproject.toml").write_text(SERVED)
    settings = resolve(tmp_path, tmp_path, {})
    ((name, endpoint),) = settings.served.items()
    assert (name, len(endpoint.urls), endpoint.model) == (settings.trained[0], 2, "latest")


def test_the_rewards_score_as_a_reader_expects():
    scope = {}
    exec(REWARDS, scope)  # noqa: S102 - a block of our own README
    texts = ("Well, <answer>7</answer>", "<answer>7</answer>", "<answer>8</answer>", "7")
    given = [[{"role": "assistant", "content": text}] for text in texts]
    assert scope["accuracy"](given, solution=["7"] * 4) == [1, 1, 0, 0]
    assert scope["form"](given) == [0, 1, 1, 0]
    assert scope["short"]([[0] * 192, [0] * 224, [0] * 256]) == [0, -0.5, -1]


TRAINING = """
import sys

sys.path.append({tests!r})
from trl import GRPOTrainer
from trainers import LengthTerm, build


class Added(GRPOTrainer):  # a term without a gradient: the loss alone differs
    def _compute_loss(self, model, inputs):
        lengths = inputs["completion_mask"].sum(1).float()
        return super()._compute_loss(model, inputs) + 0.01 * lengths.mean()


def build_longer(output_dir):
    return build(output_dir, Added, max_steps=2)


def build_trainer(output_dir, max_steps, length_term=0.0):
    kind = [LengthTerm] if length_term else []
    return build(output_dir, *kind, max_steps=max_steps)
"""


WATCHED_IN_A_LINE = """
from grpo_harness.contract import watch
from our_package.training import build_longer as build_trainer


def test_our_loss_differs(tmp_path):
    watch(build_trainer(tmp_path)).holds(but={"loss_equals_the_oracles": "we add a length term"})
"""


def test_a_trainer_that_is_watched_goes_green(pytester):
    (pytester.path / "our_package").mkdir()
    (pytester.path / "our_package" / "training.py").write_text(
        TRAINING.format(tests=str(ROOT / "tests"))
    )
    (pytester.path / "test_training.py").write_text(WATCH)
    (pytester.path / "test_in_a_line.py").write_text(WATCHED_IN_A_LINE)
    sys.modules.pop("our_package", None)
    pytester.syspathinsert()
    options = ("-p", "no:xdist", "-p", "no:benchmark", "-W", "ignore::FutureWarning")
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=3)


def keys(section):
    """The keys in the first column of a section's tables."""
    text = README.split(f"{section}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [key for row in rows for key in re.findall(r"`(\w+)`", row)]


FILES = {
    "our/rewards.py": "def accuracy(completions, solution, **_):\n"
    "    return [float(s in c) for c, s in zip(completions, solution)]\n"
    "def form(completions, **_):\n    return [-len(c) / 50 for c in completions]\n",
    "our/training.py": "from trl import GRPOTrainer\nclass Trainer(GRPOTrainer):\n    pass\n",
    "data/train.jsonl": "".join(
        json.dumps({"prompt": f"What is {n} + 1?", "solution": str(n + 1)}) + "\n"
        for n in range(40)
    ),
    "pyproject.toml": "[tool.grpo-harness]\n",
}
"""The files that the README's recipe names."""


@pytest.mark.heavy  # eight trainings
def test_your_training_goes_green(pytester, monkeypatch, capsys):
    """The files and the commands as they stand there, of few steps."""
    tmp_path = pytester.path
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "our"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    recipe, block = blocks("yaml")[-2:]
    (tmp_path / "train.yaml").write_text(recipe)
    (tmp_path / "own.yaml").write_text(
        re.sub("^(dataset|reward)_.*\n", "", recipe, flags=re.MULTILINE) + block
    )
    train, warm = re.findall(r"^grpo-harness (train train\.yaml .*)$", README, re.MULTILINE)
    config = "recipes --record"
    assert f"\ngrpo-harness {config}\n" in README
    record, judge, ask = re.findall(r"^grpo-harness (log .*)$", README, re.MULTILINE)
    recipes, runs = re.findall(r"^pytest (--pyargs .*\.test_\w+)$", README, re.MULTILINE)
    few = ["--steps", "6", "--device", "cpu"]
    assert main([*train.split(), *few]) == 0
    assert main([*warm.split(), "--device", "cpu"]) == 0
    assert main(["train", "own.yaml", "--out", "own", "--steps", "1", "--device", "cpu"]) == 0
    (tmp_path / "pyproject.toml").write_text(GUARD)
    assert main(config.split()) == 0
    for seed in range(1, 6):
        out = ["--out", f"runs/seed{seed}", "--set", f"seed={seed}"]
        assert main(["train", "train.yaml", *out, *few]) == 0
    capsys.readouterr()
    assert main(record.split()) == 0
    assert main(judge.split()) in (0, 1)  # by chance
    said = capsys.readouterr().out
    assert ": train against 5 recorded runs" in said
    assert "gain of reward: " in said
    assert (tmp_path / "curves.png").is_file()
    assert main([*ask.split(), "--device", "cpu"]) in (0, 1)
    assert ": checkpoints/latest against the last steps of its log" in capsys.readouterr().out
    options = ("-p", "no:xdist", "-p", "no:benchmark")
    pytester.runpytest_inprocess(*recipes.split(), *options).assert_outcomes(passed=2)
    judged = pytester.runpytest_inprocess(*runs.split(), *options).parseoutcomes()
    # By chance, and the recipe names no decisive reward.
    assert sum(judged.get(word, 0) for word in ("passed", "failed", "unproven")) == 2
    assert judged["skipped"] == 1


def test_every_setting_is_documented_and_no_other():
    assert sorted(keys("### Settings")) == sorted(Table.__struct_fields__)
    assert sorted(keys("## Your data and rewards")) == sorted(Data.__struct_fields__)


def test_every_rule_of_the_gate_is_documented():
    (row,) = re.findall(r"^\| `gate` \| `\..*$", README, re.MULTILINE)
    assert set(re.findall(r"`\.(\w+)`", row)) == set(RULES)


def test_every_option_is_documented_and_no_other(pytestconfig):
    declared = {
        option
        for group in pytestconfig._parser._groups
        if group.name == "grpo-harness"
        for entry in group.options
        for option in entry.names()
    }
    assert set(re.findall(r"--grpo-[a-z]+(?:-[a-z]+)*", README)) == declared


def test_the_maps_are_one():
    in_package = re.findall(r"^``([\w/.]+)``\s+(.*)$", grpo_harness.__doc__, re.MULTILINE)
    in_readme = re.findall(r"^  ([\w/.]+)\s{2,}(.*)$", README.split("## The map")[1], re.MULTILINE)
    assert [(name, text.replace("×", "x")) for name, text in in_package] == in_readme


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9]+)", README, re.MULTILINE)) <= targets


def test_the_table_of_the_gate_is_one(tmp_path):
    (tmp_path / "pyproject.toml").write_text(GATE)
    tasks = resolve(tmp_path, tmp_path, {}).tasks
    assert tasks["gcd"].bounds["accuracy"] == Sizes("10%", 0.01)
    assert tasks["gcd"].bounds["reward"] == Sizes(0.3, "0.02 sd")
    assert tasks["sort"].bounds["accuracy"] == Sizes(0.08, 0.01)
    assert tasks["sort"].bounds["length"] == Sizes(0.5, 0.05)
    assert tasks["sort"].allow_floor
