"""A history: its files, its series, what the plugin and the command make of it."""

import json
import math
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from statistics import fmean, variance

import msgspec
import numpy as np
import pytest

from grpo_harness.cli import main
from grpo_harness.gate.changepoint import Point
from grpo_harness.history.file import (
    Figure,
    HistoryError,
    Judged,
    Reference,
    Row,
    Run,
    append,
    prepare,
    read,
)
from grpo_harness.history.measured import _figure, _table
from grpo_harness.history.series import Measurement, Series, series
from grpo_harness.report import history as views
from tests.projects import run


def a_run(number, value=0.7, *, rng=None, policy="p", baseline="one", anchor="one", **changed):
    """The run of a commit, with one row; its figure is drawn around the value."""
    value += rng.normal(0, 0.01) if rng else 0.0
    figure = Figure(value=value, noise=0.01, spread=0.02, completions=1024)
    reference = Reference(
        digest=baseline,
        commit=None,
        recorded="then",
        accuracy=0.7,
        anchor=anchor,
        anchor_commit=None,
        anchor_accuracy=0.7,
    )
    row = Row(
        policy=policy,
        task_type="gcd",
        fingerprint=changed.pop("fingerprint", "f"),
        n=changed.pop("n", 256),
        planned=256,
        k=4,
        problems="all",
        conditions=changed.pop("conditions", "warm"),
        seed=changed.get("seed", number),
        figures={"accuracy": figure, "length": figure},
        baseline=reference,
    )
    judged = Judged(rule="accuracy", policy=policy, task_type="gcd", verdict="PASS")
    day = f"2026-01-{1 + number // 24:02}T{number % 24:02}:00:00+00:00"
    content = {
        "started": day,
        "commit": f"{number:08x}" + "0" * 32,
        "committed": day,
        "seed": number,
        "rows": [row],
        "checks": [judged],
    }
    return Run(**{**content, **changed})


def kept(folder, runs):
    for one in runs:
        append(one, folder)
    return read(folder)


def accuracy(history):
    (found,) = [one for one in series(history) if one.figure == "accuracy"]
    return found


def test_a_run_comes_back_as_it_was(tmp_path):
    one = a_run(3)
    path = append(one, tmp_path)
    assert read(tmp_path).runs == [one]
    assert re.fullmatch(r"20260101T030000-[0-9a-f]{8}\.json", path.name)
    assert path.stat().st_size < 2000
    assert [*tmp_path.iterdir()] == [path]


def _write(folder):
    return [append(a_run(0), folder).name for _ in range(20)]


def test_many_writers_at_once_lose_nothing(tmp_path):
    """Runs that started in the same second, in several processes, while a reader looks."""
    with ProcessPoolExecutor(4) as pool:
        writers = [pool.submit(_write, tmp_path) for _ in range(8)]
        while not all(writer.done() for writer in writers):
            assert not read(tmp_path).damaged  # a file is there whole or not at all
        names = [name for writer in writers for name in writer.result()]
    assert len({*names}) == 160 == len(read(tmp_path).runs)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"noise": 0.01', '"noise": 0.0'),
        lambda text: text.replace('"n": 256', '"n": 256, "m": 1'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named_in_a_line_and_the_others_count(tmp_path, damage, capsys):
    whole, broken = append(a_run(1), tmp_path), append(a_run(2), tmp_path)
    changed = damage(broken.read_text())
    assert changed != broken.read_text()
    broken.write_text(changed)
    history = read(tmp_path)
    assert history.runs == [msgspec.json.decode(whole.read_bytes(), type=Run)]
    (said,) = history.damaged
    assert str(broken) in said
    assert "\n" not in said
    assert main(["history", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "says"),
    [("nowhere", "there is no folder"), (".", "has no run: pytest --grpo-history=")],
)
def test_a_folder_without_runs_is_an_error_in_a_line(tmp_path, folder, says, capsys):
    assert main(["history", str(tmp_path / folder)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HistoryError, match="name a folder"):
        prepare(tmp_path / "file")


def test_runs_are_ordered_by_their_commits_not_by_when_they_ran(tmp_path):
    late = msgspec.structs.replace(a_run(1), started="2027-01-01T00:00:00+00:00")
    history = kept(tmp_path, [late, a_run(2), a_run(0)])
    assert [one.seed for one in history.runs] == [0, 1, 2]


def test_a_planted_drift_is_found_at_its_commit(tmp_path):
    rng = np.random.default_rng(0)
    runs = [a_run(i, 0.7 if i < 12 else 0.65, rng=rng) for i in range(20)]
    history = kept(tmp_path, runs)
    (drift,) = accuracy(history).drifts
    assert abs(drift.change.at - 12) <= 1
    assert drift.since == f"{drift.change.at:08x}"
    assert drift.change.earliest <= 12 <= drift.change.latest
    assert drift.change.lower < -0.05 < drift.change.upper
    said = [line for line in views.drifts(history) if line.startswith("accuracy of p on gcd: ")]
    assert len(said) == 1
    assert f"since {drift.since}" in said[0]


def test_a_drift_that_was_mended_is_two(tmp_path):
    rng = np.random.default_rng(1)
    runs = [a_run(i, 0.6 if 10 <= i < 20 else 0.7, rng=rng) for i in range(30)]
    found = [drift.change for drift in accuracy(kept(tmp_path, runs)).drifts]
    assert [change.at for change in found] == [10, 20]
    # Each is told by the points between its neighbours.
    assert [round(change.after - change.before, 1) for change in found] == [-0.1, 0.1]


def test_an_unchanged_history_stays_silent(tmp_path):
    rng = np.random.default_rng(2)
    history = kept(tmp_path, [a_run(i, rng=rng) for i in range(30)])
    assert views.drifts(history) == []


def test_a_new_baseline_is_a_mark_and_changes_no_value(tmp_path):
    rng = np.random.default_rng(3)
    runs = [
        a_run(i, rng=rng, baseline="two" if i > 4 else "one", anchor="b" if i > 7 else "a")
        for i in range(10)
    ]
    history = kept(tmp_path, runs)
    marks = [row["baselines"] for row in views.runs(history).rows]
    assert [(i, mark) for i, mark in enumerate(marks) if mark] == [
        (5, "p on gcd: the baseline was recorded anew"),
        (8, "p on gcd: the anchor moved"),
    ]
    same = [
        msgspec.structs.replace(one, rows=[msgspec.structs.replace(one.rows[0], baseline=None)])
        for one in runs
    ]
    prepare(tmp_path / "other")
    other = kept(tmp_path / "other", same)
    assert [p.point for p in accuracy(other).positions] == [
        p.point for p in accuracy(history).positions
    ]
    (picture,) = [svg for title, svg in views.pictures(history) if title.startswith("accuracy")]
    assert picture.count("the baseline was recorded anew") == picture.count("the anchor moved") == 1


def measurement(number, value=0.5, *, commit=None, seed=None, fingerprint="f", problems="all"):
    point = Point(value, 0.02, 0.01, 400, problems)
    return Measurement(
        f"{number:03}", commit or str(number), fingerprint, number if seed is None else seed, point
    )


def positions(*measurements):
    return Series("p", "gcd", "accuracy", measurements).positions


def test_reruns_of_a_commit_are_one_point():
    runs = [measurement(i, value, commit="same") for i, value in enumerate((0.4, 0.6, 0.8))]
    first, second = positions(*runs, measurement(3, commit="next"))
    assert first.point.value == pytest.approx(0.6)
    assert first.point.noise == pytest.approx(0.02 / 3**0.5)
    assert first.point.completions == 1200
    assert second.point.completions == 400


def test_changed_files_another_policy_and_other_problems_are_other_points():
    assert len(positions(*(measurement(i, commit="c-dirty") for i in range(3)))) == 3
    assert len(positions(*(measurement(i, commit="c", fingerprint=str(i)) for i in range(3)))) == 3
    assert len(positions(*(measurement(i, commit="c", problems=str(i)) for i in range(3)))) == 3


def test_runs_of_one_seed_count_as_one_run_together():
    runs = [measurement(i, seed=7) for i in range(4)]
    assert [p.point.noise for p in positions(*runs)] == pytest.approx([0.04] * 4)
    together = positions(*(replace(one, commit="same") for one in runs))
    (whole,) = positions(measurement(0))
    assert together[0].point.noise == pytest.approx(whole.point.noise)
    assert together[0].point.completions == whole.point.completions


def test_a_run_that_stopped_early_is_no_evidence(tmp_path):
    history = kept(tmp_path, [a_run(0), a_run(1, n=64), a_run(2)])
    assert [one.name for one in accuracy(history).positions] == [f"{i:08x}" for i in (0, 2)]
    assert {row["runs"] for row in views.measured(history).rows} == {"2, 1 stopped early"}


def test_runs_that_were_asked_otherwise_are_not_compared(tmp_path):
    """A new temperature is no drift."""
    runs = [a_run(i, 0.7) for i in range(5)]
    runs += [a_run(i, 0.5, conditions="hot") for i in range(5, 10)]
    history = kept(tmp_path, runs)
    assert len(accuracy(history).positions) == 5
    assert views.drifts(history) == []
    assert {row["runs"] for row in views.measured(history).rows} == {"5, 5 asked otherwise"}


def test_figures_are_means_over_problems_of_those_that_have_a_value():
    """Against the plain formulas, with problems of different numbers of completions."""
    nan = math.nan
    values = [[1.0, 0.0, 0.5], [1.0, nan, 0.0], [nan, nan, nan], [0.25, nan, nan]]
    found = _figure(_table([*values, [0.75, 1.0]]), "reward")
    own = [[1.0, 0.0, 0.5], [1.0, 0.0], [0.25], [0.75, 1.0]]
    means = [fmean(of) for of in own]
    assert found["value"] == pytest.approx(fmean(means))
    assert found["completions"] == 8
    within = fmean(variance(of) / len(of) for of in own if len(of) > 1) / 4 + 2 / 8**2
    assert found["noise"] ** 2 == pytest.approx(within)
    assert found["spread"] ** 2 == pytest.approx(max(0, variance(means) / 4 - within))
    assert _figure(_table([[nan, nan]]), "reward") is None


def test_a_length_is_the_geometric_mean_of_tokens():
    tokens = [[3, 5], [8, 2], [13, 13]]
    found = _figure(_table([[math.log(t) for t in of] for of in tokens]), "length")
    assert found["value"] == pytest.approx((3 * 5 * 8 * 2 * 13 * 13) ** (1 / 6))
    logs = _figure(_table([[math.log(t) for t in of] for of in tokens]), "reward")
    assert found["noise"] == pytest.approx(found["value"] * logs["noise"])


HOSTILE = "<script>alert(1)</script>\u202e\n::error::"


def test_hostile_names_are_harmless_in_the_page_and_the_terminal(tmp_path, capsys):
    rng = np.random.default_rng(4)
    runs = [
        a_run(i, 0.7 if i < 6 else 0.5, rng=rng, policy=HOSTILE, commit=f"{HOSTILE}{i:038x}")
        for i in range(12)
    ]
    kept(tmp_path, runs)
    target = tmp_path / "page.html"
    assert main(["history", str(tmp_path), "--page", str(target)]) == 0
    printed = capsys.readouterr().out
    page = target.read_text()
    for shown in (printed, page):
        assert "\u202e" not in shown
        assert "since" in shown
    assert "::error" not in printed
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_is_one_well_formed_file_that_loads_nothing(tmp_path):
    history = kept(tmp_path, [a_run(i) for i in range(5)])
    page = views.page(history)
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("<svg") == page.count("</svg>") == 2
    for _, svg in views.pictures(history):
        ElementTree.fromstring(svg)  # noqa: S314 - our own
    assert len(views.pictures(history)) == 2


def test_one_run_alone_is_shown(tmp_path, capsys):
    kept(tmp_path, [a_run(0)])
    assert main(["history", str(tmp_path), "--page", str(tmp_path / "page.html")]) == 0
    assert "no drift is proven" in capsys.readouterr().out


# --- in pytest's runs ----------------------------------------------------------------------------


def committed(project):
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        [*("-c", "user.name=a", "-c", "user.email=a@b"), "commit", "--quiet", "-m", "All"],
    ):
        subprocess.run(["git", *command], check=True, cwd=project.path)


def runs_in(project, folder="history"):
    return read(project.path / folder).runs


def test_each_run_adds_a_file_that_says_what_the_run_said(project, capsys):
    run(project, "--grpo-record", "--grpo-history", "history", skipped=2)
    assert not (project.path / "history").exists()
    (project.path / ".gitignore").write_text("history\nreport\n.pytest_cache\n__pycache__\n")
    committed(project)
    run(project, "--co", "--grpo-history", "history")
    assert not (project.path / "history").exists()

    result = run(project, "--grpo-history=history", "--grpo-report=report", passed=2)
    result.stdout.fnmatch_lines(["written: history/*.json"])
    (path,) = (project.path / "history").iterdir()
    assert path.stat().st_size < 6000
    (one,) = runs_in(project)
    report = json.loads((project.path / "report" / "report.json").read_text())
    assert (one.seed, one.started) == (report["run"]["seed"], report["run"]["started"])
    assert one.commit == report["run"]["commit"]
    for row, evaluation in zip(one.rows, report["evaluations"], strict=True):
        for name in ("policy", "task_type", "fingerprint", "n", "planned", "k"):
            assert getattr(row, name) == evaluation[name]
        assert row.figures["accuracy"].value == pytest.approx(evaluation["accuracy"])
        assert row.figures["reward"].value == pytest.approx(evaluation["mean_reward"])
        assert row.figures["truncation"].value == pytest.approx(evaluation["outcomes"]["truncated"])
        path = next(project.path.glob(f"baselines/{evaluation['slug']}/*.json"))
        header = json.loads(path.read_text())
        assert row.baseline.recorded == header["recorded"]
        assert row.baseline.anchor == header["anchor"]["digest"]
    judged = [(c["rule"], c["policy"], c["task_type"], c["verdict"]) for c in report["checks"]]
    assert [(c.rule, c.policy, c.task_type, c.verdict) for c in one.checks] == judged

    (project.path / "test_own.py").write_text(
        "# changed\n" + (project.path / "test_own.py").read_text()
    )
    run(project, "--grpo-history=history")
    assert [other.commit for other in runs_in(project)] == [one.commit, f"{one.commit}-dirty"]
    assert main(["history", str(project.path / "history")]) == 0
    assert f"{one.commit[:8]}-dirty" in capsys.readouterr().out


def test_the_table_can_name_the_folder(project):
    table = (project.path / "pyproject.toml").read_text()
    (project.path / "pyproject.toml").write_text(
        table.replace("problems = 64", 'problems = 64\nhistory = "kept"')
    )
    run(project, "--grpo-record")
    run(project)
    assert len(runs_in(project, "kept")) == 1


def test_a_red_run_is_in_the_history_and_a_run_that_measures_nothing_is_not(project):
    run(project, "--grpo-history=history", errors=2)  # there is no baseline
    assert runs_in(project) == []
    project.makepyfile(test_red="def test_red(evaluation):\n    assert evaluation.n == 0")
    run(project, "--grpo-history=history", "test_red.py", failed=2)
    assert [len(one.rows) for one in runs_in(project)] == [2]


def test_a_history_that_cannot_be_written_is_said_before_anything_is_drawn(project):
    (project.path / "file").touch()
    result = run(project, "--grpo-history=file")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: the history cannot be kept in *file*name a folder"])


def test_with_xdist_only_the_leader_writes(project):
    pytest.importorskip("xdist")
    run(project, "--grpo-record")
    result = project.runpytest_subprocess("-n", "2", "--grpo-history=history", "-p", "no:benchmark")
    result.assert_outcomes(passed=2)
    (one,) = runs_in(project)
    assert {row.policy for row in one.rows} == {"base-policy", "trained-policy"}
    assert all(row.figures["accuracy"].completions == 128 for row in one.rows)
