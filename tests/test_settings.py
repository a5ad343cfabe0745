from pathlib import Path

import pytest

from grpo_harness.rewards.rule import reward_func
from grpo_harness.settings import SettingsError, resolve
from grpo_harness.tasks import task_types


@pytest.fixture
def project(tmp_path):
    """Write a pyproject.toml with the given table and resolve it, with options."""

    def project(table="", below=".", **options):
        (tmp_path / "pyproject.toml").write_text(f"[tool.grpo-harness]\n{table}")
        folder = tmp_path / below
        folder.mkdir(exist_ok=True, parents=True)
        return resolve(folder, tmp_path / "elsewhere", options)

    return project


def test_nothing_set_means_the_nano_pair(project, tmp_path):
    settings = project()
    assert (settings.base, settings.trained) == ("nano-base", "nano-trained")
    assert settings.tasks == tuple(task_types())
    assert (settings.problems, settings.samples) == (256, 4)
    assert settings.baselines == tmp_path / "baselines"
    assert settings.reward is reward_func


def test_without_a_pyproject_too(tmp_path):
    assert resolve(tmp_path, tmp_path, {}).base == "nano-base"


def test_the_nearest_table_counts_and_options_override_it(project):
    table = 'base = "a/b"\nproblems = 100\nsamples = 2'
    settings = project(table, below="tests/deep", problems=64, trained="c/d")
    assert (settings.base, settings.trained) == ("a/b", "c/d")
    assert (settings.problems, settings.samples) == (64, 2)
    assert settings.baseline_of == {"base": "a/b", "trained": "nano-trained"}


def test_paths_of_the_table_are_relative_to_it_and_options_to_where_pytest_started(
    project, tmp_path
):
    (tmp_path / "ckpt").mkdir()
    settings = project('base = "ckpt"\nbaselines = "refs"', below="tests")
    assert settings.base == str(tmp_path / "ckpt")
    assert settings.baselines == tmp_path / "refs"
    settings = project('baselines = "refs"', baselines=Path("own"))
    assert settings.baselines == tmp_path / "elsewhere" / "own"


def test_own_task_types_and_reward(project, tmp_path, monkeypatch):
    (tmp_path / "double.py").write_text(OWN_TYPE)
    (tmp_path / "own_rewards.py").write_text("def lenient(prompts, completions, **_): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = project('tasks = ["gcd", "double.py"]\nreward = "own_rewards:lenient"')
    assert settings.tasks == ("gcd", "double")
    assert settings.reward.__name__ == "lenient"


def test_own_sampling(project):
    settings = project("[tool.grpo-harness.sampling]\ntemperature = 1.0\nmax_new_tokens = 512")
    assert settings.sampling.temperature == 1.0
    assert settings.sampling.max_new_tokens == 512
    assert settings.sampling.top_p == 0.9


def test_greedy_draws_one_sample(project):
    settings = project("samples = 8", greedy=True)
    assert settings.sampling.greedy
    assert settings.samples == 1


@pytest.mark.parametrize(
    ("table", "options", "says"),
    [
        ('bse = "x"', {}, "no key 'bse'"),
        ('problems = "many"', {}, "problems is 'many'"),
        ("problems = true", {}, "problems is True"),
        ("problems = 0", {}, "at least 1"),
        ("", {"samples": 0}, "at least 1"),
        ("tasks = []", {}, "nothing to ask"),
        ('tasks = ["gdc"]', {}, "no task type 'gdc'"),
        ('tasks = ["missing.py"]', {}, "missing.py"),
        ('reward = "nowhere:f"', {}, "nowhere:f"),
        ('reward = "math:pi"', {}, "not a function"),
        ('reward = "math"', {}, "module:function"),
        ("[tool.grpo-harness.sampling]\ntemperature = 0", {}, "temperature"),
        ("[tool.grpo-harness.sampling]\nheat = 1", {}, "heat"),
        ("", {"greedy": True, "samples": 4}, "--grpo-greedy"),
        ("= nonsense", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(project, table, options, says):
    with pytest.raises(SettingsError) as error:
        project(table, **options)
    assert says in str(error.value)


OWN_TYPE = """
from grpo_harness.tasks import TaskType, int_field, read_integer

class Double(TaskType):
    name = "double"

    def draw(self, rng):
        return {"x": rng.randint(1, 999)}

    def statement(self, task):
        return f"Twice {task['x']}?"

    def requirement(self, task):
        return "Only the number."

    def answer(self, task):
        return 2 * int_field(task, "x")

    def read(self, task, text):
        return read_integer(text, self.answer(task))
"""


def test_two_policies_with_one_folder_for_their_baselines_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "latest").mkdir(parents=True)
    options = {"base": str(tmp_path / "a" / "latest"), "trained": str(tmp_path / "b" / "latest")}
    with pytest.raises(SettingsError, match="one folder, 'latest'"):
        resolve(tmp_path, tmp_path, options)
    options["trained"] = str(tmp_path / "a" / ".." / "a" / "latest")
    assert resolve(tmp_path, tmp_path, options).trained == options["trained"]
