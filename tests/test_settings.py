import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import msgspec
import pytest

from grpo_harness.begun import begun
from grpo_harness.engines.engine import Sampling
from grpo_harness.gate.bounds import Sizes
from grpo_harness.rewards.rule import reward_func
from grpo_harness.settings import SettingsError, Table, resolve, shown, table_settings
from grpo_harness.tasks import task_types

AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@example.org")


@pytest.fixture
def project(tmp_path):
    """Write a pyproject.toml with the given table and resolve it, with options."""

    def project(table="", below=".", **options):
        (tmp_path / "pyproject.toml").write_text(f"[tool.grpo-harness]\n{table}")
        folder = tmp_path / below
        folder.mkdir(exist_ok=True, parents=True)
        return resolve(folder, tmp_path / "elsewhere", options)

    return project


def names(settings):
    return [name.text for name in settings.trained]


def test_nothing_set_means_the_nano_pair(project, tmp_path):
    settings = project()
    assert (settings.base.text, names(settings)) == ("nano-base", ["nano-trained"])
    assert list(settings.tasks) == list(task_types())
    assert (settings.problems, settings.samples, settings.minutes) == ("auto", 4, None)
    assert settings.baselines == tmp_path / "baselines"
    (reward,) = settings.tasks["gcd"].rewards.functions
    assert reward.function is reward_func


def test_recipes_are_a_file_or_a_list_of_files_of_different_names(project, tmp_path):
    (tmp_path / "sub").mkdir()
    for file in ("a.yaml", "b.yaml", "sub/a.yaml"):
        (tmp_path / file).touch()
    assert project('recipe = "a.yaml"').recipes == (tmp_path / "a.yaml",)
    both = project('recipe = ["a.yaml", "b.yaml"]').recipes
    assert both == (tmp_path / "a.yaml", tmp_path / "b.yaml")
    for given, said in {
        '["a.yaml", "sub/a.yaml"]': "two files called 'a': rename one",
        '["a.yaml", "a.yaml"]': "two files called 'a'",
        '["a.yaml", "gone.yaml"]': "there is no file 'gone.yaml'",
        '["sub"]': "there is no file 'sub'",
        "[]": "recipe names no file: name one, or leave it out",
        '["a.yaml", 3]': "it must be a recipe in a .yaml file, or a list of them",
        '[["a.yaml"]]': "it must be a recipe in a .yaml file, or a list of them",
        "{a = 1}": "it must be a recipe in a .yaml file, or a list of them",
        '""': "it must be a recipe in a .yaml file, or a list of them",
    }.items():
        with pytest.raises(SettingsError, match=said) as raised:
            project(f"recipe = {given}")
        assert "\n" not in str(raised.value)


def test_without_a_pyproject_too(tmp_path):
    assert resolve(tmp_path, tmp_path, {}).base.text == "nano-base"


def test_the_nearest_table_counts_and_options_override_it(project):
    table = 'base = "a/b"\nproblems = 100\nsamples = 2'
    settings = project(table, below="tests/deep", problems=64, trained="c/d")
    assert (settings.base.text, names(settings)) == ("a/b", ["c/d"])
    assert (settings.problems, settings.samples) == (64, 2)
    configured = {role: [name.text for name in of] for role, of in settings.configured.items()}
    assert configured == {"base": ["a/b"], "trained": ["nano-trained"]}


def test_paths_of_the_table_are_relative_to_it_and_options_to_where_pytest_started(
    project, tmp_path
):
    (tmp_path / "ckpt").mkdir()
    settings = project('base = "ckpt"\nbaselines = "refs"', below="tests")
    assert (settings.base.text, settings.base.folder) == ("ckpt", tmp_path / "ckpt")
    assert settings.baselines == tmp_path / "refs"
    settings = project('baselines = "refs"', baselines="own")
    assert settings.baselines == tmp_path / "elsewhere" / "own"
    assert project(base="ckpt").base.folder is None  # of where pytest was started


def test_own_task_types_and_reward(project, tmp_path, monkeypatch):
    (tmp_path / "double.py").write_text(OWN_TYPE)
    (tmp_path / "own_rewards.py").write_text("def lenient(prompts, completions, **_): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = project('tasks = ["gcd", "double.py"]\nreward = "own_rewards:lenient"')
    assert list(settings.tasks) == ["gcd", "double"]
    assert {t.rewards.functions[0].name for t in settings.tasks.values()} == {"lenient"}


def test_own_sampling(project):
    settings = project("[tool.grpo-harness.sampling]\ntemperature = 1.0\nmax_new_tokens = 512")
    assert settings.sampling.temperature == 1.0
    assert settings.sampling.max_new_tokens == 512
    assert settings.sampling.top_p == 0.9


def test_everything_about_sampling(project):
    table = 'top_k = 50\nmin_p = 0\nrepetition_penalty = 2\nstop = ["</answer>", "\\n\\n"]'
    sampling = project(f"[tool.grpo-harness.sampling]\n{table}").sampling
    assert sampling == Sampling(
        top_k=50, min_p=0.0, repetition_penalty=2.0, stop=("</answer>", "\n\n")
    )


@pytest.mark.parametrize(
    ("table", "options", "expected"),
    [
        ('problems = "auto"', {}, ("auto", None)),
        ("problems = 64", {"problems": "auto"}, ("auto", None)),
        ("minutes = 2.5", {}, ("auto", 2.5)),
        ('problems = "auto"', {"minutes": 3}, ("auto", 3)),
        ("problems = 64", {"minutes": 3}, ("auto", 3)),
        ("minutes = 3", {"problems": 64}, (64, None)),
    ],
)
def test_problems_or_minutes_say_how_much_is_drawn(project, table, options, expected):
    settings = project(table, **options)
    assert (settings.problems, settings.minutes) == expected


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
        ("problems = 0", {}, "problems is 0: it must be a number of problems"),
        ("problems = 1.0", {}, "problems is 1.0: it must be a number of problems"),
        (f"problems = {10**30}", {}, "problems is 1000"),
        ("", {"problems": "some"}, "--grpo-problems is 'some': it must be a number of problems"),
        ("minutes = 0", {}, "minutes is 0: it must be a number of minutes, above 0"),
        ('minutes = "auto"', {}, "minutes is 'auto'"),
        ("minutes = 3\nproblems = 64", {}, "minutes and problems are both set"),
        ("", {"minutes": 3, "problems": 64}, "--grpo-minutes and problems are both set"),
        ("samples = 501", {}, "1 to 500"),
        ("", {"samples": 0}, "--grpo-samples is 0"),
        ("device = 3", {}, "device is 3: it must be a text"),
        ('dtype = "int8"', {}, "auto, bfloat16, float16 or float32"),
        ('resident = "two"', {}, "auto, one or all"),
        ('sequential = "yes"', {}, "true or false"),
        ('bases = "x"', {}, "did you mean base?"),
        ("tasks = []", {}, "nothing to ask"),
        ('tasks = ["gdc"]', {}, "no task type 'gdc'"),
        ('tasks = ["missing.py"]', {}, "missing.py"),
        ('reward = "nowhere:f"', {}, "nowhere:f"),
        ('reward = "math:pi"', {}, "not a function"),
        ('reward = "math"', {}, "module:function"),
        ("[tool.grpo-harness.sampling]\ntemperature = 0", {}, "temperature"),
        ("[tool.grpo-harness.sampling]\nheat = 1", {}, "heat"),
        ('[tool.grpo-harness.sampling]\ngreedy = "no"', {}, "greedy is 'no': it must be true or"),
        ("[tool.grpo-harness.sampling]\nmax_new_tokens = 2.5", {}, "max_new_tokens is 2.5: it"),
        ('[tool.grpo-harness.sampling]\ntemperature = "hot"', {}, "temperature is 'hot': it must"),
        ("[tool.grpo-harness.sampling]\ntemperature = inf", {}, "temperature is inf: it must"),
        ("[tool.grpo-harness.sampling]\ntemperature = nan", {}, "temperature"),
        ("[tool.grpo-harness.sampling]\ntop_p = 1.5", {}, "up to 1"),
        ('[tool.grpo-harness.sampling]\ntop_k = "a"', {}, "top_k is 'a': it must be a whole"),
        ("[tool.grpo-harness.sampling]\ntop_k = 0", {}, "a whole number, 1 or more"),
        ("[tool.grpo-harness.sampling]\ntop_k = 2.5", {}, "top_k is 2.5: it must be a whole"),
        ("[tool.grpo-harness.sampling]\nmin_p = 2", {}, "min_p is 2: it must be a number, 0 to 1"),
        ("[tool.grpo-harness.sampling]\nmin_p = nan", {}, "min_p is nan: it must be a number"),
        ('[tool.grpo-harness.sampling]\nstop = ""', {}, "stop is '': it must be a list of texts"),
        ('[tool.grpo-harness.sampling]\nstop = [""]', {}, "stop is ['']: it must be a list"),
        ('[tool.grpo-harness.sampling]\nstop = ["a", 3]', {}, "stop is ['a', 3]: it must be"),
        ("[tool.grpo-harness.sampling]\nrepetition_penalty = 0", {}, "above 0; 1 is off"),
        ("[tool.grpo-harness.sampling]\nrepetition_penalty = nan", {}, "_penalty is nan: it must"),
        ("[tool.grpo-harness.sampling]\nrepetition_penalty = inf", {}, "_penalty is inf: it must"),
        ('tasks = ["gcd", "gcd"]', {}, "'gcd' twice"),
        ('tasks = ["broken.py"]', {}, "SystemExit"),
        ('tasks = ["skips.py"]', {}, "Skipped"),
        ('reward = "skipping:f"', {}, "Skipped"),
        ('reward = "sys:exit"', {}, None),
        ('baselines = "pyproject.toml"', {}, "is not a folder"),
        ('baselines = "a\\u0000b"', {}, "is not a folder"),
        ("", {"baselines": __file__}, "is not a folder"),
        ('base = ""', {}, "a text that is not empty"),
        ('trained = ""', {}, "trained is '': it must be the GRPO-trained policy"),
        ("trained = []", {}, "trained is []: it must be the GRPO-trained policy"),
        ('trained = ["a", 3]', {}, "trained is ['a', 3]: it must be the GRPO-trained policy"),
        ("trained = true", {}, "trained is True: it must be the GRPO-trained policy"),
        ("", {"trained": [""]}, "--grpo-trained is ['']"),
        ("", {"greedy": True, "samples": 4}, "--grpo-greedy"),
        ("= nonsense", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(
    project, tmp_path, monkeypatch, table, options, says
):
    if says is None:  # a function like any other: what it does shows when it is called
        (reward,) = project(table, **options).tasks["gcd"].rewards.functions
        assert reward.function is sys.exit
        return
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    for name in ("skips", "skipping"):
        (tmp_path / f"{name}.py").write_text(
            "import pytest\npytest.skip('x', allow_module_level=True)"
        )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError) as error:
        project(table, **options)
    message = str(error.value)
    assert says in message
    assert "\n" not in message
    assert (
        "pyproject.toml: [tool.grpo-harness" in message or "--grpo-" in message or "cannot" in says
    )


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
    assert names(resolve(tmp_path, tmp_path, options)) == [options["trained"]]


@pytest.fixture
def runs(tmp_path):
    """Folders that training wrote, and a file that it did not."""
    for run, steps in (("out", (100, 20, 3000)), ("runA", (300, 20)), ("runB", (300,))):
        for step in steps:
            (tmp_path / run / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "out" / "final").mkdir()
    (tmp_path / "out" / "checkpoint-5").write_text("a file")
    return tmp_path


STEPS = ["out/checkpoint-20", "out/checkpoint-100", "out/checkpoint-3000"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("out/checkpoint-*", STEPS),
        (["out/checkpoint-*"], STEPS),
        (["out/checkpoint-3000", "out/checkpoint-20"], [STEPS[0], STEPS[2]]),
        (["out/final", "out/checkpoint-*"], [*STEPS, "out/final"]),
        (["out/checkpoint-20", "out/checkpoint-??"], [STEPS[0]]),
        (["b/x", "nano-trained", "a/x"], ["b/x", "nano-trained", "a/x"]),
        ("run?/checkpoint-300", ["runA/checkpoint-300", "runB/checkpoint-300"]),
        ("run[A]/*", ["runA/checkpoint-20", "runA/checkpoint-300"]),
        ("**/checkpoint-20", ["out/checkpoint-20", "runA/checkpoint-20"]),
        ("./out/checkpoint-1*", ["out/checkpoint-100"]),
    ],
)
def test_candidates_are_in_the_order_of_their_steps(runs, given, wanted):
    (runs / "pyproject.toml").write_text(f"[tool.grpo-harness]\ntrained = {json.dumps(given)}")
    assert names(resolve(runs, runs / "out", {})) == wanted
    (runs / "pyproject.toml").unlink()
    assert names(resolve(runs, runs, {"trained": given})) == wanted
    absolute = [str(runs / text) for text in ([given] if isinstance(given, str) else given)]
    if "/" in wanted[0] and (runs / wanted[0]).exists():
        found = names(resolve(runs, runs / "out", {"trained": absolute}))
        assert found == [str(runs / text) for text in wanted]


def test_a_folder_whose_name_is_a_pattern_is_itself(runs):
    (runs / "out[1]" / "x").mkdir(parents=True)
    assert names(resolve(runs, runs, {"trained": "out[1]/x"})) == ["out[1]/x"]


@pytest.mark.parametrize("given", ["none/*", ["out/checkpoint-20", "none/*"], "out/checkpoint-5*"])
def test_a_pattern_without_a_match_is_one_line(runs, given):
    pattern = given if isinstance(given, str) else given[-1]
    with pytest.raises(SettingsError) as error:
        resolve(runs, runs / "elsewhere", {"trained": given})
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"--grpo-trained '{pattern}' matches no folder")
    assert str(runs / "elsewhere") in message
    (runs / "pyproject.toml").write_text('[tool.grpo-harness]\ntrained = "none/*"')
    with pytest.raises(SettingsError, match=r"grpo-harness\] trained 'none/\*' matches no folder"):
        resolve(runs, runs, {})
    settings = resolve(runs, runs, {"trained": "out/final"})
    assert settings.configured["trained"] == []


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("out/checkpoint-20", ["trained"]),
        ("out/checkpoint-*", ["checkpoint-20", "checkpoint-100", "checkpoint-3000"]),
        ("run*/checkpoint-300", ["runA--checkpoint-300", "runB--checkpoint-300"]),
        (["nano-base", "a/b"], ["nano-base", "a--b"]),
        (["base", "out/final"], ["base", "final"]),
    ],
)
def test_candidates_are_told_apart_in_short(runs, given, labels):
    assert resolve(runs, runs, {"trained": given}).labels() == labels


def test_candidates_are_shown(runs):
    table = {name: value for name, value, _ in shown(resolve(runs, runs, {"trained": STEPS[::-1]}))}
    assert table["trained"] == ", ".join(STEPS)


def test_two_candidates_with_one_folder_for_their_baselines_are_refused(runs):
    for name in "ab":
        (runs / name / "latest").mkdir(parents=True)
    with pytest.raises(SettingsError, match="trained 'a/latest' and trained 'b/latest' would keep"):
        resolve(runs, runs, {"trained": "[ab]/latest"})


def test_every_setting_is_shown_with_where_it_comes_from(project):
    sampling = '[tool.grpo-harness.sampling]\ntop_p = 0.5\nstop = ["\\n", "\u202e"]'
    settings = project(f"problems = 100\n{sampling}", base="a/b")
    table = {name: (value, source) for name, value, source in shown(settings)}
    assert table["base"] == ("a/b", "command line")
    assert table["problems"][0] == "100"
    assert table["problems"][1].endswith("pyproject.toml")
    assert table["samples"] == ("4", "default")
    assert table["sampling.top_p"][0] == "0.5"
    assert table["sampling.stop"][0] == r"('\n', '\u202e')"
    assert table["sampling.top_k"] == ("None", "default")
    assert table["sampling.temperature"] == ("0.8", "default")
    assert table["reward"][0] == "the rule reward"
    keys = {s.name for s in table_settings()} - {"sampling"}
    assert set(table) == keys | {f"sampling.{name}" for name in Sampling.__struct_fields__}


def test_every_setting_has_a_description():
    for setting in table_settings():
        assert setting.description
    assert {s.name for s in table_settings()} == set(Table.__struct_fields__)
    schema = msgspec.json.schema(Sampling)["$defs"]["Sampling"]["properties"]
    assert all("description" in entry for entry in schema.values())


GATE = "[tool.grpo-harness.gate]\n"


def test_bounds_are_of_the_run_a_rule_a_task_and_a_rule_of_a_task(project):
    settings = project(
        'tasks = ["gcd", "sort"]\n'
        + GATE
        + 'alpha = 0.05\nmargin = "10%"\nallow_floor = true\n'
        + "[tool.grpo-harness.gate.rules.length]\nmargin = 0.5\n"
        + "[tool.grpo-harness.gate.tasks.sort]\nmargin = 0.2\nallow_floor = false\n"
        + '[tool.grpo-harness.gate.tasks.sort.rules.reward]\nmargin = "0.3 sd"\n'
    )
    gcd, sort = settings.tasks["gcd"], settings.tasks["sort"]
    assert settings.table.gate.alpha == 0.05
    assert gcd.bounds["accuracy"] == gcd.bounds["truncation"] == Sizes("10%", 0.01)
    assert gcd.bounds["length"] == sort.bounds["length"] == Sizes(0.5, 0.05)
    assert sort.bounds["accuracy"] == sort.bounds["no_loss"] == Sizes(0.2, 0.01)
    assert sort.bounds["reward"] == Sizes("0.3 sd", "0.02 sd")
    assert "reward" not in gcd.bounds
    assert (gcd.allow_floor, sort.allow_floor) == (True, False)
    assert "improvement" not in gcd.bounds
    assert settings.bounds["total"] == gcd.bounds["total"] == sort.bounds["total"]
    assert settings.bounds["total"] == settings.bounds["no_loss"] == Sizes("10%", 0.01)
    unknown = settings.task(SimpleNamespace(name="unknown"))
    assert (unknown.bounds, unknown.allow_floor) == (settings.bounds, True)


@pytest.mark.parametrize(
    ("sizes", "recorded", "sd", "wanted"),
    [
        ((0.05, 0.01), 0.7, 0.0, (0.05, 0.01)),
        (("10%", 0.01), 0.7, 0.0, (0.07, 0.01)),
        (("10%", 0.01), 0.05, 0.0, (0.005, 0.001)),
        (("10%", "2%"), -2.0, 0.0, (0.2, 0.04)),
        (("10%", 0.0), 0.0, 0.0, (0.001, 0.0)),
        ((0.3, "0.02 sd"), 0.0, 5.0, (0.3, 0.1)),
        ((0.3, "0.02 sd"), 0.0, 20.0, (0.3, 0.06)),
        ((0.05, "50%"), 0.8, 0.0, (0.05, 0.01)),
    ],
)
def test_a_size_may_be_a_part_of_what_was_recorded(sizes, recorded, sd, wanted):
    """Whatever that was, the minimum is less than the margin: else no verdict is possible."""
    bounds = Sizes(*sizes).of(recorded, sd)
    assert (bounds.margin, bounds.minimum) == pytest.approx(wanted)


def test_a_gain_may_have_a_minimum_above_its_margin(project):
    settings = project(GATE + "[tool.grpo-harness.gate.rules.improvement]\nminimum = 0.02\n")
    assert settings.bounds["improvement"] == Sizes(0.0, 0.02)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("margn = 0.1", "no key 'margn': did you mean margin?"),
        ("margin = -0.1", "the size -0.1: it must be a number from 0 on"),
        ('margin = "much"', "the size 'much': it must be a number from 0 on, a percentage"),
        ("margin = true", "margin is True"),
        ("margin = 0.001", "minimum 0.01 and margin 0.001: the minimum must be less"),
        ("alpha = 0", "alpha is 0"),
        ("alpha = 1.5", "alpha is 1.5"),
        ("[tool.grpo-harness.gate.rules.speed]\nmargin = 1", "no rule 'speed': the rules are"),
        ("[tool.grpo-harness.gate.rules.length]\nmax = 1", "no key 'max'"),
        ("[tool.grpo-harness.gate.tasks.chess]\nmargin = 0.1", "no such task: 'chess'"),
        ("[tool.grpo-harness.gate.tasks.gcd]\nmargin = []", "margin is"),
        (
            "[tool.grpo-harness.gate.tasks.gcd]\nalpha = 0.1",
            "gate.tasks.gcd] has no key 'alpha'; it has",
        ),
        (
            "[tool.grpo-harness.gate.tasks.gcd.tasks.gcd]\nmargin = 1",
            "gate.tasks.gcd] has no key 'tasks'",
        ),
        (
            "[tool.grpo-harness.gate.tasks.gcd.rules.total]\nmargin = 0.1",
            "gate.tasks.gcd] has no rule 'total': the rules are accuracy, slices",
        ),
        ("rules = {length = 3}", "it must be a table"),
        ("margin = 1.5", "the size 1.5 for accuracy: a share of completions is less than 1"),
        ('minimum = "100%"', "the size '100%' for accuracy: a share"),
        ('margin = "0.1 sd"', "the size '0.1 sd' for accuracy: only rewards have a standard"),
        (
            "[tool.grpo-harness.gate.rules.length]\nmargin = '1 sd'",
            "'1 sd' for length: only rewards",
        ),
        ('margin = "5%"\nminimum = "10%"', "minimum 10% and margin 5%: the minimum must be less"),
    ],
)
def test_bounds_that_make_no_sense_are_one_clear_error(project, table, says):
    with pytest.raises(SettingsError) as error:
        project(GATE + table)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "tool.grpo-harness.gate" in str(error.value)


def test_a_run_tells_what_it_is_of_before_it_found_anything(project, tmp_path):
    settings = project('problems = 128\nsamples = 2\ntasks = ["sort", "gcd"]')
    about = {"baselines": "b", "seed": 7, "started": datetime(2026, 1, 2, 3, 4, 5, 678, UTC)}
    found = begun(settings, ["base", "x", "y"], **about, seconds=12.34, status="finished")
    assert found.run == {
        "base": "base", "trained": ["x", "y"], "problems": 128, "samples": 2,
        "sampling": settings.sampling.asdict(), "baselines": "b", "seed": 7,
        "started": "2026-01-02T03:04:05+00:00", "seconds": 12.3, "commit": None,
    }  # fmt: skip
    assert (found.task_types, found.policies) == (["sort", "gcd"], ["base", "x", "y"])
    assert found.status == "finished"
    assert found.environment["python"] == platform.python_version()
    assert found.settings == settings.content()
    for command in (["init", "-q"], ["add", "."], [*AUTHOR, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    head = (tmp_path / ".git" / "refs" / "heads").iterdir()
    found = begun(settings, ["base"], **about, seconds=None, status="running")
    assert (found.run["commit"], found.run["seconds"]) == (next(head).read_text().strip(), None)
