"""The report is the run's own, whole, however it ended, and harmless whatever it holds."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.baselines.examples import Example, Examples, Scoring, examples_of
from grpo_harness.baselines.file import SPEED, Baseline, Header, Record, prompt_digest
from grpo_harness.report.files import (
    ReportError,
    append_summary,
    begin,
    problems_of,
    samples_of,
    write,
)
from grpo_harness.report.files import read as read_report
from grpo_harness.report.problems import problems, recorded
from grpo_harness.report.report import Report
from grpo_harness.report.tables import Table
from grpo_harness.text import digest
from tests.projects import run

HOSTILE = (
    "![x](http://evil.example/x.png)",
    "<b>bold</b><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "www.evil.example",
    "a|b|c",
    "`code` *em* _em_ ~~no~~ # head",
    "\x1b[31mred\x1b[0m",
    "::error::pwned",
    "line\n::error::pwned",
    "##[error]pwned",
    "\u202egnorw",
)


RUN = {
    "base": "b",
    "trained": ["p"],
    "problems": 256,
    "samples": 4,
    "sampling": {},
    "baselines": "baselines",
    "seed": 1,
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "commit": None,
}


def evidence(**changes):
    return {
        "verdict": "PASS",
        "reason": "x",
        "n": 256,
        "k": 4,
        "now": 0.7,
        "then": 0.71,
        "delta": -0.01,
        "lower": -0.03,
        "upper": 0.01,
        "p": 0.2,
        "mde90": 0.05,
        "needed": 200,
        "margin": 0.05,
        "minimum": 0.01,
        **changes,
    }


def rows(policy="p", task="gcd", verdict="PASS", reason="x"):
    return [
        {
            "kind": "evaluation",
            "policy": policy,
            "slug": "p",
            "fingerprint": "f",
            "task_type": task,
            "n": 256,
            "planned": 256,
            "k": 4,
            "run_seed": 1,
            "engine": {},
            "metrics": {},
            "slices": [],
            "sampling": {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 64},
            "accuracy": 0.7,
            "strict_accuracy": 0.6,
            "mean_reward": 0.5,
            "mean_length": 12.3,
            "outcomes": {"correct": 0.7, "truncated": 0.0},
        },
        {
            "kind": "check",
            "rule": "accuracy",
            "title": "accuracy",
            "policy": policy,
            "task_type": task,
            "reference": f"baseline of {policy}",
            "against": "baseline",
            "verdict": verdict,
            "reason": reason,
            "unit": "%",
            "changed": [],
            "evidence": evidence(verdict=verdict),
        },
    ]


def report(**names):
    base = names.get("policy", "p")
    found = Report({**RUN, "base": base}, ["gcd"], ["p"], "finished")
    for row in rows(**names):
        found.add(row)
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_and_no_reason_is_more_than_text(text):
    found = report(policy=text, task=text, verdict="FAIL", reason=text)
    found.failed[text] = text
    found.notices.append(text)
    markdown, terminal = found.markdown(), "\n".join(found.terminal(80))
    for shown in (markdown, terminal):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert not re.search(r"^\s*(- |\| )?::", shown, re.MULTILINE)
        assert "##[" not in shown
    for mark in ("![", "](", "<b>", "<img", "`code`", "www.evil"):
        assert mark not in markdown
    columns = {line.count("|") for line in markdown.splitlines() if line.startswith("| gcd")}
    assert len(columns) <= 1


@given(
    st.lists(st.text(st.characters(), max_size=40), min_size=1, max_size=4), st.integers(80, 200)
)
def test_a_table_fits_its_width(names, width):
    found = Report({}, [], [], "finished")
    for name in names:
        for row in rows(policy=name * 2, task="py_eval", reason="x" * 300):
            found.add(row)
    for line in found.measured().terminal(width):
        assert len(line) <= width, line


def test_what_has_no_room_is_named_and_what_matters_stays():
    lines = report(policy="a-policy-with-a-name-of-some-length").measured().terminal(80)
    assert "verdict" in lines[0]
    assert "now" in lines[0]
    assert "(80 columns have no room for: " in " ".join(lines)
    wide = report().measured().terminal(300)
    assert "truncated" in wide[0]
    assert not any("no room" in line for line in wide)


def test_a_terminal_that_can_has_the_same_table_with_coloured_verdicts():
    found = report(verdict="FAIL", reason="[bold]why[/bold]")
    for width in (80, 300):
        plain, styled = (found.measured().terminal(width, styled=s) for s in (False, True))
        bare = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in styled]
        words = [line.split() for line in bare if "─" not in line]
        assert words == [line.split() for line in plain if "---" not in line]
        assert all(len(line) <= width for line in bare)
    assert any("\x1b[1;31mFAIL: accuracy" in line for line in styled)
    assert not any("\x1b" in line for line in plain)


def test_a_terminal_shows_the_worst_rows_first():
    found = Report(RUN, ["gcd", "sort", "math"], ["p"], "finished")
    for task, verdict in (("gcd", "PASS"), ("sort", "UNPROVEN"), ("math", "FAIL")):
        for row in rows("p", task, verdict):
            found.add(row)
    tasks = [line.split()[0] for line in found.terminal(200) if line.startswith(("g", "so", "m"))]
    assert [t for t in tasks if t in ("gcd", "sort", "math")] == ["math", "sort", "gcd"]
    assert [row["task type"] for row in found.measured().rows] == ["gcd", "sort", "math"]


def test_a_table_of_nothing_is_false():
    assert not Table.of([])


def test_the_content_says_what_was_not_run():
    found = report()
    found.failed["test_a"], found.not_run = "said", ["test_b"]
    content = msgspec.to_builtins(found.content())
    assert content["tests"] == {
        "passed": 0,
        "failed": [{"test": "test_a", "said": "said"}],
        "not_run": ["test_b"],
    }
    assert "## Not run\n\n- test_b" in found.markdown()


def read(project, folder="out"):
    return json.loads((project.path / folder / "report.json").read_text())


def test_what_could_not_be_run_stands_in_it(project):
    run(project, "--grpo-record")
    project.makepyfile(test_broken="import nothing_of_this_name")
    run(
        project,
        "--grpo-trained=no-such-policy",
        "--grpo-report=out",
        "--continue-on-collection-errors",
    )
    told = {entry["test"]: entry["said"] for entry in read(project)["tests"]["failed"]}
    assert "no policy 'no-such-policy'" in told["test_own.py::test_accuracy[trained-palindrome]"]
    assert "nothing_of_this_name" in told["test_broken.py"]
    markdown = (project.path / "out" / "report.md").read_text()
    assert "no policy 'no-such-policy'" in markdown


def test_each_policys_problems_stand_beside_its_own_record(project):
    config = project.path / "pyproject.toml"
    config.write_text(config.read_text().replace("max_new_tokens = 2", "max_new_tokens = 40"))
    run(project, "--grpo-record")
    run(project, "--grpo-report=out", "--grpo-seed=1")
    then = {
        evaluation["policy"]: {p["id"]: p["then"]["tokens"] for p in evaluation["problems"]}
        for evaluation in read(project)["evaluations"]
    }
    assert then["base-policy"] != then["trained-policy"]
    for policy, found in then.items():
        stored = json.loads((project.path / "baselines" / policy / "palindrome.json").read_text())
        records = stored["problems"]
        assert found == {name: records[name]["length"] / records[name]["k"] for name in found}


def test_an_earlier_runs_report_does_not_stay(project):
    run(project, "--grpo-record")
    run(project, "--grpo-report=out", "--grpo-seed=1")
    (project.path / "out" / "samples" / "old--gcd.jsonl").write_text("{}")
    project.makeconftest("import pytest\ndef pytest_collection(): pytest.exit('early')")
    run(project, "--grpo-report=out", "--grpo-seed=2")
    found = read(project)
    assert (found["run"]["seed"], found["evaluations"]) == (2, [])
    assert not list((project.path / "out" / "samples").glob("*"))


def test_samples_are_of_this_run_alone(project):
    run(project, "--grpo-record")
    run(project, "--grpo-report=out")
    run(project, "--grpo-report=out", "-k", "base")
    (path,) = (project.path / "out" / "samples").glob("*.jsonl")
    assert path.name == "base-policy--palindrome.jsonl"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_it_is_written_when_the_run_is_ended(project, kind):
    run(project, "--grpo-record")
    project.makepyfile(
        test_then="import time, pathlib\n\ndef test_slow():\n"
        "    pathlib.Path('started').touch()\n    time.sleep(60)\n\n"
        "def test_never(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--grpo-report=out"]
    # A shell's background job, as these tests may be, has all that it starts ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=project.path, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not (project.path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert read(project)["status"] == "running"
    process.send_signal(kind)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    found = read(project)
    assert found["status"] == "interrupted"
    assert found["tests"]["passed"] == 2
    assert found["tests"]["not_run"] == ["test_then.py::test_slow", "test_then.py::test_never"]
    assert len(found["checks"]) == 2
    assert "palindrome" in printed


def test_a_path_that_is_a_file_is_a_usage_error(project):
    (project.path / "out").write_text("")
    result = run(project, "--grpo-report=out")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--grpo-report out is a file: name a folder*"])


def test_a_report_leaves_the_files_of_others_alone(project):
    """Also in a folder that is in git, and with a folder called samples."""
    own = {
        "docs/.gitignore": "build/",
        "docs/samples/mine.txt": "1",
        "docs/samples/a--b.jsonl": "2",
    }
    for name, text in own.items():
        (project.path / name).parent.mkdir(parents=True, exist_ok=True)
        (project.path / name).write_text(text)
    run(project, "--grpo-record")
    run(project, "--grpo-report=docs", passed=2)
    assert {name: (project.path / name).read_text() for name in own} == own


def test_a_report_is_not_written_over_one_of_another_tool(project):
    (project.path / "out").mkdir()
    (project.path / "out" / "report.json").write_text('{"tests": []}')
    result = run(project, "--grpo-report=out")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*out/report.json is not a report of grpo-harness*"])
    assert (project.path / "out" / "report.json").read_text() == '{"tests": []}'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")  # noqa: PTH110
@pytest.mark.parametrize("target", ["/dev/full", "no/such/folder/summary.md"])
def test_a_summary_that_cannot_be_written_is_one_line(project, monkeypatch, target):
    run(project, "--grpo-record")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", target)
    result = run(project, passed=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"the report cannot be written to {target} (*"])
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_a_disk_that_fills_up_is_one_line_and_the_verdicts_stand(project):
    project.makeconftest(
        """
        from grpo_harness.report import files

        def pytest_collection_finish(session):
            def full(path, text):
                raise OSError(28, "No space left on device")
            files.replace = full
        """
    )
    project.makepyfile(test_own="def test_own(gate): pass")
    # In a process of its own, whose modules are its own.
    result = project.runpytest_subprocess("-p", "no:xdist", "--grpo-report=out")
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["the report cannot be written to *No space left on device*"])
    assert "INTERNALERROR" not in result.stdout.str()
    assert read(project)["status"] == "running"


def test_its_folder_does_not_make_the_tree_dirty(project):
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *command], check=True, cwd=project.path)
    run(project, "-p", "no:cacheprovider", "--grpo-report=out")
    status = subprocess.run(
        ["git", "status", "--porcelain"],
        cwd=project.path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "out" not in status.stdout


def against_base(policy, task="gcd", base="base"):
    check = rows(policy, task)[1]
    about = {"rule": "no_loss", "title": "not worse", "against": "base", "reference": base}
    return check | about


def test_one_trained_policy_is_in_the_head_of_its_column_and_several_have_rows():
    report = Report({}, ["sort", "gcd"], ["base", "b", "a"])
    for task in ("gcd", "sort"):
        report.add(against_base("b", task))
    heads = report.improvements().columns
    assert heads[:4] == ["task type", "n × k", "base: base", "trained: b"]
    for task in ("gcd", "sort"):
        report.add(against_base("a", task))
    table = report.improvements()
    assert table.columns[:5] == ["task type", "policy", "n × k", "base: base", "trained"]
    pairs = [(row["task type"], row["policy"]) for row in table.rows]
    assert pairs == [("sort", "b"), ("sort", "a"), ("gcd", "b"), ("gcd", "a")]
    assert {row["trained"] for row in table.rows} == {"70.0%"}


def test_the_head_names_every_candidate():
    head = Report({**RUN, "trained": ["a", "b", "c"]})
    assert "- trained: a, b and c\n" in head.markdown()
    assert "- trained: p\n" in Report(RUN).markdown()


ROW = {"policy": "p", "task_type": "gcd", "sample": 0, "prompt": "gcd?", "wanted": "7"}


def drawn(name, text, outcome, tokens, reward, strict=False, **more):
    """A line of a file of samples."""
    own = {"problem": name, "completion": text, "outcome": outcome, "tokens": tokens}
    scores = {"reward": reward, "rewards": {"a": reward}, "logged": {}}
    return {**ROW, **own, **scores, "strict": strict, **more}


def found_in(folder, drawn, records=None, examples=()):
    """The problems of a file of samples, beside those of a baseline that is made of ``records``."""
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in drawn))
    if records is None:
        return problems(path, None)
    baseline = folder / "gcd.json"
    kept = Examples(Scoring(correct="", trials="", weights={}), examples).text
    examples_of(baseline).write_text(kept)
    header = {"policy": "p", "commit": "c" * 40, "recorded": "2026-01-01", "reason": None}
    header |= {"task_type": "gcd", "fingerprint": None, "gate": {}, "planned": 1, "seeds": [1]}
    header |= {"conditions": {}, "environment": {}, "anchor": None, "examples": digest(kept)}
    return problems(path, Baseline(baseline, Header(**header), records, "d"))


def record(prompt="gcd?", **changes):
    counts = {"k": 4, "correct": 1, "truncated": 2, "unparsable": 0, "length": 8}
    about = {"log_length": 4 * math.log(2), "reward": 0.0, "anchor": 1, "anchor_k": 4}
    return Record(**{**counts, **about, "prompt": prompt_digest(prompt), **changes})


def test_a_problem_has_the_counts_and_means_of_its_own_samples(tmp_path):
    two = {"rewards": {"a": 0.0, "b": None}}
    samples = [
        drawn("one", "7", "correct", 1, 0.0, strict=True, **two),
        drawn("one", "it is 7", "correct", 4, 1.0, rewards={"a": 1.0, "b": 0.5}),
        drawn("one", "6", "wrong", 2, None, rewards={"a": None, "b": None}),
        *[drawn("one", "x" * 9, "truncated", 9, 0.0, **two)] * 3,
        *[drawn("one", "", "unparsable", 1, 0.0, **two)] * 2,
        drawn("two", "6", "wrong", 3, -1.0),
    ]
    one, two = found_in(tmp_path, samples)
    assert (one.now.k, one.now.correct, one.now.truncated, one.now.unparsable) == (8, 2, 3, 2)
    assert one.now.tokens == pytest.approx((1 + 4 + 2 + 3 * 9 + 2 * 1) / 8)
    assert one.now.reward == pytest.approx(1 / 7), "0 is a reward, and none is not"
    assert one.now.rewards == {"a": pytest.approx(1 / 7), "b": 0.5}
    assert [c.strict for c in one.completions] == [True] + [False] * 7
    assert one.completions[1].rewards == {"a": 1.0, "b": 0.5}
    assert (two.now.k, two.now.reward, two.completions[0].reward) == (1, -1.0, -1.0)
    assert two.now.rewards == two.completions[0].rewards == {}, "one function is the total"
    assert (one.then, one.kept) == (None, [])


def test_a_problem_stands_beside_its_record(tmp_path):
    counted = {"total": [(0.0, 1), (2.0, 3)], "rewards": {"a": [(0.5, 2), (2.0, 1)], "b": []}}
    samples = [drawn("one", "7", "correct", 1, 1.0), drawn("new", "7", "correct", 1, 1.0)]
    one, new = found_in(tmp_path, samples, {"one": record(**counted)})
    assert (one.then.k, one.then.correct, one.then.truncated, one.then.unparsable) == (4, 1, 2, 0)
    assert (one.then.tokens, one.then.reward) == (2.0, pytest.approx(6 / 4))
    assert one.then.rewards == {"a": pytest.approx(3 / 3), "b": None}
    assert new.then is None


def test_a_problem_has_the_first_right_and_wrong_texts_that_were_kept(tmp_path):
    def example(text, outcome, problem="one", **more):
        return Example(problem=problem, text=text, outcome=outcome, scores={}, total=0.0, **more)

    samples = [drawn("one", "7", "correct", 1, 1.0), drawn("other", "7", "correct", 1, 1.0)]
    examples = [example("tried", "wrong", trial=True), example("", "unparsable"),
                example("7", "correct"), example("6", "wrong"), example(" 7", "correct"),
                example("5", "wrong", "other")]  # fmt: skip
    records = {"one": record(), "other": record("another prompt")}
    one, other = found_in(tmp_path, samples, records, examples)
    assert sorted((of.text, of.outcome) for of in one.kept) == [
        ("", "unparsable"),
        ("7", "correct"),
    ]
    assert (other.then, other.kept) == (None, []), "it was another question"


def test_a_recording_tells_its_origin_and_its_sampling_and_not_its_speed():
    header = Header(
        policy="p", commit="c" * 40, recorded="2026-01-01", reason=None, task_type="gcd",
        fingerprint=None, conditions={"sampling.top_p": 0.9, "rewards": "x"}, gate={}, planned=1,
        seeds=[1], environment={"torch": "2", SPEED: 9.5}, anchor=None,
    )  # fmt: skip
    found = recorded(Baseline(Path("gcd.json"), header, {}, "d"))
    assert msgspec.to_builtins(found) == {
        "commit": "c" * 40, "recorded": "2026-01-01", "environment": {"torch": "2"},
        "sampling": {"top_p": 0.9},
    }  # fmt: skip


def lines_of(names, width, dispensable=("extra", "more")):
    """The lines of a table with a name and three other columns."""
    row = {"extra": "1234", "more": "5678", "verdict": "PASS"}
    return Table.of([{"name": name, **row} for name in names], dispensable).terminal(width)


def test_a_table_leaves_out_no_more_than_it_must():
    whole = max(map(len, lines_of(["a"], 300)))
    assert lines_of(["a"], whole) == lines_of(["a"], 300)
    without = lines_of(["a"], whole - 1)
    assert without[0].split() == ["name", "more", "verdict"], "what is missed least goes first"
    assert " ".join(without[3:]) == f"({whole - 1} columns have no room for: extra)"
    both = lines_of(["a"], max(map(len, without[:3])) - 1)
    assert both[0].split() == ["name", "verdict"]


@given(st.integers(5, 60), st.integers(25, 80))
def test_a_name_is_as_long_as_the_width_allows_and_keeps_both_ends(length, width):
    name = "".join(chr(ord("a") + i % 26) for i in range(length))
    shown = lines_of([name], width)[2].split()[0]
    room = width - len("  verdict  ")
    tried = [length, *(length if length <= of else of - 1 for of in (32, 24, 20, 16, 12))]
    wanted = next(of for of in tried if of <= room)
    half = (wanted - 1) // 2
    assert shown == (name if wanted == length else f"{name[:half]}…{name[-half:]}")


def test_a_name_that_no_file_can_hold_is_shown():
    (row,) = Table.of([{"a": "half of a pair: \udc80"}]).rows
    assert row == {"a": "half of a pair: \\udc80"}


def test_each_verdict_has_its_colour_in_a_terminal():
    codes = {"ERROR": "1;35", "FAIL": "1;31", "UNPROVEN": "33", "PASS": "32", "not judged": None}
    lines = Table.of([{"verdict": verdict} for verdict in codes]).terminal(40, styled=True)[2:]
    shown = [re.findall(r"^\x1b\[([\d;]+)m", line) for line in lines]
    assert shown == [[code] if code else [] for code in codes.values()]


def test_a_report_of_one_evaluation_or_one_check_alone_is_something_to_show():
    for row in rows():
        found = Report(RUN)
        assert not found
        found.add(row)
        assert found


def test_a_failed_test_is_a_fail_unless_a_check_is_worse():
    for verdict, worst in (("PASS", "FAIL"), ("UNPROVEN", "FAIL"), ("ERROR", "ERROR")):
        found = report(verdict=verdict)
        assert found.worst() == verdict
        found.failed["test_a"] = "said"
        assert found.worst() == worst


def test_a_measured_row_shows_the_evidence_of_its_check_against_the_baseline():
    found = report()
    evaluation, check = rows()
    changed = {"n": 128, "accuracy": 0.9, "k": 2, "truncated": 0.0, "mean_reward": -0.25}
    part = {"of": "lang=de", "n": 32, "accuracy": 0.125, "mean_reward": 0.5}
    found.add({**evaluation, **changed, "slices": [part]})
    found.add(against_base("p") | {"verdict": "FAIL"})
    better = {"rule": "improvement", "title": "better", "verdict": "UNPROVEN", "evidence": None}
    found.add(against_base("p") | better)
    about = {"task_type": "all tasks", "rule": "total", "title": "together"}
    found.add(check | about | {"evidence": evidence(then=0.5, now=0.4, delta=-0.1, n=512, k=4)})
    row, of_part, total = found.measured().rows
    assert (row["n × k"], row["baseline"], row["now"]) == ("128 of 256 × 4", "71.0%", "70.0%")
    assert (row["reward"], row["strict"], row["verdict"]) == ("-0.250", "60.0%", "PASS")
    shown = {name: of for name, of in of_part.items() if of}
    assert shown == {
        "task type": "gcd lang=de", "policy": "p", "n × k": "32 × 2", "now": "12.5%",
        "reward": "+0.500", "verdict": "not judged",
    }  # fmt: skip
    shown = {name: of for name, of in total.items() if of}
    assert shown == {
        "task type": "all tasks", "policy": "p", "n × k": "512 × 4", "baseline": "50.0%",
        "now": "40.0%", "Δ points (90 % CI)": "-10.0 (-3.0 to +1.0)", "verdict": "PASS",
    }  # fmt: skip
    row, other = found.improvements().rows
    assert {name: of for name, of in other.items() if of} == {
        "task type": "gcd", "asked": "better", "verdict": "UNPROVEN",
    }  # fmt: skip
    assert row == {
        "task type": "gcd", "n × k": "256 × 4", "base: base": "71.0%", "trained: p": "70.0%",
        "Δ points (90 % CI)": "-1.0 (-3.0 to +1.0)", "asked": "not worse", "verdict": "FAIL",
    }  # fmt: skip


def test_the_details_of_a_check_are_its_evidence_also_of_the_file(tmp_path):
    found = Report(RUN, ["gcd", "sort", "math"], ["p"], "finished")
    numbers = [{"p": 0.0}, {"p": 0.04, "needed": None, "upper": math.inf}, {"p": 1.0}]
    for task, of, unit in zip(found.task_types, numbers, ("%", "reward", "tokens"), strict=True):
        evaluation, check = rows(task=task)
        found.add(evaluation)
        found.add(check | {"unit": unit, "evidence": evidence(**of)})
    found.passed, found.failed, found.not_run = 3, {"test_a": "broke"}, ["test_b"]
    found.notices = ["read me"]
    curve = {"steps": [1.0], "now": [0.1], "then_steps": [1.0], "then": [[0.2]], "mean": [0.2]}
    curve |= {"lower": [0.1], "upper": [0.3], "training": "learn", "name": "loss"}
    found.add({"kind": "curve", **curve})
    columns = ("then", "now", "Δ", "lower", "upper", "p", "p (Holm)", "MDE90", "needed")
    wanted = [
        ("71.0%", "70.0%", "-1.0", "-3.0", "+1.0", "< 1e-300", "0", "5.0%", "200"),
        ("+0.71", "+0.7", "-0.01", "-0.03", "+inf", "0.04", "0.08", "0.05", "unreachable"),
        ("0.7 tokens", "0.7 tokens", "-1.0", "-3.0", "+1.0", "1", "1", "5.0%", "200"),
    ]
    write(found, tmp_path)
    again = read_report(tmp_path)
    assert [tuple(row[of] for of in columns) for row in found.details().rows] == wanted
    lost = [tuple("+nan" if of == "+inf" else of for of in row) for row in wanted]
    assert [tuple(row[of] for of in columns) for row in again.details().rows] == lost
    assert again.content() == found.content()
    (again_curve,) = again.curves
    assert again_curve == curve
    assert (again.passed, again.failed) == (3, {"test_a": "broke"})
    assert (again.not_run, again.notices) == (["test_b"], ["read me"])


def test_the_sampling_is_said_once_for_all_that_share_it():
    found = Report(RUN, ["gcd", "sort"], ["p", "q", "r"], "finished")
    for policy, task in (("q", "gcd"), ("p", "gcd"), ("p", "sort"), ("r", "sort")):
        found.add(rows(policy, task)[0])
    for of in found.evaluations.values():
        of["engine"] = {"prompts": "cut"} if of["policy"] == "q" else {"requests": "retried"}
    found.evaluations["r", "sort"]["sampling"] = {"temperature": 0.0}
    *lines, _ = found.terminal(200)[: found.terminal(200).index("") + 1]
    assert lines == [
        "sampling of p and q: temperature=0.8 top_p=0.9 max_new_tokens=64",
        "sampling of r: temperature=0.0",
        "p: requests are retried",
        "q: prompts are cut",
        "r: requests are retried",
    ]


def test_what_has_several_lines_has_one_in_a_list():
    found = report()
    found.failed["test_a"] = "it\n  broke"
    assert "\n- test_a&#58; it broke\n" in found.markdown()


def test_samples_are_of_a_run_if_they_are_as_many_and_as_long(tmp_path):
    row = {"slug": "p", "task_type": "gcd", "n": 2, "k": 2, "mean_length": 3.0}
    path = samples_of(tmp_path, "p", "gcd")
    path.parent.mkdir()

    def found(names, tokens=3):
        rows = [drawn(name, "7", "correct", tokens, 1.0) for name in names]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return [problem.id for problem in problems_of(tmp_path, row, None)]

    assert found("aabb") == ["a", "b"]
    for names, tokens in (("aaaa", 3), ("ab", 3), ("aabbcc", 3), ("aabb", 4)):
        with pytest.raises(ReportError, match="are of another run"):
            found(names, tokens)
    path.unlink()
    assert problems_of(tmp_path, row, None) == []


def test_a_run_begins_without_the_samples_of_the_last_one_and_with_all_other_files(tmp_path):
    write(report(), tmp_path)
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("p--gcd.jsonl", "mine.jsonl", "p--notes.txt"):
        (samples / name).write_text("")
    begin(tmp_path)
    assert {path.name for path in samples.iterdir()} == {"mine.jsonl", "p--notes.txt"}
    assert not (tmp_path / ".gitignore").exists(), "the folder is not new"
    begin(tmp_path / "new")
    assert (tmp_path / "new" / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '"schema"', '{"tests": []}', '{"schema": "v1"}', "[" * 100_000]
)
def test_a_file_that_is_no_report_is_not_written_over(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match="is not a report of grpo-harness: name another folder"):
        begin(tmp_path)
    assert (tmp_path / "report.json").read_text() == text


def test_a_report_of_another_schema_is_named_by_it(tmp_path):
    write(report(), tmp_path)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(ReportError, match="its schema is 99, and 3 is read"):
        read_report(path)


def test_a_report_that_is_printed_in_a_log_commands_nothing(tmp_path):
    reason = "##[error]x ##vso[y]"
    write(report(verdict="FAIL", reason=reason), tmp_path)
    assert "##[" not in (tmp_path / "report.json").read_text()
    assert "##vso" not in (tmp_path / "report.json").read_text()
    (check,) = read_report(tmp_path).sorted_checks()
    assert check["reason"] == reason


def test_a_summary_is_added_to_what_is_there(tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("of another step\n")
    append_summary(report(), str(path))
    assert path.read_text() == f"of another step\n{report().markdown()}"
