"""A repository that has nothing to do with us is as if we were not installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OFF = ("-p", "no:grpo_harness.plugin")

NAMES = (
    *("role", "policy", "task_type", "baseline", "sample", "gate", "evaluation", "evaluate"),
    *("engine", "base_policy", "trained_policy", "all_task_types", "grpo_session"),
    "grpo_candidate",
)
"""Every fixture of ours: a stranger may call theirs so."""

OWN_FIXTURES = "import pytest\n" + "".join(
    f"\n@pytest.fixture\ndef {name}():\n    return 'own {name}'\n" for name in NAMES
)
USES_THEM = "".join(
    f"def test_{name}({name}):\n    assert {name} == 'own {name}'\n\n" for name in NAMES
)
PARAMETRIZES = "import pytest\n" + "".join(
    f"\n@pytest.mark.parametrize('{name}', ['a', 'b'])\n"
    f"def test_{name}({name}):\n    assert {name} in 'ab'\n"
    for name in NAMES
)
GENERATES = (
    "def pytest_generate_tests(metafunc):\n"
    "    for name in metafunc.fixturenames:\n"
    "        metafunc.parametrize(name, [1, 2, 3])\n\n"
    + "".join(f"def test_{name}({name}):\n    assert {name} in (1, 2, 3)\n\n" for name in NAMES)
)
IN_A_CLASS = (
    "import pytest\n\nclass TestRoles:\n"
    "    @pytest.fixture(params=['admin', 'user'])\n"
    "    def role(self, request):\n        return request.param\n\n"
    "    @pytest.fixture\n    def policy(self, role):\n        return role + ' policy'\n\n"
    "    def test_policy(self, policy, role):\n        assert policy == role + ' policy'\n\n"
    "    @pytest.mark.parametrize('role', ['guest'], indirect=True)\n"
    "    def test_guest(self, policy):\n        assert policy == 'guest policy'\n"
)


@pytest.fixture
def stranger(pytester):
    """A repository with folders, fixtures and plugins that are called like ours."""
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\naddopts = "-p no:randomly"\n')
    for folder in ("harness", "tests/harness", "suites", "tools", "baselines"):
        (pytester.path / folder).mkdir(parents=True)
    (pytester.path / "harness" / "__init__.py").write_text("ANSWER = 42\n")
    (pytester.path / "harness" / "plugin.py").write_text(
        "def pytest_report_header():\n    return 'the plugin of a stranger'\n"
    )
    (pytester.path / "conftest.py").write_text("pytest_plugins = ['harness.plugin']\n")
    tests = pytester.path / "tests"
    (tests / "conftest.py").write_text(OWN_FIXTURES)
    (tests / "test_fixtures.py").write_text(USES_THEM)
    (tests / "test_parametrize.py").write_text(PARAMETRIZES)
    (tests / "test_generate.py").write_text(GENERATES)
    (tests / "test_class.py").write_text(IN_A_CLASS)
    (tests / "harness" / "test_own.py").write_text(
        "import harness\n\ndef test_own():\n    assert harness.ANSWER == 42\n"
    )
    (tests / "test_summary.py").write_text(
        "import warnings\n\ndef test_x():\n    warnings.warn('w')\n\n"
        "def test_f(record_property):\n    record_property('grpo-harness', 'not ours')\n"
        "    assert 0\n"
    )
    return pytester


def plain(output):
    """What a run printed, without what differs from run to run."""
    output = re.sub(r"in \d+\.\d+s", "in T", re.sub(r"0x[0-9a-f]+", "0x", output))
    return [line for line in output.splitlines() if not line.startswith("plugins: ")]


@pytest.mark.parametrize("module", [False, True], ids=["pytest", "python -m pytest"])
@pytest.mark.parametrize("arguments", [(), ("-v", "--co"), ("-rA",), ("--junitxml=x.xml",)])
def test_it_runs_as_without_us(stranger, module, arguments):
    # `pytest` by itself does not put the folder on the path, and this stranger's plugin needs it.
    stranger.makeini("[pytest]\npythonpath = .\n")
    command = [sys.executable, "-m", "pytest"] if module else ["pytest"]
    seen = [stranger.run(*command, "-p", "no:cacheprovider", *arguments, *off) for off in ((), OFF)]
    assert plain(seen[0].stdout.str()) == plain(seen[1].stdout.str())
    assert seen[0].stderr.str() == seen[1].stderr.str()
    assert seen[0].ret == seen[1].ret
    if not arguments:
        assert "1 failed" in seen[0].stdout.str()
        assert "the plugin of a stranger" in seen[0].stdout.str()


HEAVY = ("torch", "transformers", "trl", "datasets", "pandas", "numpy", "scipy", "pydantic")


def test_nothing_is_imported_beyond_the_hooks(stranger):
    # In a process of its own: this one has imported everything.
    stranger.makeconftest(
        "import sys\n\n"
        "def pytest_unconfigure():\n"
        "    ours = sorted(name for name in sys.modules if name.startswith('grpo_harness'))\n"
        f"    heavy = sorted(set(sys.modules) & set({HEAVY!r}))\n"
        "    print('IMPORTED', ours, heavy)\n"
    )
    result = stranger.runpytest_subprocess("-p", "no:hypothesispytest", "tests/test_class.py")
    (line,) = [line for line in result.outlines if line.startswith("IMPORTED")]
    ours, heavy = line.removeprefix("IMPORTED ").split("] [")
    assert heavy == "]"
    assert set(re.findall(r"'(.*?)'", ours)) <= {
        "grpo_harness",
        *(f"grpo_harness.{name}" for name in ("errors", "text", "tables", "asked", "served")),
        "grpo_harness.settings",
        *(f"grpo_harness.engines{name}" for name in ("", ".engine", ".endpoint")),
        *(f"grpo_harness.gate{name}" for name in ("", ".bounds")),
        "grpo_harness.plugin",
        *(
            f"grpo_harness.plugin.{name}"
            for name in ("options", "state", "planning", "assertions", "fixtures", "contract")
        ),
        "grpo_harness.plugin.gpus",
    }


def test_an_option_a_table_or_a_fixture_makes_a_run_ours(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    ours = "grpo-harness: nano-base and nano-trained"
    assert ours not in pytester.runpytest_subprocess().stdout.str()
    assert ours in pytester.runpytest_subprocess("--grpo-seed=1").stdout.str()
    pytester.makepyfile("def test_nothing(role): pass")
    by_fixture = pytester.runpytest_subprocess()
    assert ours in by_fixture.stdout.str()
    by_fixture.assert_outcomes(passed=2)
    pytester.makepyfile("def test_nothing(): pass")
    pytester.makepyprojecttoml("[tool.grpo-harness]")
    assert ours in pytester.runpytest_subprocess().stdout.str()


def test_a_table_of_another_tool_is_none_of_ours(pytester):
    pytester.makepyprojecttoml('[tool.other]\nuses = ["grpo-harness"]\nproblems = 0')
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    assert "grpo-harness: " not in result.stdout.str()


@pytest.mark.heavy
def test_a_stranger_with_the_wheel_installed(stranger, installed):
    for command in ([installed, "-m", "pytest"], [installed, "-P", "-m", "pytest"]):
        stranger.makeini("[pytest]\npythonpath = .\n")
        seen = [stranger.run(*command, "-p", "no:cacheprovider", *off) for off in ((), OFF)]
        assert plain(seen[0].stdout.str()) == plain(seen[1].stdout.str())
        assert "1 failed" in seen[0].stdout.str()


@pytest.mark.heavy
def test_the_suites_run_from_an_installed_wheel(pytester, installed):
    few = ("--grpo-problems=64", "--grpo-samples=2", "-p", "no:benchmark", "-k")
    run = [installed, "-m", "pytest", "--pyargs", "grpo_harness.suites", *few]
    chosen = "(accuracy or length or policies) and gcd"
    first = pytester.run(*run, chosen)
    assert first.ret == 1
    assert "there is no baseline" in first.stdout.str()
    assert pytester.run(*run, chosen, "--grpo-record").ret == 0
    recorded = sorted(str(p.relative_to(pytester.path)) for p in pytester.path.rglob("gcd.json"))
    assert recorded == ["baselines/nano-base/gcd.json", "baselines/nano-trained/gcd.json"]
    judged = pytester.run(*run, chosen, "--grpo-report=report")
    assert judged.ret == 0, judged.stdout.str()
    report = json.loads((pytester.path / "report" / "report.json").read_text())
    assert {check["rule"] for check in report["checks"]} >= {"accuracy", "length"}
    trained = pytester.run(*run, "settings_are and plain or scores and gcd")
    trained.assert_outcomes(passed=3)


@pytest.mark.heavy
def test_the_wheel_has_what_it_needs_and_nothing_of_the_tools(installed):
    code = (
        "import json, importlib.metadata as m\n"
        "files = [str(f) for f in m.distribution('grpo-harness').files]\n"
        "print(json.dumps(files))"
    )
    command = [installed, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    files = set(json.loads(printed.stdout))
    package = ROOT / "harness" / "grpo_harness"
    wanted = {
        f"grpo_harness/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    suites = {f"grpo_harness/suites/{path.name}" for path in (ROOT / "suites").glob("*.*")}
    assert wanted | suites <= files
    extra = {name for name in files - wanted - suites if "dist-info" not in name}
    assert all("__pycache__" in name or name.endswith("bin/grpo-harness") for name in extra), extra
