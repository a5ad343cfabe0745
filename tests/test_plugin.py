"""The plugin as a user meets it: pytest runs in projects of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from grpo_harness.baselines.file import checksum
from grpo_harness.gate.plan import Plan
from grpo_harness.plugin.summary import _in_words, _plan_table, _together
from grpo_harness.rewards.rule import rule_reward
from grpo_harness.sizing import Row
from tests.projects import OWN_SUITE, run

SUITES = Path(__file__).parent.parent / "suites"


def baselines(project):
    return {str(p.relative_to(project.path)): p for p in project.path.glob("baselines/*/*.json")}


def test_life_cycle(project):
    """First run fails, records, passes; a changed policy fails with the file untouched."""
    first = run(project, errors=2)
    first.stdout.fnmatch_lines(["*there is no baseline*--grpo-record*"])
    assert not baselines(project)

    recording = run(project, "--grpo-record", skipped=2)
    assert recording.ret == 0
    assert set(baselines(project)) == {
        "baselines/base-policy/palindrome.json",
        "baselines/trained-policy/palindrome.json",
    }
    recording.stdout.fnmatch_lines(["*baselines recorded*", "*base-policy/palindrome.json*"])
    before = {name: path.read_bytes() for name, path in baselines(project).items()}

    judged = run(project)
    assert judged.ret == 0
    judged.stdout.fnmatch_lines(["palindrome *base-policy *", "palindrome *trained-policy*"])

    path = baselines(project)["baselines/trained-policy/palindrome.json"]
    lowered = _always_right(path.read_text())
    path.write_text(lowered)
    failed = run(project, "--grpo-seed", "7", "-p", "no:randomly")
    failed.assert_outcomes(failed=1, **({"passed": 1} if "1 passed" in failed.stdout.str() else {}))
    failed.stdout.fnmatch_lines(
        [
            "FAIL: accuracy of *trained-policy on palindrome",
            "*100.0% (baseline of *trained-policy) -> *",
            "*palindrome-* -> *correct, wanted*now*",
            "*again: pytest 'test_own.py::test_accuracy?trained-palindrome?' --grpo-seed=7*",
        ]
    )
    assert path.read_text() == lowered
    assert (
        baselines(project)["baselines/base-policy/palindrome.json"].read_bytes()
        == (before["baselines/base-policy/palindrome.json"])
    )


def _always_right(text):
    content = json.loads(text)
    for record in content["problems"].values():
        record |= {"correct": record["k"], "truncated": 0, "unparsable": 0}
    content["accuracy"] = 1.0
    return json.dumps({**content, "checksum": checksum(content)})


def test_a_partial_recording_leaves_the_rest_byte_for_byte(project):
    run(project, "--grpo-record")
    before = {name: path.read_bytes() for name, path in baselines(project).items()}
    run(project, "--grpo-record", "-k", "trained", skipped=1)
    changed = {n for n, path in baselines(project).items() if path.read_bytes() != before[n]}
    assert changed == {"baselines/trained-policy/palindrome.json"}


def test_a_recording_of_selected_tests_records_by_whichever_are_left(project):
    project.makepyfile(test_own=OWN_SUITE + OWN_SUITE.replace("accuracy", "length"))
    run(project, "--grpo-record", "-k", "length and trained", skipped=1)
    assert set(baselines(project)) == {"baselines/trained-policy/palindrome.json"}


@pytest.mark.parametrize("option", ["--grpo-trained", "--grpo-report", "--grpo-baselines"])
def test_a_path_behind_a_space_does_not_move_the_project(project, tmp_path_factory, option):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    misled = run(project, option, str(elsewhere))
    assert misled.ret == pytest.ExitCode.USAGE_ERROR
    misled.stderr.fnmatch_lines([f"*for the project: write {option}={elsewhere}"])
    right = run(project, f"{option}={elsewhere}", "--co")
    right.stdout.fnmatch_lines(["*64 problems*", "*2 tests collected*"])
    # Pytest finds the project by the test that is named, or within the project.
    assert run(project, "test_own.py", option, str(elsewhere), "--co").ret == 0
    (project.path / "inside").mkdir()
    assert run(project, option, "inside", "--co").ret == 0


def test_one_test_for_each_baseline_is_enough_to_record(project):
    project.makepyfile(test_more=OWN_SUITE.replace("accuracy", "length"))
    run(project, "--grpo-record", skipped=2, deselected=2)


def test_recording_is_refused_in_ci(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    result = run(project, "--grpo-record")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*not recorded in CI*"])
    assert not baselines(project)


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text[: len(text) // 2]])
def test_a_damaged_baseline_is_an_error_and_never_a_skip(project, damage):
    run(project, "--grpo-record")
    path = baselines(project)["baselines/base-policy/palindrome.json"]
    path.write_text(damage(path.read_text()))
    result = run(project, "-k", "base-palindrome", errors=1)
    result.stdout.fnmatch_lines(["*cannot be read*--grpo-record*"])


def test_a_changed_setting_is_not_comparable(project):
    run(project, "--grpo-record")
    result = run(project, "--grpo-greedy", errors=2)
    result.stdout.fnmatch_lines(["*not comparable*greedy was False and is True*"])


def test_the_base_in_the_place_of_the_trained_policy_turns_the_run_red(project):
    shutil.copy(SUITES / "test_policies.py", project.path)
    shutil.copy(SUITES / "test_improvement.py", project.path)
    run(project, "--grpo-record")
    result = run(project, "--grpo-trained", "base-policy")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    out = result.stdout.str()
    assert re.search(r"FAILED test_policies\.py::test_trained_is_not_base", out)
    assert re.search(r"FAILED test_improvement\.py::test_trained_beats_base", out)
    result.stdout.fnmatch_lines(["*the trained policy base-policy is the base policy*"])


def test_a_new_checkpoint_is_judged_by_the_configured_ones_baseline(project, save_tiny):
    run(project, "--grpo-record")
    save_tiny(project.path / "checkpoint-500", seed=2)
    result = run(project, "--grpo-trained", "checkpoint-500", "--grpo-report", "out")
    checks = json.loads((project.path / "out" / "report.json").read_text())["checks"]
    (check,) = [check for check in checks if check["policy"] == "checkpoint-500"]
    assert check["reference"].endswith("trained-policy")
    assert result.ret == 0


@pytest.fixture
def candidates(project, save_tiny):
    """The project with a recorded pair and three checkpoints of its training."""
    for name in ("test_accuracy", "test_improvement", "test_policies"):
        shutil.copy(SUITES / f"{name}.py", project.path)
    (project.path / "test_own.py").unlink()
    run(project, "--grpo-record")
    for step in (100, 20, 3):
        save_tiny(project.path / "out" / f"checkpoint-{step}", seed=step)
    return project


def collected(project, *arguments):
    """The names of the tests of a run, without their files."""
    lines = run(project, "--co", "-q", *arguments).stdout.lines
    return [line.partition("::")[2] for line in lines if "::" in line]


LABELS = ("checkpoint-3", "checkpoint-20", "checkpoint-100")


def test_one_candidate_has_the_ids_that_a_trained_policy_has(candidates):
    one = collected(candidates, "--grpo-trained=out/checkpoint-2*")
    assert one == collected(candidates)
    assert {"test_accuracy[base-palindrome]", "test_accuracy[trained-palindrome]"} < set(one)
    assert "test_trained_beats_base" in one


@pytest.mark.parametrize(
    "given", [("out/checkpoint-*",), tuple(f"out/checkpoint-{step}" for step in (100, 3, 20))]
)
def test_every_test_runs_for_each_candidate(candidates, given):
    names = collected(candidates, *(f"--grpo-trained={text}" for text in given))
    every = [f"test_{test}" for test in ("accuracy", "logits_are_finite", "samples_are_text")]
    wanted = [f"{test}[{label}-palindrome]" for test in every for label in ("base", *LABELS)]
    wanted += [f"test_no_task_type_got_worse[{label}-palindrome]" for label in LABELS]
    wanted += [f"test_trained_beats_base[{label}]" for label in LABELS]
    wanted += [f"test_trained_is_not_base[{label}]" for label in LABELS]
    assert sorted(names) == sorted(wanted)
    order = [name for name in names if name.startswith("test_trained_beats_base")]
    assert order == [f"test_trained_beats_base[{label}]" for label in LABELS]


def test_each_candidate_has_its_rows(candidates, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = candidates.path / "pyproject.toml"
    table.write_text(
        table.read_text().replace('"trained-policy"', '["trained-policy", "out/checkpoint-*"]')
    )
    before = baselines(candidates)
    result = run(candidates, "--grpo-report=report", "--grpo-seed=3", "-k", "not beats")
    folders = [f"out/{label}" for label in LABELS]
    report = json.loads((candidates.path / "report" / "report.json").read_text())
    assert report["run"]["trained"] == [*folders, "trained-policy"]
    measured = [row["policy"] for row in report["evaluations"]]
    assert measured == ["base-policy", *folders, "trained-policy"]
    references = {c["policy"]: c["reference"] for c in report["checks"] if c["rule"] == "accuracy"}
    # None of the three has a baseline of its own.
    wanted = dict.fromkeys([*folders, "trained-policy"], "baseline of trained-policy")
    assert references == {"base-policy": "baseline of base-policy", **wanted}
    worse = [row["policy"] for row in report["checks"] if row["rule"] == "no_loss"]
    assert worse == [*folders, "trained-policy"]
    assert len(list((candidates.path / "report" / "samples").glob("*.jsonl"))) == 5
    together = "out/checkpoint-3, out/checkpoint-20, out/checkpoint-100 and trained-policy"
    assert f"- trained: {together}" in (candidates.path / "report" / "report.md").read_text()
    result.stdout.fnmatch_lines(
        [f"grpo-harness: base-policy, {together}, 64 problems*"]
        + [f"palindrome *{name} *" for name in ("base-policy", *folders)]
        + ["task type *policy *base: base-policy *trained *"]
        + [f"palindrome *{name} *" for name in folders]
    )
    assert baselines(candidates) == before
    listed = run(candidates, "--grpo-settings")
    listed.stdout.fnmatch_lines([f"trained *{', '.join([*folders, 'trained-policy'])} *"])


def test_each_candidate_is_recorded_under_its_run(candidates, save_tiny):
    for place in ("runA", "runB"):
        save_tiny(candidates.path / place / "checkpoint-300", seed=5)
    recorded = run(candidates, "--grpo-record", "--grpo-trained=run*/checkpoint-300", skipped=3)
    recorded.stdout.fnmatch_lines(["*recorded*"])
    for place in ("runA", "runB"):
        assert f"baselines/{place}--checkpoint-300/palindrome.json" in baselines(candidates)
    options = ("--grpo-trained=run*/checkpoint-300", "--grpo-report=report", "-k", "accuracy")
    run(candidates, *options)
    report = json.loads((candidates.path / "report" / "report.json").read_text())
    references = [check["reference"] for check in report["checks"]]
    assert references == [
        f"baseline of {name}"
        for name in ("base-policy", "runA/checkpoint-300", "runB/checkpoint-300")
    ]


def test_a_candidate_that_failed_is_run_again_alone(candidates):
    path = baselines(candidates)["baselines/trained-policy/palindrome.json"]
    path.write_text(_always_right(path.read_text()))
    failed = run(candidates, "--grpo-trained", "out/checkpoint-*", "-k", "accuracy")
    (again,) = {
        line.partition("again: pytest ")[2]
        for line in failed.stdout.lines
        if "again: " in line and "checkpoint-20-" in line
    }
    assert "--grpo-trained='out/checkpoint-*'" in again
    alone = run(candidates, *shlex.split(again), failed=1)
    alone.stdout.fnmatch_lines(["FAIL: accuracy of out/checkpoint-20 on palindrome"])


def test_a_candidate_that_is_the_base_is_named_and_no_other(candidates):
    shutil.copytree(candidates.path / "base-policy", candidates.path / "out" / "checkpoint-7")
    result = run(candidates, "--grpo-trained=out/checkpoint-*", "-k", "is_not_base")
    assert result.parseoutcomes().items() >= {"passed": 3, "failed": 1}.items()
    result.stdout.fnmatch_lines(["FAILED *test_trained_is_not_base?checkpoint-7? *"])


def test_a_suite_may_ask_the_trained_role_alone_or_both_at_once(candidates):
    candidates.makepyfile(
        test_more="""
        import pytest

        @pytest.mark.parametrize("role", ["trained"], indirect=True)
        def test_chosen(policy):
            pass

        def test_both(role, policy, trained_policy):
            assert (policy is trained_policy) == (role == "trained")
        """
    )
    names = collected(candidates, "test_more.py", "--grpo-trained=out/checkpoint-*")
    chosen = [f"test_chosen[trained-{label}]" for label in LABELS]
    both = [f"test_both[{role}-{label}]" for role in ("base", "trained") for label in LABELS]
    assert sorted(names) == sorted([*chosen, *both])
    run(candidates, "test_more.py", "--grpo-trained=out/checkpoint-*", passed=9)


def test_a_pattern_without_a_match_ends_the_run_before_it_starts(candidates):
    result = run(candidates, "--grpo-trained=nowhere/checkpoint-*")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --grpo-trained 'nowhere/checkpoint-*' matches no folder*"])
    assert "Traceback" not in result.stderr.str()


def test_the_plan_is_of_every_candidate(candidates):
    listed = run(candidates, "--co", "--grpo-trained=out/checkpoint-*", "-k", "test_accuracy")
    listed.stdout.fnmatch_lines(
        ["plan: 4 checks share *"]
        + [f"palindrome *{name} *" for name in ("base-policy", *(f"out/{n}" for n in LABELS))]
    )


def test_the_report(project):
    run(project, "--grpo-record")
    run(project, "--grpo-report", "out", "--grpo-seed", "11")
    report = json.loads((project.path / "out" / "report.json").read_text())
    assert report["run"]["seed"] == 11
    assert report["status"] == "finished"
    assert report["tests"] == {"passed": 2, "failed": [], "not_run": []}
    assert len(report["evaluations"]) == len(report["checks"]) == 2
    for evaluation in report["evaluations"]:
        assert (evaluation["n"], evaluation["k"]) == (64, 2)
        assert sum(evaluation["outcomes"].values()) == pytest.approx(1)
    for check in report["checks"]:
        assert {"p", "delta", "lower", "upper", "mde90", "needed", "n"} <= set(check["evidence"])
    markdown = (project.path / "out" / "report.md").read_text()
    assert markdown.count("| palindrome |") + markdown.count("| palindrome  |") >= 2
    samples = list((project.path / "out" / "samples").glob("*.jsonl"))
    assert len(samples) == 2
    rows = [json.loads(line) for path in samples for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 64 * 2
    for row in rows:
        assert rule_reward(row["prompt"], row["completion"]) == row["reward"]
        assert row["wanted"] in ("YES", "NO")


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(project):
    run(project, "--grpo-record")
    seen = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(project, "--grpo-report", folder, "--grpo-seed", seed)
        paths = (project.path / folder / "samples").glob("base-policy*.jsonl")
        seen.append([path.read_text() for path in paths])
    assert seen[0] == seen[1] != seen[2]


FEW = "--grpo-problems=64"
"""Of two samples each they neither prove a loss nor rule one out, where nothing has changed."""


def test_an_unproven_check_is_counted_and_fails_only_when_strict(skilled):
    result = skilled(0.8, FEW)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*UNPROVEN accuracy*", "*2 unproven*"])
    strict = skilled(0.8, FEW, "--grpo-strict", failed=2)
    strict.stdout.fnmatch_lines(["*UNPROVEN: accuracy of*"])


def test_junit_shows_what_is_unproven(skilled):
    skilled(0.8, FEW, "--junitxml", "out.xml")
    suite = ElementTree.parse(skilled.path / "out.xml").getroot()[0]  # noqa: S314 - it is our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "0", "0")
    for case in suite.iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        assert properties["grpo-harness.accuracy"].startswith("UNPROVEN: ")
        numbers = [float(properties[f"grpo-harness.accuracy.{of}"]) for of in ("lower", "upper")]
        assert numbers[0] < float(properties["grpo-harness.accuracy.delta"]) < numbers[1]
        assert properties["grpo-harness.accuracy.n"] == "64"
        assert case.find("system-out").text.startswith("UNPROVEN: ")


def test_an_unproven_check_is_a_skip_where_that_is_asked(skilled):
    result = skilled(0.8, FEW, "--grpo-skip-unproven", "--junitxml", "out.xml", "-rs", skipped=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["SKIPPED*UNPROVEN: *proves neither harm nor PASS*"])
    xml = (skilled.path / "out.xml").read_text()
    assert xml.count("<skipped") == 2
    both = skilled(0.8, FEW, "--grpo-skip-unproven", "--grpo-strict")
    assert both.ret == pytest.ExitCode.USAGE_ERROR


def test_collecting_loads_no_model_and_no_torch(project):
    shutil.copy(SUITES / "test_accuracy.py", project.path)
    project.makeconftest(
        """
        import sys

        def pytest_collection_finish(session):
            assert not {"torch", "transformers", "trl"} & set(sys.modules)
        """
    )
    result = project.runpytest_subprocess("--co", "-q", "-p", "no:cacheprovider")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["test_accuracy.py::test_accuracy?base-palindrome?"])


def test_markers_selection_and_junit_work_as_ever(project):
    run(project, "--grpo-record")
    project.makepyfile(
        test_marked="""
        import pytest

        @pytest.mark.parametrize("x", [1, 2])
        def test_own_parameters(task_type, x):
            assert task_type.name == "palindrome"
        """
    )
    run(project, "-k", "own_parameters and not 2", "--junitxml", "out.xml", passed=1)
    run(project, "--junitxml", "all.xml", "-x")
    xml = (project.path / "all.xml").read_text()
    assert "grpo-harness" in xml
    assert "test_accuracy[base-palindrome]" in xml


def test_own_task_types_flow_through_everything(project):
    project.makepyfile(
        own_type="""
        from grpo_harness.tasks import TaskType, read_text, str_field

        class Shout(TaskType):
            name = "shout"

            def draw(self, rng):
                return {"s": "".join(rng.choice("abcdef") for _ in range(4))}

            def statement(self, task):
                return f"Shout {task['s']}"

            def requirement(self, task):
                return "Only the word."

            def answer(self, task):
                return str_field(task, "s").upper()

            def read(self, task, text):
                return read_text(text, self.answer(task))
        """
    )
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace('"palindrome"', '"own_type.py"'))
    run(project, "--grpo-record")
    result = run(project)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["shout *base-policy*"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grpo-problems", "0"], "--grpo-problems is 0: it must be a number of problems"),
        (["--grpo-greedy", "--grpo-samples", "2"], "--grpo-greedy"),
        (["--grpo-record", "--grpo-prune"], "leave one out"),
        (["--grpo-report", "."], "is the project's own folder"),
        (["--grpo-report=.."], "is the project's own folder"),
        (["--grpo-report="], "is the project's own folder"),
    ],
)
def test_bad_options_are_usage_errors(project, arguments, says):
    result = run(project, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{says}*"])
    assert "Traceback" not in result.stderr.str()


@pytest.mark.parametrize("table", ["[tool]\ngrpo-harness = 1", "[[tool.grpo-harness]]\nbase = 1"])
def test_a_table_of_another_kind_is_a_usage_error(pytester, table):
    (pytester.path / "pyproject.toml").write_text(table)
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *grpo-harness*, not a table"])
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_too_few_problems_prove_nothing_and_are_an_error(project):
    run(project, "--grpo-record")
    result = run(project, "--grpo-problems", "32", errors=2)
    result.stdout.fnmatch_lines(["*32 problems are too few*"])


def test_more_problems_than_recorded_are_an_error(project):
    run(project, "--grpo-record")
    result = run(project, "--grpo-problems", "65", errors=2)
    result.stdout.fnmatch_lines(["*of the 65 problems asked, 1 are not among its 64*"])


def test_a_policy_that_cannot_be_had_is_one_line(project):
    result = run(project, "--grpo-base", "no-such-policy", "-k", "base-palindrome", errors=1)
    result.stdout.fnmatch_lines(["*no policy 'no-such-policy': *"])
    assert "Traceback" not in result.stdout.str()


def test_workers_share_the_run(project):
    pytest.importorskip("xdist")
    run(project, "--grpo-record")
    project.makepyfile(
        test_more="""
        def test_length(evaluation, baseline, gate):
            gate.length(evaluation, baseline)
        """
    )
    result = project.runpytest_subprocess(
        "-n", "2", "--grpo-report", "out", "--grpo-seed", "5", "-p", "no:benchmark"
    )
    assert result.ret == 0
    report = json.loads((project.path / "out" / "report.json").read_text())
    assert len(report["evaluations"]) == 2
    assert len(report["checks"]) == 4
    # Whichever worker came first drew them; the other found them drawn.
    paths = (project.path / "out" / "samples").glob("*.jsonl")
    assert [len(path.read_text().splitlines()) for path in paths] == [128, 128]


def test_the_training_suite_has_one_worker(pytester):
    pytest.importorskip("xdist")
    pytester.makepyprojecttoml("[tool.grpo-harness]")
    pytester.makepyfile(
        test_training="""
        import os
        import pytest

        @pytest.mark.parametrize("i", range(8))
        def test_together(i, record_property):
            record_property("worker", os.environ["PYTEST_XDIST_WORKER"])
        """,
        test_other="def test_elsewhere(): pass",
    )
    result = pytester.runpytest_subprocess("-n", "2", "-p", "no:benchmark", "--junitxml", "out.xml")
    result.assert_outcomes(passed=9)
    workers = re.findall(r'name="worker" value="(\w+)"', (pytester.path / "out.xml").read_text())
    assert len(workers) == 8
    assert len(set(workers)) == 1


def test_model_text_cannot_command_a_terminal_or_a_ci_system(project):
    run(project, "--grpo-record")
    path = baselines(project)["baselines/base-policy/palindrome.json"]
    path.write_text(_always_right(path.read_text()))
    project.makeconftest(
        r"""
        import pytest
        from grpo_harness.engines.engine import Sample
        from grpo_harness.engines.transformers import TransformersEngine

        @pytest.fixture(autouse=True)
        def evil(monkeypatch):
            def sample(self, requests, progress=None):
                text = "\x1b[2J\n::error::pwned\n##[error]\u202eNO"
                return [Sample(text, 4, truncated=False) for _ in requests]
            monkeypatch.setattr(TransformersEngine, "sample", sample)
        """
    )
    result = run(project, "-k", "base-palindrome", "--grpo-report", "out", "-rA")
    result.assert_outcomes(failed=1)
    report = project.path / "out"
    for shown in (
        result.stdout.str(),
        *((report / f"report.{e}").read_text() for e in ("md", "json", "html")),
        *(path.read_text() for path in (report / "samples").iterdir()),
    ):
        assert "\x1b[2J" not in shown
        assert "\n::" not in shown
        assert "##[error]" not in shown
        assert "\u202e" not in shown


def test_the_job_summary_of_a_ci_system_gets_the_tables(project, monkeypatch):
    run(project, "--grpo-record")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "summary.md"))
    run(project)
    assert "| palindrome" in (project.path / "summary.md").read_text()


def test_outside_of_its_suites_the_plugin_is_silent(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("-p", "no:xdist")
    result.assert_outcomes(passed=1)
    assert "== grpo-harness ==" not in result.stdout.str()
    assert os.environ.get("CI") is None


@pytest.fixture
def skilled(project):
    """The project with an engine that answers right at just the rate that a file says.

    The file is no code, so two runs at different rates differ as two runs differ by chance: which
    of the answers are right is the seed's, and how many is not. Recorded is a rate of 0.8; at it a
    run passes whatever its seed, at 0.6 it fails.
    """
    project.makeconftest(
        """
        from pathlib import Path

        import pytest

        from grpo_harness.engines.engine import Sample
        from grpo_harness.engines.transformers import TransformersEngine
        from grpo_harness.tasks import task_types

        PALINDROME = task_types()["palindrome"]

        @pytest.fixture(autouse=True)
        def skilled(monkeypatch):
            skill = float(Path("skill.txt").read_text())

            def sample(self, requests, progress=None):
                right = {
                    self.policy.render(problem.prompt): PALINDROME.canonical(problem.task)
                    for problem in PALINDROME.problems(256)
                }
                lucky = set(sorted(r.seed for r in requests)[: round(skill * len(requests))])
                return [
                    Sample(right[r.prompt] if r.seed in lucky else "?", 3, False)
                    for r in requests
                ]

            monkeypatch.setattr(TransformersEngine, "sample", sample)
        """
    )
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace("problems = 64", "problems = 256"))

    def skilled(rate, *arguments, **outcomes):
        (project.path / "skill.txt").write_text(str(rate))
        return run(project, *arguments, **outcomes)

    skilled(0.8, "--grpo-record", skipped=2)
    skilled.path = project.path
    return skilled


def judged(skilled, rule="accuracy", policy="base-policy"):
    report = json.loads((skilled.path / "out" / "report.json").read_text())
    (check,) = [
        check for check in report["checks"] if check["rule"] == rule and check["policy"] == policy
    ]
    return check


def test_a_rerun_pools_instead_of_drawing_again_until_green(skilled):
    only = ("-k", "base-palindrome", "--grpo-report", "out")
    skilled(0.6, *only, "--grpo-seed", "1", failed=1)
    # By itself the second run would pass; with the first it proves the drop that is there.
    rerun = skilled(0.8, *only, "--grpo-seed", "2", failed=1)
    rerun.stdout.fnmatch_lines(["*pooled with the samples of 1 earlier run*"])
    assert judged(skilled)["evidence"]["k"] == 4
    # The seed of a run that was judged gives the verdict that it was given.
    skilled(0.6, *only, "--grpo-seed", "1", failed=1)
    assert judged(skilled)["evidence"]["k"] == 2


def test_what_is_run_again_alone_shares_its_risk_as_it_did(skilled):
    failed = skilled(0.6, "--grpo-seed=1", "--grpo-strict", "--grpo-report=out", failed=2)
    (again,) = {
        line.partition("again: pytest ")[2]
        for line in failed.stdout.lines
        if "again: " in line and "base-palindrome" in line
    }
    test, *options = shlex.split(again)
    assert options == ["--grpo-seed=1", "--grpo-strict"]
    among_two = judged(skilled)
    skilled(0.6, test, *options, "--grpo-report=out", failed=1)
    assert judged(skilled) == among_two
    # Where nothing remembers the run, the one test has the whole risk, and sees more.
    skilled(0.6, test, *options, "--grpo-report=out", "-p", "no:cacheprovider", failed=1)
    assert judged(skilled)["evidence"]["mde90"] < among_two["evidence"]["mde90"]


def test_many_reruns_are_pooled_with_the_last_seven(skilled):
    only = ("-k", "base-palindrome", "--grpo-report=out")
    for _ in range(9):
        skilled(0.6, *only, failed=1)
    assert judged(skilled)["evidence"]["k"] == 16
    assert "of the last 7 of 8 earlier runs" in judged(skilled)["reason"]


def test_without_pytests_cache_every_run_is_the_first(skilled):
    only = ("-k", "base-palindrome", "--grpo-report", "out", "-p", "no:cacheprovider")
    skilled(0.6, *only, failed=1)
    skilled(0.8, *only, passed=1)
    assert judged(skilled)["evidence"]["k"] == 2


def test_a_pass_ends_the_series_and_so_does_other_code(skilled):
    only = ("-k", "base-palindrome", "--grpo-report", "out")
    skilled(0.8, *only, passed=1)
    skilled(0.6, *only, failed=1)
    assert judged(skilled)["evidence"]["k"] == 2
    conftest = skilled.path / "conftest.py"
    conftest.write_text(conftest.read_text() + "\n# mended\n")
    skilled(0.8, *only, passed=1)
    assert judged(skilled)["evidence"]["k"] == 2


def test_a_sequential_run_stops_at_a_decision_and_says_where(skilled):
    sequential = ("--grpo-sequential", "--grpo-samples=8", "--grpo-report=out")
    steady = skilled(0.8, *sequential, passed=2)
    steady.stdout.fnmatch_lines(["palindrome *base-policy *PASS"])
    report = json.loads((skilled.path / "out" / "report.json").read_text())
    for evaluation in report["evaluations"]:
        assert 64 <= evaluation["n"] < 256
        assert evaluation["planned"] == 256
    skilled(0.4, *sequential, failed=2)
    assert judged(skilled)["evidence"]["n"] <= 64


def test_what_judges_several_is_left_out_where_there_is_one(project):
    """A skip then means something; the one reward and the one task have tests of their own."""
    for name in ("test_accuracy", "test_rewards"):
        shutil.copy(SUITES / f"{name}.py", project.path)
    names = {
        name.partition("[")[0] for name in collected(project, "test_accuracy.py", "test_rewards.py")
    }
    assert names == {"test_accuracy", "test_reward"}
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace('["palindrome"]', '["palindrome", "sort"]'))
    assert "test_accuracy_of_all_tasks[base]" in collected(project, "test_accuracy.py")


def test_several_tasks_together_are_judged_by_the_bounds_of_the_run(project):
    """Nobody answers right, so a margin of 5 points is ruled out, and one of 1.2 points is not."""
    project.makeconftest(
        """
        import pytest

        from grpo_harness.engines.engine import Sample
        from grpo_harness.engines.transformers import TransformersEngine

        @pytest.fixture(autouse=True)
        def silent(monkeypatch):
            def sample(self, requests, progress=None):
                return [Sample("?", 3, False) for _ in requests]
            monkeypatch.setattr(TransformersEngine, "sample", sample)
        """
    )
    project.makepyfile(
        test_own="""
        import pytest

        @pytest.mark.grpo("total")
        def test_total(evaluations, baselines, gate):
            gate.total(evaluations, baselines)

        @pytest.mark.grpo("no_loss")
        def test_no_loss(base_policy, trained_policy, all_task_types, evaluate, gate):
            policies = (trained_policy, base_policy)
            gate.no_loss(*[[evaluate(p, t) for t in all_task_types] for p in policies])

        def test_accuracy(evaluation, baseline, gate):
            gate.accuracy(evaluation, baseline)
        """
    )
    table = project.path / "pyproject.toml"
    text = table.read_text().replace('["palindrome"]', '["palindrome", "sort"]')
    narrow = "allow_floor = true\nmargin = 0.012\nminimum = 0.001\n"
    for task in ("palindrome", "sort"):
        narrow += f"[tool.grpo-harness.gate.tasks.{task}]\nmargin = 0.2\nminimum = 0.01\n"
    for gate, verdict in (("allow_floor = true", "PASS"), (narrow, "UNPROVEN")):
        table.write_text(text.replace("allow_floor = true", gate))
        shutil.rmtree(project.path / "baselines", ignore_errors=True)
        run(project, "--grpo-record", "-k", "test_accuracy", skipped=4)
        assert run(project, "--grpo-report=out").ret == 0
        found = json.loads((project.path / "out" / "report.json").read_text())["checks"]
        assert {(c["rule"], c["verdict"]) for c in found} == {
            *(("total", verdict), ("no_loss", verdict), ("accuracy", "PASS"))
        }


def test_the_same_test_is_a_rerun_of_itself_whichever_others_are_named(skilled):
    other = skilled.path / "other"
    other.mkdir()
    (other / "conftest.py").write_text("")
    (other / "test_other.py").write_text("def test_other(): pass")
    skilled(0.6, "-k", "base-palindrome", failed=1)
    skilled(0.6, "test_own.py", "-k", "base-palindrome", "--grpo-report", "out", failed=1)
    assert judged(skilled)["evidence"]["k"] == 4


def test_a_second_rule_in_one_test_is_declared_or_an_error(skilled):
    test = skilled.path / "test_own.py"
    body = """
def test_both(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)
    gate.length(evaluation, baseline)
"""
    test.write_text(body)
    undeclared = skilled(0.8, failed=2)
    undeclared.stdout.fnmatch_lines(
        ['ERROR: *asks the gate for length, which it does not declare*mark.grpo("accuracy", *']
    )
    test.write_text(f'import pytest\n\n@pytest.mark.grpo("accuracy", "length"){body}')
    declared = skilled(0.8, "--grpo-report", "out", passed=2)
    declared.stdout.fnmatch_lines(["plan: 4 checks share *"])
    # As much of the risk as two tests would have had.
    both = [judged(skilled, rule)["evidence"]["mde90"] for rule in ("accuracy", "length")]
    test.write_text(
        "import pytest\n"
        + "".join(
            f'\n@pytest.mark.grpo("{rule}")\ndef test_{rule}(evaluation, baseline, gate):\n'
            f"    gate.{rule}(evaluation, baseline)\n"
            for rule in ("accuracy", "length")
        )
    )
    seed = (
        f"--grpo-seed={json.loads((skilled.path / 'out/report.json').read_text())['run']['seed']}"
    )
    skilled(0.8, "--grpo-report", "out", seed, passed=4)
    assert both == [judged(skilled, rule)["evidence"]["mde90"] for rule in ("accuracy", "length")]


@pytest.mark.parametrize(
    ("mark", "body", "says"),
    [
        ('"accuracy"', "gate.length(evaluation, baseline)", "asks the gate for length"),
        ('"accuracy"', "gate.accuracy(evaluation, baseline)\n" * 2, "accuracy*a second time"),
        ('"speed"', "pass", "names 'speed', and the gate's rules are accuracy, total"),
        ('"length"', "gate.speed(evaluation)", "the gate has no rule 'speed': it has accuracy"),
    ],
)
def test_what_is_declared_is_what_is_asked(skilled, mark, body, says):
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (skilled.path / "test_own.py").write_text(
        f"import pytest\n\n@pytest.mark.grpo({mark})\n"
        f"def test_it(evaluation, baseline, gate):\n{lines}"
    )
    result = skilled(0.8)
    assert result.ret != 0
    fnmatch = result.stderr if "names" in says else result.stdout
    fnmatch.fnmatch_lines([f"*{says}*"])


def test_a_suite_may_ask_one_role_alone(skilled):
    skilled.path.joinpath("test_own.py").write_text(
        """
import pytest

@pytest.mark.parametrize("role", ["trained"], indirect=True)
def test_accuracy(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)
"""
    )
    skilled(0.8, passed=1)


def test_a_policy_of_the_suites_own_can_be_judged_again(skilled):
    skilled.path.joinpath("test_own.py").write_text(
        """
from grpo_harness.policy import load

def test_compare(base_policy, task_type, evaluate, gate):
    other = load("trained-policy")
    gate.no_loss([evaluate(other, task_type)], [evaluate(base_policy, task_type)])
"""
    )
    for _ in range(2):
        assert skilled(0.8).ret == 0


def test_more_problems_than_a_type_has_is_no_crash(project):
    project.makepyfile(
        few="""
        from grpo_harness.tasks import TaskType, read_text

        class Few(TaskType):
            name = "few"

            def draw(self, rng):
                return {"n": rng.randint(1, 999)}

            def statement(self, task):
                return f"What comes before {task['n'] + 1}?"

            def requirement(self, task):
                return "Answer with the number alone."

            def answer(self, task):
                return str(task["n"])

            def read(self, task, text):
                return read_text(text, self.answer(task))
        """
    )
    toml = project.path / "pyproject.toml"
    toml.write_text(toml.read_text().replace('["palindrome"]', '["few.py"]'))
    run(project, "--grpo-record")
    result = run(project, "--grpo-problems", "1000", "--co")
    assert result.ret == 0
    assert run(project, "--grpo-problems", "1000", errors=2).ret == 1


def test_a_lower_accuracy_is_recorded_only_with_a_reason(skilled):
    before = {path: path.read_bytes() for path in skilled.path.glob("baselines/*/*.json")}
    refused = skilled(0.5, "--grpo-record", errors=2)
    refused.stdout.fnmatch_lines(["*nothing is recorded*--grpo-accept-regression*"])
    assert all(path.read_bytes() == content for path, content in before.items())
    why = "palindromes are no longer our business"
    accepted = skilled(0.5, "--grpo-record", "--grpo-accept-regression", why, skipped=2)
    accepted.stdout.fnmatch_lines(["*: accepted, and the anchor moves down*"])
    for path in before:
        assert json.loads(path.read_text())["reason"] == why
    assert skilled(0.5).ret == 0


@pytest.mark.parametrize("arguments", [["why"], ["  ", "--grpo-record"]])
def test_a_reason_belongs_to_a_recording_and_says_something(project, arguments):
    result = run(project, "--grpo-accept-regression", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--grpo-accept-regression says why*"])


def test_stale_recordings_are_reported_and_pruned_by_a_run_of_its_own(project, monkeypatch):
    run(project, "--grpo-record")
    gone = project.path / "baselines" / "gone-policy"
    shutil.copytree(project.path / "baselines" / "base-policy", gone)
    result = run(project, passed=2)
    result.stdout.fnmatch_lines(["stale: *gone-policy/palindrome.json: *--grpo-prune deletes it"])
    kept = {name: path.read_bytes() for name, path in baselines(project).items()}
    monkeypatch.setenv("CI", "true")
    assert run(project, "--grpo-prune").ret == pytest.ExitCode.USAGE_ERROR
    assert gone.is_dir()
    monkeypatch.delenv("CI")
    untracked = run(project, "--grpo-prune")
    untracked.stderr.fnmatch_lines(["*git could not restore*"])
    for command in (
        ["init", "-q"],
        ["add", "baselines"],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "b"],
    ):
        subprocess.run(["git", *command], check=True, cwd=project.path)
    pruned = run(project, "--grpo-prune")
    assert pruned.ret == 0
    pruned.stdout.fnmatch_lines(["pruned *gone-policy/palindrome.json*", "1 stale entries*"])
    del kept["baselines/gone-policy/palindrome.json"]
    assert {name: path.read_bytes() for name, path in baselines(project).items()} == kept


def test_the_plan_is_shown_before_anything_is_drawn(skilled):
    listed = skilled(0.8, "--co", "-q")
    listed.stdout.fnmatch_lines(
        [
            "plan: 2 checks share *",
            "task type *n × k*caught (points lower)*",
            "palindrome *base-policy *",
            "palindrome *trained-policy *",
        ]
    )
    judged = skilled(0.8)
    judged.stdout.fnmatch_lines(["plan: 2 checks share *(check by check: --co)"])


def test_the_plan_is_of_the_checks_that_are_asked(skilled):
    test = skilled.path / "test_own.py"
    test.write_text(
        f"import pytest\n\n@pytest.mark.grpo('accuracy'){OWN_SUITE}"
        + f"\n@pytest.mark.grpo('length'){OWN_SUITE.replace('accuracy', 'length')}"
    )
    both = skilled(0.8, "--co").stdout
    both.fnmatch_lines(["plan: 4 checks share *nine times in ten*", "palindrome *base-policy*"])
    length = skilled(0.8, "--co", "-k", "length").stdout
    length.fnmatch_lines(["plan: 2 checks share a false-alarm risk of 1 %"])
    length.no_fnmatch_line("palindrome *base-policy*")


@pytest.mark.parametrize(
    ("problems", "why"),
    [(63, "fewer than 64 problems"), (257, "problems that were not recorded (of 256 that were)")],
)
def test_the_plan_says_what_will_be_an_error(skilled, problems, why):
    listed = skilled(0.8, "--co", f"--grpo-problems={problems}").stdout
    listed.fnmatch_lines(
        [f"plan: *all 2 accuracy checks will be an ERROR, and draw nothing: {why}", "*ERROR: *"]
    )
    shutil.rmtree(skilled.path / "baselines" / "base-policy")
    skilled(0.8, "--co").stdout.fnmatch_lines(["plan: *1 of 2 accuracy *: no baseline"])


def test_auto_problems_are_as_many_as_the_plan_says(skilled):
    """On a project of its own: recorded are all problems there are, and asked as planned."""
    listed = skilled(0.8, "--co", "--grpo-problems=auto").stdout
    listed.fnmatch_lines(["plan: *completions, *"])
    rows = [line.split() for line in listed.lines if line.startswith("palindrome")]
    sizes = {row[1]: (int(row[2]), int(row[4])) for row in rows}
    found = skilled(0.8, "--grpo-problems=auto", "--grpo-seed=1", "--grpo-report=out", passed=2)
    found.stdout.fnmatch_lines(["grpo-harness: *, auto problems × 2 samples, seed 1"])
    report = json.loads((skilled.path / "out" / "report.json").read_text())
    assert {of["policy"]: (of["n"], of["k"]) for of in report["evaluations"]} == sizes
    assert all(64 <= n <= 256 and 2 <= k <= 8 for n, k in sizes.values())
    # One test alone asks the same.
    skilled(
        0.8, "-k", "base", "--grpo-problems=auto", "--grpo-seed=2", "--grpo-report=out", passed=1
    )
    report = json.loads((skilled.path / "out" / "report.json").read_text())
    (alone,) = report["evaluations"]
    assert (alone["n"], alone["k"]) == sizes["base-policy"]


def test_minutes_are_planned_or_refused_before_anything_is_drawn(skilled):
    told = skilled(0.8, "--grpo-minutes=1", "--grpo-problems=64")
    told.stderr.fnmatch_lines(["*--grpo-minutes and problems are both set*"])
    planned = skilled(0.8, "--co", "--grpo-minutes=0.01").stdout
    planned.fnmatch_lines(["*as much as 0.01 minutes allow*", "plan: *completions, about * s"])


def test_the_plan_of_a_row_is_in_points_and_seconds():
    name, task = SimpleNamespace(text="p"), SimpleNamespace(source=SimpleNamespace(name="gcd"))
    plans = [
        (name, Row(task, speed=10.0), Plan(256, 4, 0.8, mde90=0.08, margin=0.05, needed=631)),
        (name, Row(task), Plan(64, 2, 0.05, mde90=0.07, margin=0.1, needed=None)),
        (name, Row(task, speed=5.0), "no baseline"),
    ]
    cells = [re.split(" {2,}", line.strip()) for line in _plan_table(plans, 200)[2:]]
    assert cells == [
        ["gcd", "p", "256 × 4", "80.0%", "8.0, not 5.0", "631", "102.4"],
        ["gcd", "p", "64 × 2", "5.0%", "not even a drop to 0", "no number", "unknown"],
        ["gcd", "p", "ERROR: no baseline"],
    ]
    assert _together([plans[0], plans[2], plans[0]]) == pytest.approx(204.8)
    assert _together(plans) is None, "it is not known how long one of them takes"
    words = {None: "time unknown", 99.4: "about 99 s", 102.4: "about 2 min", 600: "about 10 min"}
    assert {seconds: _in_words(seconds) for seconds in words} == words
