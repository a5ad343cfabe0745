"""The store as a user meets it: the options that use it, and the command that keeps it."""

import json
import re
import sqlite3
from contextlib import closing

import pytest

from grpo_harness.cli import main
from tests.projects import OWN_SUITE, run

OF_SEED_3 = (
    "draw IN (SELECT draw FROM draws WHERE json_extract(identity, '$.run_seed') = 3 "
    "AND policy IN (?, ?))"
)
BOTH = (b"base-policy", b"trained-policy")

REWARD = """
def reward(prompts, completions, **_):
    return [float(len(completion)) for completion in completions]
"""


@pytest.fixture
def drawn(project):
    """A project whose baselines are recorded, and which has run once, with seed 3."""
    run(project, "--grpo-record")
    run(project, "--grpo-seed=3", passed=2)
    return project


@pytest.fixture
def no_weights(monkeypatch):
    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("grpo_harness.engines.transformers.load_weights", load_weights)


def cache(project):
    return project.path / ".pytest_cache" / "d" / "grpo-harness"


def query(project, sql, *values):
    with closing(sqlite3.connect(cache(project) / "samples.db")) as database, database:
        return database.execute(sql, values).fetchall()


def evaluations(project):
    report = json.loads((project.path / "out" / "report.json").read_text())
    return report["evaluations"]


def test_rescore_scores_what_the_last_run_drew_and_loads_no_weights(drawn, no_weights):
    drawn.makepyfile(
        test_more=f"""
        {OWN_SUITE.replace(chr(10), chr(10) + "        ").replace("accuracy", "length")}
        def test_mine(evaluation):
            assert evaluation.mean_length > 0

        def test_draws(engine): ...
        def test_samples(sample): ...
        def test_of_nothing(): ...
        """
    )
    result = run(drawn, "--grpo-rescore", "--grpo-report=out", passed=6, deselected=4)
    result.stdout.fnmatch_lines(["*, seed 3"])
    assert {row["run_seed"] for row in evaluations(drawn)} == {3}


def test_rescore_names_how_many_are_missing_and_draws_none(drawn, no_weights):
    query(
        drawn,
        f"DELETE FROM samples WHERE {OF_SEED_3} AND number = 1 AND problem IN "  # noqa: S608
        "(SELECT problem FROM samples ORDER BY problem LIMIT 10)",
        *(b"base-policy", b""),
    )
    (before,) = query(drawn, "SELECT count(*) FROM samples")
    result = run(drawn, "--grpo-rescore", passed=1, errors=1)
    said = re.search(
        r"base-policy on palindrome: (\d+) of 128 completions of seed 3 are not in",
        " ".join(result.outlines),
    )
    assert 1 <= int(said[1]) <= 10
    assert "run without --grpo-rescore to draw them" in result.stdout.str()
    other = run(drawn, "--grpo-rescore", "--grpo-seed=4", errors=2)
    other.stdout.fnmatch_lines(["*128 of 128 completions of seed 4 are not in the store *"])
    assert query(drawn, "SELECT count(*) FROM samples") == [before]


def test_rescore_records_a_changed_reward_from_the_samples_of_the_recording(drawn, no_weights):
    drawn.makepyfile(our_rewards=REWARD)
    table = drawn.path / "pyproject.toml"
    table.write_text(
        table.read_text().replace('tasks = ["pal', 'reward = "our_rewards:reward"\ntasks = ["pal')
    )
    drawn.syspathinsert()
    path = drawn.path / "baselines" / "base-policy" / "palindrome.json"
    before = json.loads(path.read_text())
    refused = run(drawn, "--grpo-rescore", errors=2)
    refused.stdout.fnmatch_lines(["*reward*"])
    why = "--grpo-accept-regression=a reward for length"
    run(drawn, "--grpo-record", "--grpo-rescore", why, skipped=2)
    after = json.loads(path.read_text())
    assert after["seeds"] == before["seeds"]
    speeds = [of["environment"]["completions_per_second"] for of in (before, after)]
    assert speeds[0] == speeds[1] > 0, "nothing was drawn, and later runs plan by it"
    assert before["mean_reward"] < 0 <= after["mean_reward"]
    correct = [
        {name: record["correct"] for name, record in of["problems"].items()}
        for of in (before, after)
    ]
    assert correct[0] == correct[1]
    run(drawn, "--grpo-rescore", passed=2)


def runs_of_seed_3(project):
    """The runs that drew the stored samples of seed 3, and how many samples each."""
    return dict(
        query(
            project,
            f"SELECT run, count(*) FROM samples WHERE {OF_SEED_3} GROUP BY run",  # noqa: S608
            *BOTH,
        )
    )


def test_fresh_draws_anew_and_replaces_what_is_stored(drawn):
    (before,) = runs_of_seed_3(drawn).items()
    total = query(drawn, "SELECT count(*) FROM samples")
    run(drawn, "--grpo-seed=3", "--grpo-fresh", passed=2)
    (after,) = runs_of_seed_3(drawn).items()
    assert (before[1], after[1]) == (256, 256)
    assert before[0] != after[0]
    run(drawn, "--grpo-seed=3", passed=2)
    assert list(runs_of_seed_3(drawn).items()) == [after]
    assert query(drawn, "SELECT count(*) FROM samples") == total


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grpo-fresh", "--grpo-rescore"], "leave one out"),
        (["--grpo-rescore", "-p", "no:cacheprovider"], "leave out -p no:cacheprovider"),
        (["--grpo-rescore"], "run pytest without it first, or name a run by --grpo-seed"),
    ],
)
def test_a_rescore_that_cannot_be_is_one_line_before_anything_begins(project, options, says):
    result = run(project, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if "--grpo-rescore" in line]
    assert says in line
    assert "Traceback" not in result.stderr.str()


@pytest.mark.heavy
def test_workers_share_a_fresh_run(drawn):
    pytest.importorskip("xdist")
    drawn.makepyfile(test_more=OWN_SUITE.replace("accuracy", "length"))
    result = drawn.runpytest_subprocess("-n", "2", "--grpo-seed=3", "--grpo-fresh")
    result.assert_outcomes(passed=4)
    assert list(runs_of_seed_3(drawn).values()) == [256]


def test_the_store_is_in_the_cache_wherever_that_is(project, tmp_path_factory, monkeypatch, capfd):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("CACHES", str(elsewhere))
    monkeypatch.chdir(project.path)
    run(project, "--grpo-record", "-o", "cache_dir=$CACHES/own", skipped=2)
    file = elsewhere / "own" / "d" / "grpo-harness" / "samples.db"
    assert file.is_file()
    listed = run(project, "--grpo-settings", "--grpo-fresh", "-o", "cache_dir=$CACHES/own")
    values = {line.split()[0]: line.split()[1:] for line in listed.outlines if line.strip()}
    assert values["store"] == [str(file), "pytest's", "cache_dir"]
    assert values["fresh"] == ["True", "command", "line"]
    assert values["rescore"] == ["False", "default"]
    capfd.readouterr()
    assert main(["store", "-o", "cache_dir=$CACHES/own"]) == 0
    assert f"{file}: 2,048 samples" in capfd.readouterr().out
    assert main(["store"]) == 0
    assert "samples.db: nothing is stored yet" in capfd.readouterr().out


def test_the_command_shows_prunes_and_repairs(drawn, monkeypatch, capfd):
    monkeypatch.chdir(drawn.path)
    former = cache(drawn) / "samples" / "x-0123.jsonl"
    former.parent.mkdir()
    former.write_text("{}")

    def said(*arguments, status=0):
        capfd.readouterr()
        assert main(["store", *arguments]) == status
        output = capfd.readouterr()
        return output.err if status else output.out

    table = said()
    assert "files of an earlier version" in table
    assert re.search(r"base-policy +\w{16} +transformers cpu float32 +3 +1,152 ", table)
    query(drawn, "UPDATE draws SET drawn = drawn - 40 * 86400 WHERE policy = ?", b"base-policy")
    dry = said("--prune", "--older-than", "30d", "--dry-run")
    assert "1,152 samples would be deleted" in dry
    assert former.exists()
    assert "1,152 samples deleted" in said("--prune", "--older-than", "30d")
    assert not former.exists()
    assert "1,152 samples" in said()
    file = cache(drawn) / "samples.db"
    file.write_bytes(b"not a database" * 1000)
    error = said(status=2)
    assert error.count("\n") == 1
    assert "grpo-harness store --repair" in error
    failed = run(drawn, "--grpo-seed=3", errors=2)
    failed.stdout.fnmatch_lines(["*file is not a database*: *--repair* puts the file aside"])
    assert "0 samples kept" in said("--repair")
    assert (cache(drawn) / "samples.db.damaged").exists()
    run(drawn, "--grpo-seed=3", passed=2)
    assert "samples deleted, 0.0 MB left" in said("--prune", "--to", "50kB")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prune"], "--prune needs a limit"),
        (["--older-than", "3d"], "add --prune"),
        (["--dry-run"], "add --prune"),
        (["--prune", "--to", "much"], "'much' is no size"),
        (["--prune", "--older-than", "30"], "'30' is no age"),
        (["--grpo-nonsense"], "pytest could not resolve the settings"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(project, monkeypatch, capfd, arguments, says):
    monkeypatch.chdir(project.path)
    assert main(["store", *arguments]) == 2
    assert says in capfd.readouterr().err.splitlines()[-1]
