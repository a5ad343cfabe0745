"""What the README says is so."""

import re
from pathlib import Path

import pytest

import grpo_harness
from grpo_harness import rule_reward
from grpo_harness.tasks import load_task_type

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


(TABLE,) = blocks("toml")
SUITE, ROMAN = blocks("python")


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
        table.replace("max_new_tokens = 256", "max_new_tokens = 2")
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
