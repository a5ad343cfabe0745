"""A training's log: read without trust, summed up, and judged by recorded runs."""

import json
import math
import random
import statistics
from pathlib import Path

import msgspec
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.cli import main
from grpo_harness.logs.figures import FIGURES, Figure, Value, figures
from grpo_harness.logs.judge import RISK, band, judge
from grpo_harness.logs.plot import plot
from grpo_harness.logs.read import Log, LogError, read
from grpo_harness.logs.recorded import LEAST_RUNS, Recorded, load, path_of, record, summed_up
from tests.projects import run

STEPS = 50


def rows(seed, *, steps=STEPS, functions=("accuracy", "format"), **changes):
    """The log of a run that learns: figures follow a trend, with noise of a step's own."""
    luck = random.Random(seed)
    made = []
    for step in range(1, steps + 1):
        done = step / steps
        row = {
            "step": step,
            "loss": luck.gauss(0, 0.01),
            "reward": 0.2 + 0.6 * done + luck.gauss(0, 0.03),
            "reward_std": 0.3,
            "entropy": 1.5 - done + luck.gauss(0, 0.03),
            "completions/mean_length": 20 - 5 * done + luck.gauss(0, 0.4),
            "completions/clipped_ratio": max(0.0, 0.05 + luck.gauss(0, 0.01)),
            "frac_reward_zero_std": max(0.0, 0.1 * done + luck.gauss(0, 0.02)),
            "grad_norm": math.exp(luck.gauss(0, 0.1)),
            "step_time": 1.0 + luck.random() / 10,
        }
        for name in functions:
            row[f"rewards/{name}/mean"] = row["reward"] / 2 + luck.gauss(0, 0.01)
        made.append({**row, **{key: change(row[key], done) for key, change in changes.items()}})
    return made


def log(seed, tmp_path, **how):
    return Log(tmp_path / str(seed), tuple(rows(seed, **how)))


def recorded(tmp_path, m=5, **how):
    return Recorded(1, "ours", [summed_up(log(seed, tmp_path, **how)) for seed in range(m)])


def write(folder, content, name="trainer_state.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


# ------------------------------------------------------------------ reading


def test_the_log_is_read_from_what_a_trainer_leaves(tmp_path):
    history = [*rows(1), {"step": STEPS, "train_runtime": 60.0, "total_flos": 0.0}]
    for step in (10, 9, 50):
        state = {"log_history": history if step == 50 else history[:step], "global_step": step}
        write(tmp_path / "out" / f"checkpoint-{step}", state)
    (tmp_path / "out" / "checkpoint-best").mkdir()
    found = read(tmp_path / "out")
    assert found.path == tmp_path / "out" / "checkpoint-50" / "trainer_state.json"
    assert [dict(row) for row in found.rows] == rows(1)
    assert (found.steps, found.rewards) == (STEPS, ["accuracy", "format"])
    write(tmp_path / "out", {"log_history": rows(2)})
    assert found.rows != read(tmp_path / "out").rows == tuple(rows(2))
    write(tmp_path / "ours", rows(3), "log.json")
    write(tmp_path / "ours", {"recipe": {"name": "nano"}}, "recipe.json")
    assert (read(tmp_path / "ours").rows, read(tmp_path / "ours").training) == (
        tuple(rows(3)),
        "nano",
    )
    assert read(tmp_path / "ours" / "log.json").rows == tuple(rows(3))


def test_steps_logged_twice_and_figures_that_a_step_lacks(tmp_path):
    history = [*rows(1), {**rows(2)[9], "entropy": None, "note": "x"}]
    found = read(write(tmp_path, {"log_history": history}))
    assert found.rows[9] == {k: v for k, v in rows(2)[9].items() if k != "entropy"}
    assert len(found.series("entropy")) == STEPS - 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("\x00\xff", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "fewer than two steps"),
        ("{}", "no log of a trainer"),
        ('{"log_history": 7}', "no log of a trainer"),
        ('{"log_history": [7]}', "no log of a trainer"),
        ('{"log_history": [{"reward": 1}]}', "has no step"),
        ('{"log_history": [{"reward": 1, "step": 1.5}]}', "has no step"),
        ('{"log_history": [{"reward": 1, "step": -1}]}', "has no step"),
        ('{"log_history": [{"loss": 1, "step": 1}, {"loss": 1, "step": 2}]}', "fewer than two"),
        ('{"log_history": [{"reward": NaN, "step": 1}]}', "reward = nan"),
        ('{"log_history": [{"loss": Infinity, "step": 1}]}', "loss = inf"),
        ('{"log_history": [{"reward": [1], "step": 1}]}', "from which no training recovers"),
        ('{"log_history": [{"reward": true, "step": 1}]}', "from which no training recovers"),
        ('{"log_history": [{"reward": 1%s, "step": 1}]}' % ("0" * 400), "reward = 10"),
        ('{"log_history": [{"reward": 1, "step": 1%s}]}' % ("0" * 400), "step = 10"),
        ('{"log_history": [{"reward": "NaN", "step": 1}]}', "reward = 'NaN'"),
        ('{"log_history": [{"reward": 1, "kl": "0.1", "step": 1}]}', "kl = '0.1'"),
        ('{"log_history": [{"reward": 1, "grad_norm": null, "step": 1}]}', "grad_norm = None"),
        ('{"log_history": [{"loss": null, "step": 1}]}', "loss = None"),
        ('{"log_history": [{"reward": 1, "\\u001b[31m": NaN, "step": 1}]}', r"\\x1b"),
    ],
)
def test_what_is_no_log_is_one_clear_line(content, said, tmp_path):
    (tmp_path / "trainer_state.json").write_text(content, encoding="latin-1")
    with pytest.raises(LogError, match=said) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)
    assert "trainer_state.json" in str(raised.value)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_without_a_log_says_what_was_looked_for(place, tmp_path):
    with pytest.raises(LogError, match=r"trainer_state\.json or checkpoint-N"):
        read(tmp_path / place)


# ------------------------------------------------------------------ figures


def test_figures_are_those_of_the_first_and_last_fifth(tmp_path):
    found = {figure.name: value for figure, value in figures(log(1, tmp_path))}
    rewards = [row["reward"] for row in rows(1)]
    last, first = rewards[-10:], rewards[:10]
    assert found["reward"].number == pytest.approx(statistics.fmean(last))
    gain = statistics.fmean(last) - statistics.fmean(first)
    assert found["gain of reward"].number == pytest.approx(gain)
    formats = [row["rewards/format/mean"] for row in rows(1)][-10:]
    assert found["reward format"].number == pytest.approx(statistics.fmean(formats))
    assert "peak memory" not in found
    # One reward function is the total itself.
    names = [figure.name for figure, _ in figures(log(1, tmp_path, functions=("one",)))]
    assert "reward one" not in names


@given(st.floats(-3, 3), st.integers(20, 200), st.integers(0, 10**6))
def test_a_trend_does_not_enlarge_the_standard_error(slope, n, seed):
    luck = random.Random(seed)
    noise = [luck.gauss(0, 1) for _ in range(5 * n)]
    made = [
        Log(None, tuple({"step": i, "reward": x + s * i / n} for i, x in enumerate(noise)))
        for s in (0.0, slope)
    ]
    flat, steep = ({f.name: v for f, v in figures(of)}["reward"].error for of in made)
    assert steep == pytest.approx(flat, rel=0.5, abs=0.05)


# ------------------------------------------------------------------ bands


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12), st.floats(1e-4, 0.5))
def test_a_band_is_the_prediction_interval_of_the_textbook(numbers, risk):
    found = band([Value(x) for x in numbers], Figure("x", "x", least=0.0), risk)
    n, mean, sd = len(numbers), statistics.fmean(numbers), statistics.stdev(numbers)
    half = scipy.stats.t.ppf(1 - risk / 2, n - 1) * sd * math.sqrt(1 + 1 / n)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.lower == pytest.approx(mean - half, rel=1e-6, abs=1e-6)
    assert found.upper == pytest.approx(mean + half, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=8), st.floats(0.1, 10))
def test_a_figure_of_factors_has_a_band_of_factors(numbers, factor):
    figure = Figure("x", "x", scale="log", least=0.0)
    one, other = (band([Value(x * by) for x in numbers], figure, 0.01) for by in (1.0, factor))
    assert other.lower == pytest.approx(one.lower * factor, rel=1e-6)
    assert other.upper == pytest.approx(one.upper * factor, rel=1e-6)


def test_equal_runs_leave_room_for_the_noise_within_them():
    figure = Figure("x", "x", least=0.0)
    assert band([Value(1.0)] * 5, figure, 0.01).upper == 1.0
    assert band([Value(1.0, 0.1)] * 5, figure, 0.01).upper > 1.4
    assert band([Value(1.0)] * 5, Figure("x", "x", least=0.2), 0.01).upper == pytest.approx(1.2)


@pytest.mark.parametrize("m", [3, 5, 8])
def test_one_more_run_seldom_leaves_its_bands(m, tmp_path):
    alarms, times = 0, 300
    for time in range(times):
        seeds = range(1000 * time, 1000 * time + m + 1)
        *then, now = (log(seed, tmp_path) for seed in seeds)
        alarms += judge(now, Recorded(1, "x", [summed_up(of) for of in then])).verdict == "FAIL"
    assert scipy.stats.binom.sf(alarms - 1, times, RISK) > 1e-4, f"{alarms} of {times}"


# ------------------------------------------------------------------ judging

CHANGES = {
    "no gain": ({"reward": lambda x, t: x - 0.6 * t}, {"gain of reward", "reward"}),
    "collapse": ({"completions/mean_length": lambda x, t: x * (1 - 0.9 * t)}, {"length"}),
    "cut": ({"completions/clipped_ratio": lambda x, t: x + 0.5}, {"clipped ratio"}),
    "cold": ({"entropy": lambda x, t: x / 2}, {"entropy"}),
    "one function": ({"rewards/format/mean": lambda x, t: 0.0}, {"reward format"}),
    "no spread": ({"frac_reward_zero_std": lambda x, t: 0.9 * t}, {"groups without spread"}),
    "steep": ({"grad_norm": lambda x, t: 20 * x}, {"gradient norm"}),
    "better": ({"reward": lambda x, t: x + t}, {"gain of reward", "reward"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_with_its_figure_and_step(name, tmp_path):
    changes, wanted = CHANGES[name]
    found = judge(log(99, tmp_path, **changes), recorded(tmp_path))
    outside = {f.figure.name: f for f in found.findings if f.outside}
    assert (found.verdict, set(outside)) == ("FAIL", wanted)
    assert all(f.left is not None and 1 <= f.left <= STEPS for f in outside.values())
    lines = found.message().splitlines()
    assert all(any(line.strip().startswith(f"{w}: ") for line in lines[1:3]) for w in wanted)
    assert "outside from step" in lines[1]


def test_the_step_is_where_the_curve_leaves(tmp_path):
    broken = {"reward": lambda x, t: x - (0.5 if t > 0.6 else 0.0)}
    found = judge(log(99, tmp_path, **broken), recorded(tmp_path))
    (reward,) = (f for f in found.findings if f.figure.name == "reward")
    assert 29 <= reward.left <= 33


def test_times_are_judged_on_the_same_hardware_alone(tmp_path):
    def judged(here, there, factor):
        slow = {"step_time": lambda x, t: x * factor}
        then = [summed_up(Log(tmp_path, tuple(rows(s)), None, there, 1e9)) for s in range(5)]
        return judge(Log(tmp_path, tuple(rows(9, **slow)), None, here, 1e9), Recorded(1, "x", then))

    assert judged("a", "a", 1.0).verdict == "PASS"
    assert judged("a", "a", 0.2).verdict == "PASS", "a faster run is no fault"
    slower = judged("a", "a", 2.0)
    assert [f.figure.name for f in slower.findings if f.outside] == ["seconds a step"]
    for here, there in (("b", "a"), (None, None), (None, "a"), ("a", None)):
        other = judged(here, there, 2.0)
        assert other.verdict == "PASS"
        assert any("seconds a step" in why for why in other.left_out)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"steps": 40}, "recorded were 50 steps, against 40 now"),
        ({"functions": ("accuracy",)}, "the rewards accuracy, format, against accuracy now"),
        ({"functions": ()}, "against none now"),
    ],
)
def test_another_training_is_not_compared(how, said, tmp_path):
    found = judge(log(99, tmp_path, **how), recorded(tmp_path))
    assert found.verdict == "ERROR"
    assert said in found.message()


def test_a_figure_that_is_no_longer_logged_is_named(tmp_path):
    rest = [{k: v for k, v in row.items() if k != "entropy"} for row in rows(99)]
    found = judge(Log(tmp_path, tuple(rest)), recorded(tmp_path))
    assert (found.verdict, "logged entropy" in found.reason) == ("ERROR", True)
    more = [{**row, "kl": 0.1} for row in rows(99)]
    found = judge(Log(tmp_path, tuple(more)), recorded(tmp_path))
    assert found.verdict == "PASS"
    assert any(why.startswith("kl, which not all") for why in found.left_out)


def test_a_run_of_which_nothing_can_be_judged_does_not_pass(tmp_path):
    runs = [msgspec.structs.replace(run, figures={}) for run in recorded(tmp_path).runs]
    found = judge(log(99, tmp_path), Recorded(1, "ours", runs))
    assert (found.verdict, "no figure of this run" in found.reason) == ("ERROR", True)


def test_only_curves_that_all_runs_have_are_drawn(tmp_path):
    def run(seed, of):
        made = rows(seed)
        return Log(tmp_path, tuple({**r, "kl": 0.1} if r["step"] <= of else r for r in made))

    then = Recorded(1, "ours", [summed_up(run(seed, 3 + seed)) for seed in range(3)])
    plot(run(9, 4), then, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    bare = [msgspec.structs.replace(of, curves={}) for of in then.runs]
    with pytest.raises(LogError, match="nothing can be drawn"):
        plot(run(9, 4), Recorded(1, "ours", bare), tmp_path / "none.png")
    with pytest.raises(LogError, match="cannot be drawn to"):
        plot(run(9, 4), then, tmp_path / "nowhere" / "curves.png")


# ------------------------------------------------------------------ recording


def test_recorded_runs_are_read_as_they_were_written(tmp_path):
    logs = [log(seed, tmp_path) for seed in range(3)]
    path = record("ours", logs, tmp_path)
    assert path == path_of("ours", tmp_path) == tmp_path / "training" / "ours.json"
    found = load(path)
    assert found == Recorded(1, "ours", [summed_up(of) for of in logs])
    assert max(map(len, path.read_text().splitlines())) < 2000
    assert judge(log(9, tmp_path), found).verdict == "PASS"


def test_runs_that_show_no_spread_are_not_recorded(tmp_path):
    with pytest.raises(LogError, match=f"at least {LEAST_RUNS}"):
        record("ours", [log(1, tmp_path), log(2, tmp_path)], tmp_path)
    with pytest.raises(LogError, match="the same curves"):
        record("ours", [log(1, tmp_path), log(2, tmp_path), log(1, tmp_path)], tmp_path)
    with pytest.raises(LogError, match="not of one training"):
        record("ours", [log(1, tmp_path), log(2, tmp_path), log(3, tmp_path, steps=40)], tmp_path)
    with pytest.raises(LogError, match="cannot be the name"):
        record("../ours", [log(seed, tmp_path) for seed in range(3)], tmp_path)
    assert not (tmp_path / "training").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"steps": 50', '"steps": -1', 1),
        lambda text: text.replace('"steps": 50', '"steps": 49', 1),
        lambda text: text.replace('"training"', '"trainings"'),
        lambda text: text.replace('"ours"', '"theirs"'),
        lambda text: text.replace('"curves": {', '"curves": {"kl": [],', 1),
        lambda text: json.dumps({**json.loads(text), "runs": json.loads(text)["runs"][:2]}),
        lambda text: text.replace('"figures": {', '"figures": {"x": [1e99, 0],', 1),
    ],
)
def test_a_damaged_file_is_one_clear_line(damage, tmp_path):
    path = record("ours", [log(seed, tmp_path) for seed in range(3)], tmp_path)
    text = path.read_text()
    damaged = damage(text)
    assert damaged != text
    path.write_text(damaged)
    with pytest.raises(LogError, match=r"ours\.json") as raised:
        load(path)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------ the command


def test_the_command_records_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.grpo-harness]\n")
    for seed in range(5):
        write(tmp_path / f"run{seed}", {"log_history": rows(seed)})
    assert main(["log", "run4", "--name", "gsm"]) == 2
    assert "no recorded runs" in capsys.readouterr().err
    assert main(["log", "run0", "run1", "run2", "run3", "--name", "gsm", "--record"]) == 0
    assert (tmp_path / "baselines" / "training" / "gsm.json").is_file()
    capsys.readouterr()
    assert main(["log", "run4", "--name", "gsm", "--plot", "curves.png"]) == 0
    assert "PASS: gsm against 4 recorded runs" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    broken = {"entropy": lambda x, t: x / 3}
    write(tmp_path / "worse", {"log_history": rows(7, **broken)})
    assert main(["log", "worse", "--name", "gsm"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAIL: gsm")
    assert "entropy: " in said
    assert main(["log", "run4", "--name", "gsm", "--plot", "run0"]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert main(["log", "run4", "--name", "gsm", "--recipe", "none.yaml"]) == 2
    assert capsys.readouterr().out == "", "the recipe is read first"
    three = ["run1", "run2", "run3"]
    assert main(["log", *three, "--name", "gsm", "--record", "--recipe", "ours.yaml"]) == 2
    assert "leave it out with --record" in capsys.readouterr().err
    assert main(["log", "run0", "run1", "--name", "gsm"]) == 2
    assert "one run is judged" in capsys.readouterr().err


def test_every_figure_has_a_name_of_its_own():
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)


# ------------------------------------------------------------------ the suite


def test_the_suite_judges_the_training_that_is_named(project):
    suite = Path(__file__).parents[1] / "suites" / "test_training_run.py"
    (project.path / "test_own.py").write_text(suite.read_text())
    run(project, deselected=2)
    for seed in range(4):
        write(project.path / f"run{seed}", {"log_history": rows(seed)})
    run(project, "--grpo-training", "run3", errors=1).stdout.fnmatch_lines(["*no recorded runs*"])
    logs = [read(project.path / f"run{seed}") for seed in range(3)]
    record("default", logs, project.path / "baselines")
    run(project, "--grpo-training", "run3", "--grpo-report", "report", passed=1)
    assert (project.path / "report" / "training.png").is_file()
    broken = {"entropy": lambda x, t: x / 3}
    write(project.path / "worse", {"log_history": rows(7, **broken)})
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace("problems = 64", 'training = "worse"', 1))
    run(project, failed=1).stdout.fnmatch_lines(["*FAIL: default against 3*", "*entropy: *below*"])
    run(project, "--grpo-training", "nowhere", errors=1).stdout.fnmatch_lines(["*does not exist*"])
