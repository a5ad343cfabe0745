"""A project whose policies are served: what it sets, and what its runs say and keep."""

import re
import shutil
from pathlib import Path

import pytest

import grpo_harness
from grpo_harness.engines.endpoint import KEY
from grpo_harness.policy import PolicyName
from grpo_harness.policy.policy import load
from grpo_harness.settings import SettingsError, resolve, shown
from tests.projects import run
from tests.servers import Server

ROOT = Path(__file__).parent.parent
SECRET = "sk-0123456789abcdef"
URL = "http://a:1/v1"


@pytest.fixture
def settings(tmp_path):
    def settings(table="", **options):
        (tmp_path / "pyproject.toml").write_text(f"[tool.grpo-harness]\n{table}")
        return resolve(tmp_path, tmp_path, options)

    return settings


def endpoints(settings):
    return {name.text: endpoint for name, endpoint in settings.served.items()}


def test_a_role_or_a_policy_is_served(settings):
    table = f'[tool.grpo-harness.serve]\ntrained = {{ url = ["{URL}/", "{URL}"], model = "m" }}\n'
    found = settings(table)
    assert endpoints(found).keys() == {"nano-trained"}
    endpoint = found.served[PolicyName("nano-trained", found.root)]
    assert (endpoint.urls, endpoint.model, endpoint.key, endpoint.seconds) == ([URL], "m", KEY, 600)
    assert {k: v for k, v, _ in shown(found)}["serve"] == f"nano-trained by {URL}"
    table = f'[tool.grpo-harness.serve."nano-base"]\nurl = "{URL}"\nseed = false\n'
    assert endpoints(settings(table)).keys() == {"nano-base"}
    assert endpoints(settings()) == {}


def test_an_address_of_the_command_line_keeps_the_rest_of_the_table(settings):
    table = f'serve = {{ trained = {{ url = "{URL}", model = "m", key = "OURS" }} }}\n'
    found = settings(table, serve_trained=["http://b:2/v1", "https://c/v1"], serve_base=[URL])
    assert endpoints(found)["nano-trained"].urls == ["http://b:2/v1", "https://c/v1"]
    assert endpoints(found)["nano-trained"].model == "m"
    assert endpoints(found)["nano-base"].urls == [URL]
    assert found.sources["serve"] == "command line"


def test_several_candidates_have_a_server_each(settings):
    table = 'trained = ["a/b", "c/d"]\n'
    with pytest.raises(SettingsError, match=r"trained serves one policy, and there are 2: .*'a/b'"):
        settings(f'{table}serve = {{ trained = {{ url = "{URL}" }} }}\n')
    each = f'serve = {{ "a/b" = {{ url = "{URL}" }}, "c/d" = {{ url = "http://b/v1" }} }}\n'
    assert {name: of.url for name, of in endpoints(settings(table + each)).items()} == {
        "a/b": URL,
        "c/d": "http://b/v1",
    }


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("serve = { other = { url = 'http://a/v1' } }", "has 'other', which is no role and no"),
        ("serve = { trained = 'http://a/v1' }", r"serve.trained\] is 'http://a/v1': it must be"),
        ("serve = { trained = { model = 'x' } }", r"serve.trained\] .*missing required"),
        ("serve = { trained = { url = 'a:1' } }", "url is 'a:1': it must be http://HOST:PORT/v1"),
        ("serve = { trained = { url = 'http://u:p@a/v1' } }", "no key in it"),
        ("serve = { trained = { url = [] } }", "url is .*it must be http://HOST"),
        ("serve = { trained = { url = 'http://a/v1', models = 1 } }", "did you mean model"),
        ("serve = { trained = { url = 'http://a/v1', seconds = 0 } }", "seconds is 0"),
        ("serve = { trained = { url = 'http://a/v1', key = 'sk-1' } }", "key is .*.*name of"),
    ],
)
def test_wrong_tables_are_named(settings, table, said):
    with pytest.raises(SettingsError, match=said):
        settings(f"{table}\n")


def test_a_wrong_address_of_the_command_line_is_named(settings):
    with pytest.raises(SettingsError, match=r"--grpo-serve-trained: url is .*it must be http"):
        settings(serve_trained=["localhost"])


PROJECT = """
[tool.pytest.ini_options]
addopts = "-p no:benchmark"

[tool.grpo-harness]
base = "nano-base"
trained = "nano-trained"
tasks = ["gcd"]
problems = 64
samples = 4
baselines = "{baselines}"

[tool.grpo-harness.serve]
base = {{ url = "{base}" }}
trained = {{ url = "{trained}", model = "latest" }}
"""


@pytest.fixture(scope="module")
def pair():
    """Servers of the embedded pair, that fail now and then."""

    def faults(number, body):
        return {5: "drop", 17: (500, b"oops"), 30: (429, {}, {"Retry-After": "0"})}.get(number)

    with (
        Server(load("nano-base"), faults=faults) as base,
        Server(load("nano-trained"), "latest", faults=faults) as trained,
        base.engine,
        trained.engine,
    ):
        yield base, trained


@pytest.mark.heavy
def test_a_served_pair_is_judged_by_its_recorded_baselines(pytester, pair, monkeypatch):
    base, trained = pair
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", None)
    (pytester.path / "pyproject.toml").write_text(
        PROJECT.format(baselines=ROOT / "baselines", base=base.url, trained=trained.url)
    )
    for name in ("accuracy", "policies"):
        shutil.copy(ROOT / "suites" / f"test_{name}.py", pytester.path)
    options = ["--grpo-seed=3", "--grpo-report=report", "--junitxml=junit.xml", "-l", "-rA"]
    done = run(pytester, *options, "--log-level=DEBUG")
    text, counts = done.stdout.str() + done.stderr.str(), done.parseoutcomes()
    # So few samples may leave a check unproven.
    assert counts["passed"] + counts.get("unproven", 0) == 5, text[-5000:]
    assert re.search(r"gcd +nano-trained .* (PASS|UNPROVEN)", text)
    files = [*pytester.path.glob("report/**/*"), pytester.path / "junit.xml"]
    for file in (file for file in files if file.is_file()):
        assert SECRET.encode() not in file.read_bytes()
    assert SECRET not in text
    assert {of["Authorization"] for of in trained.headers} == {f"Bearer {SECRET}"}
    asked = base.requests + trained.requests
    counts = run(pytester, *options, "test_accuracy.py").parseoutcomes()
    assert counts["passed"] + counts.get("unproven", 0) == 2
    assert base.requests + trained.requests == asked  # all of it was stored


def test_what_was_drawn_before_an_error_is_stored(pytester, monkeypatch):
    monkeypatch.setattr("grpo_harness.engines.client._PAUSE", 0.001)
    broken = [True]

    def faults(number, body):
        return (500, {"error": "out of \x1b[31mmemory"}) if broken[0] and number >= 100 else None

    with Server(load("nano-trained"), faults=faults) as server:
        (pytester.path / "pyproject.toml").write_text(
            PROJECT.format(baselines=ROOT / "baselines", base=server.url, trained=server.url)
            .replace('model = "latest"', 'model = "policy"')
            .replace("samples = 4", "samples = 2")
        )
        (pytester.path / "test_own.py").write_text(
            "def test_it(trained_policy, evaluate, all_task_types):\n"
            "    assert evaluate(trained_policy, all_task_types[0]).n == 64\n"
        )
        failed = run(pytester, "--grpo-seed=3", failed=1)
        failed.stdout.fnmatch_lines([f"{server.url}/completions answered 500: *so it was 6 times*"])
        assert "\x1b[31mmemory" not in failed.stdout.str()
        broken[0], had = False, len(server.asked)
        run(pytester, "--grpo-seed=3", passed=1)
        assert (had, len(server.asked)) == (100, 128)


def test_the_extra_is_of_the_package():
    assert grpo_harness.__file__
    assert 'server = ["httpx2' in (ROOT / "pyproject.toml").read_text()
