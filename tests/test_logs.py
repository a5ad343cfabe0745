"""A training's log: read without trust, summed up, and judged by recorded runs."""

import json
import math
import random
import statistics
from pathlib import Path

import matplotlib.figure
import msgspec
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.cli import main
from grpo_harness.logs.figures import FIGURES, Figure, Value, figures
from grpo_harness.logs.hacking import LEAST_STEPS, hacking
from grpo_harness.logs.hacking import RISK as RISK_OF_A_CHANGE
from grpo_harness.logs.judge import RISK, Band, Finding, band, bands, judge
from grpo_harness.logs.plot import plot
from grpo_harness.logs.read import Log, LogError, read
from grpo_harness.logs.recorded import (
    LEAST_RUNS,
    WINDOWS,
    Recorded,
    Window,
    load,
    path_of,
    record,
    summed_up,
    windows,
)
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
    write(tmp_path / "ours", {"recipe": {"name": "nano"}, "processes": 2}, "recipe.json")
    ours = read(tmp_path / "ours")
    assert (ours.rows, ours.training, ours.processes) == (tuple(rows(3)), "nano", 2)
    assert (found.training, found.processes) == (None, None)
    assert read(tmp_path / "ours" / "log.json").rows == tuple(rows(3))


def test_a_step_in_two_rows_and_figures_that_a_step_lacks(tmp_path):
    """A callback may log in a row of its own; the trainer logs None for what JSON lacks."""
    history = [*rows(1), {"step": 10, "loss": rows(1)[9]["loss"], "extra": 2.0, "note": "x"}]
    history[3]["entropy"] = None
    found = read(write(tmp_path, {"log_history": history}))
    assert found.rows[9] == {**rows(1)[9], "extra": 2.0}
    assert len(found.series("entropy")) == STEPS - 1


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda made: [*made, rows(2)[9]], r"step 10 is logged twice, with \S+ = \S+ and"),
        (lambda made: made[:19] + made[30:], "logs every 1 steps, and none from 20 to 30"),
        (lambda made: made[10:], "none from 1 to 10"),
        (lambda made: made[29::20], "every 20 steps, and none from 1 to 29"),
        (lambda made: made[4:20:5] + made[29::5], "every 5 steps, and none from 21 to 29"),
    ],
)
def test_a_log_with_a_hole_or_of_two_runs_is_one_clear_line(edit, said, tmp_path):
    write(tmp_path, {"log_history": edit(rows(1))})
    with pytest.raises(LogError, match=said) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [slice(9, None, 10), slice(None), slice(None, 30)])
def test_a_log_of_every_few_steps_is_whole(kept, tmp_path):
    history = sorted([rows(1)[0], *rows(1)[kept]], key=lambda row: row["step"])
    assert read(write(tmp_path, {"log_history": history})).rows[-1] == rows(1)[kept][-1]


@pytest.mark.parametrize("name", ["our run 2", "größer", "数学", "a+b.c-d_e"])
def test_a_recipes_name_is_the_trainings_in_any_script(name, tmp_path):
    for seed in range(3):
        write(tmp_path / str(seed), rows(seed), "log.json")
        write(tmp_path / str(seed), {"recipe": {"name": name}}, "recipe.json")
    logs = [read(tmp_path / str(seed)) for seed in range(3)]
    assert {of.training for of in logs} == {name}
    assert load(record(name, logs, tmp_path)).training == name


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 65, " x", "x ", "\x1b[31m", ".x", "a\nb"])
def test_a_name_that_no_file_can_have_is_said_and_not_default(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.grpo-harness]\n")
    write(tmp_path / "run", rows(1), "log.json")
    write(tmp_path / "run", {"recipe": {"name": name}}, "recipe.json")
    assert main(["log", "run"]) == 2
    said = capsys.readouterr().err
    assert "cannot be the name of a training" in said
    assert said.count("\n") == 1
    assert "\x1b" not in said


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
        ('{"log_history": [{"reward": 1, "step": 1}, {"loss": 1, "step": 2}]}', "fewer than two"),
        ('{"log_history": [{"reward": NaN, "step": 1}]}', "reward = nan"),
        ('{"log_history": [{"loss": Infinity, "step": 1}]}', "loss = inf"),
        ('{"log_history": [{"reward": 1e300, "step": 1}]}', "from which no training recovers"),
        ('{"log_history": [{"reward": [1], "step": 1}]}', r"reward = \[1\], which is no number"),
        ('{"log_history": [{"reward": true, "step": 1}]}', "reward = True, which is no number"),
        ('{"log_history": [{"reward": "high", "step": 1}]}', "reward = 'high', which is no number"),
        ('{"log_history": [{"reward": 1, "step": "1"}]}', "step = '1', which is no number"),
        ('{"log_history": [{"reward": 1, "kl": %s}]}' % ("[" * 9000), "cannot be read"),
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


def test_standard_errors_are_those_of_white_noise():
    """Noise of variance 1: a fifth of 50 steps has the variance 1/10, a gain twice that."""
    luck, found = random.Random(1), []
    for _ in range(400):
        noise = (luck.gauss(0, 1) for _ in range(STEPS))
        run = Log(None, tuple({"step": i, "reward": x} for i, x in enumerate(noise)))
        found.append({figure.name: value for figure, value in figures(run)})
    for name, variance in (
        ("reward", 1 / 10), ("gain of reward", 2 / 10), ("reward of all steps", 1 / STEPS),
    ):  # fmt: skip
        claimed = statistics.fmean(of[name].error ** 2 for of in found)
        seen = statistics.variance(of[name].number for of in found)
        assert claimed == pytest.approx(variance, rel=0.2), name
        assert seen == pytest.approx(variance, rel=0.2), name


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


def test_the_windows_of_a_curve_share_the_risk_and_are_as_wide_as_the_whole_curve(tmp_path):
    """Of five runs: one window in which they agree by chance, and one in which they do not."""
    curves = [[[1, 5, 1.0], [6, 9, 2.0 + off]] for off in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    runs = [
        msgspec.structs.replace(run, curves={"x": msgspec.convert(curve, list[Window])})
        for run, curve in zip(recorded(tmp_path).runs, curves, strict=True)
    ]
    agreed, other = bands(runs, "x", Figure("x", "x", least=0.0), 0.05)
    quantile = scipy.stats.t.ppf(1 - 0.05 / 2 / 2, 4) * math.sqrt(1 + 1 / 5)
    variance = statistics.variance((-0.2, -0.1, 0.0, 0.1, 0.2))
    assert agreed.upper - 1 == pytest.approx(quantile * math.sqrt(variance / 2))
    assert other.upper - 2 == pytest.approx(quantile * math.sqrt(variance))


def test_equal_runs_leave_room_for_the_noise_within_them():
    figure = Figure("x", "x", least=0.0)
    assert band([Value(1.0)] * 5, figure, 0.01).upper == 1.0
    # Half of the error, in a prediction interval of five.
    wanted = 1 + scipy.stats.t.ppf(0.995, 4) * 0.05 * math.sqrt(1 + 1 / 5)
    assert band([Value(1.0, 0.1)] * 5, figure, 0.01).upper == pytest.approx(wanted)
    assert band([Value(1.0)] * 5, Figure("x", "x", least=0.2), 0.01).upper == pytest.approx(1.2)


def test_what_happens_once_in_a_few_runs_is_no_alarm(tmp_path):
    """One of two groups in one of 30 steps, and no such step in the recorded runs."""

    def none(value, done):
        return 0.0

    def once(value, done):
        return 0.5 * (done == 0.5)

    def often(value, done):
        return 0.5 * (done > 0.5)

    then = recorded(tmp_path, steps=30, frac_reward_zero_std=none)
    for change, outside in ((none, False), (once, False), (often, True)):
        found = judge(log(9, tmp_path, steps=30, frac_reward_zero_std=change), then)
        (finding,) = (f for f in found.findings if f.figure.name == "groups without spread")
        assert finding.outside is outside, finding


@pytest.mark.parametrize("m", [3, 5, 8])
def test_one_more_run_seldom_leaves_its_bands(m, tmp_path):
    alarms, times = 0, 300
    for time in range(times):
        seeds = range(1000 * time, 1000 * time + m + 1)
        *then, now = (log(seed, tmp_path) for seed in seeds)
        alarms += judge(now, Recorded(1, "x", [summed_up(of) for of in then])).verdict == "FAIL"
    assert scipy.stats.binom.sf(alarms - 1, times, RISK) > 1e-4, f"{alarms} of {times}"


def test_runs_of_two_kinds_seldom_leave_their_bands(tmp_path):
    """One of six ends its entropy a fifth lower, and the recorded five are often all of a kind."""
    alarms, times, luck = 0, 200, random.Random(4)

    def entropy_of(seed):
        end = 0.4 if luck.random() < 1 / 6 else 0.5
        return log(seed, tmp_path, entropy=lambda x, t: 1.5 * (end / 1.5) ** t)

    for time in range(times):
        *then, now = (entropy_of(seed) for seed in range(6 * time, 6 * time + 6))
        found = judge(now, Recorded(1, "x", [summed_up(of) for of in then]))
        alarms += any(f.figure.name == "entropy" and f.outside for f in found.findings)
    assert alarms <= 4, f"{alarms} of {times}"
    cold = judge(
        log(99, tmp_path, entropy=lambda x, t: 1.5 * (0.2 / 1.5) ** t),
        Recorded(1, "x", [summed_up(entropy_of(seed)) for seed in range(5)]),
    )
    assert "entropy" in {f.figure.name for f in cold.findings if f.outside}


# ------------------------------------------------------------------ judging

CHANGES = {
    "no gain": (
        {"reward": lambda x, t: x - 0.6 * t},
        {"gain of reward", "reward", "reward of all steps"},
    ),
    "collapse": ({"completions/mean_length": lambda x, t: x * (1 - 0.9 * t)}, {"length"}),
    "cut": ({"completions/clipped_ratio": lambda x, t: x + 0.5}, {"clipped ratio"}),
    "cold": ({"entropy": lambda x, t: x / 6}, {"entropy"}),
    "one function": ({"rewards/format/mean": lambda x, t: 0.0}, {"reward format"}),
    "no spread": ({"frac_reward_zero_std": lambda x, t: 0.9 * t}, {"groups without spread"}),
    "steep": ({"grad_norm": lambda x, t: 20 * x}, {"gradient norm"}),
    "better": ({"reward": lambda x, t: x + t}, {"gain of reward", "reward", "reward of all steps"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_with_its_figure_and_step(name, tmp_path):
    changes, wanted = CHANGES[name]
    found = judge(log(99, tmp_path, **changes), recorded(tmp_path))
    outside = {f.figure.name: f for f in found.findings if f.outside}
    assert (found.verdict, set(outside)) == ("FAIL", wanted)
    assert all(f.left is not None and 1 <= f.left <= STEPS for f in outside.values())
    lines = found.message().splitlines()
    first = lines[1 : len(wanted) + 1]
    assert all(any(line.strip().startswith(f"{w}: ") for line in first) for w in wanted)
    assert "outside from step" in lines[1]


def test_figures_are_columns_and_shares_stay_shares(tmp_path):
    cut = [
        log(s, tmp_path, **{"completions/clipped_ratio": lambda x, t, s=s: s / 5}) for s in range(3)
    ]
    found = judge(log(99, tmp_path), Recorded(1, "ours", [summed_up(run) for run in cut]))
    cells = [line for line in found.message().splitlines() if "recorded runs" in line][1:]
    cells = [line for line in cells if " to " in line]
    assert len({line.index("recorded runs") for line in cells}) == 1, "one column"
    for name in ("clipped ratio", "groups without spread"):
        (line,) = (line for line in cells if line.startswith(f"  {name}:"))
        low, high = line.split("recorded runs ")[1].split(" to ")
        assert 0 <= float(low) <= float(high) <= 1
    (band,) = (f.band for f in found.findings if f.figure.name == "clipped ratio")
    assert band.lower < 0, "what is judged is the whole interval"


def test_memory_is_shown_in_mebibytes():
    (memory,) = (figure for figure in FIGURES if figure.name == "peak memory")
    found = Finding(memory, 3 * 2**20, Band(2**20, 2**21, 2**22))
    assert found.row() == ("peak memory:", "3 MiB", "recorded runs 1 MiB to 4 MiB")


def test_the_step_is_where_the_curve_leaves(tmp_path):
    broken = {"reward": lambda x, t: x - (0.5 if t > 0.6 else 0.0)}
    found = judge(log(99, tmp_path, **broken), recorded(tmp_path))
    (reward,) = (f for f in found.findings if f.figure.name == "reward")
    assert 29 <= reward.left <= 33


@pytest.mark.parametrize(("noise", "m"), [(0.0, 5), (0.3, 3)])
def test_a_band_that_can_find_nothing_says_so(noise, m, tmp_path):
    """Recorded runs end 0.3 apart: with three of them, a run that gains nothing is in the band."""
    luck = random.Random(3)

    def made(seed, gain):
        off = noise * luck.gauss(0, 1)
        return log(seed, tmp_path, reward=lambda x, t: x + (off + gain) * t)

    then = Recorded(1, "ours", [summed_up(made(seed, 0.0)) for seed in range(m)])
    flat = judge(made(99, -0.6), then)
    if not noise:
        assert (flat.verdict, flat.blind) == ("FAIL", [])
        return
    assert flat.verdict == "UNPROVEN"
    (gain,) = (f for f in flat.findings if f.figure.name == "gain of reward")
    assert gain.least == pytest.approx((gain.band.upper - gain.band.lower) / 2)
    assert f"blind: gain of reward: only a change of more than {gain.least:.2g}" in flat.message()
    assert "3 recorded runs make these bands too wide: record more" in flat.message()


def decisive_run(seed, right, form, steps=STEPS):
    """A run whose total is the sum of two rewards, which change by so much."""
    luck, made = random.Random(seed), []
    for step in range(1, steps + 1):
        a = 0.5 + right * step / steps + luck.gauss(0, 0.1)
        b = 0.5 + form * step / steps + luck.gauss(0, 0.1)
        made.append({"step": step, "reward": a + b, "rewards/a/mean": a, "rewards/b/mean": b})
    return Log(Path("run"), tuple(made))


@pytest.mark.parametrize(
    ("right", "form", "most", "least"),
    [
        (0.0, 0.0, 0.01, 0.0),
        (0.0, 0.6, 0.03, 0.0),  # the hardest case that is honest: correctness stays as it is
        (0.3, 0.3, 0.01, 0.0),
        (-0.3, -0.3, 0.01, 0.0),  # both fall: that is no hacking, and the curves show it
        (-0.4, 0.8, 1.0, 0.95),
    ],
)
def test_a_reward_that_rises_while_the_decisive_one_falls(right, form, most, least):
    found = [hacking(decisive_run(seed, right, form), {"a", "other"}) for seed in range(200)]
    share = sum(of.verdict == "FAIL" for of in found) / len(found)
    assert least <= share <= most
    if least:
        said = next(of for of in found if of.verdict == "FAIL").message()
        assert "decisive reward: a -0." in said
        assert "the total +0." in said


@pytest.mark.parametrize("steps", [LEAST_STEPS, 40])
def test_the_noise_of_a_change_is_the_quantile_of_the_textbook(steps):
    """Of Student's t; the total and the other reward share the risk that one of them rises."""
    run = decisive_run(3, 0.0, 0.0, steps=steps)
    found = hacking(run, {"a"})

    def noise(key, risk):
        error = Figure("", key, "gain").of(run).error
        return pytest.approx(scipy.stats.t.ppf(1 - risk, 2 / 3 * (steps - 1)) * error)

    assert found.decisive.noise == noise("rewards/a/mean", RISK_OF_A_CHANGE)
    total, other = found.others
    assert total.noise == noise("reward", RISK_OF_A_CHANGE / 2)
    assert other.noise == noise("rewards/b/mean", RISK_OF_A_CHANGE / 2)


def test_a_reward_that_few_steps_logged_is_not_compared():
    run = decisive_run(1, -0.4, 0.8)
    rare = [{k: v for k, v in r.items() if "/b/" not in k or r["step"] % 10 == 0} for r in run.rows]
    found = hacking(Log(Path("run"), tuple(rare)), {"a"})
    assert found.verdict == "UNPROVEN"
    assert "too few" in found.reason


def test_without_a_decisive_reward_nothing_is_said_to_be_hacked():
    run = decisive_run(1, -0.4, 0.8)
    for names in ((), ("c",), ("a", "b")):
        found = hacking(run, names)
        assert found.verdict == "UNPROVEN"
        assert "which of the rewards a, b decides correctness" in found.message()
    assert "too few" in hacking(decisive_run(1, -0.4, 0.8, steps=9), {"a"}).reason
    one = Log(Path("run"), tuple({k: r[k] for k in list(r)[:3]} for r in run.rows))
    assert "one reward" in hacking(one, {"a"}).reason


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


def test_memory_is_judged_on_the_same_hardware_alone(tmp_path):
    def judged(here, memory):
        then = [summed_up(Log(tmp_path, tuple(rows(s)), None, "a", 1e9)) for s in range(5)]
        return judge(Log(tmp_path, tuple(rows(9)), None, here, memory), Recorded(1, "x", then))

    assert judged("a", 0.5e9).verdict == "PASS", "less memory is no fault"
    more = judged("a", 2e9)
    assert [f.figure.name for f in more.findings if f.outside] == ["peak memory"]
    other = judged("b", 2e9)
    assert other.verdict == "PASS"
    assert any("peak memory" in why for why in other.left_out)
    assert judged(None, None).verdict == "PASS", "a run that was not measured"


def test_a_figure_that_stays_and_one_of_the_machine_are_not_blind(tmp_path):
    """A band as narrow as bands are finds what can be found, and times are judged as they come."""

    def made(seed):
        slow = 1 + seed % 4
        how = {"step_time": lambda x, t: slow, "completions/clipped_ratio": lambda x, t: 0.0}
        return Log(tmp_path, tuple(rows(seed, **how)), None, "a", 1e9)

    found = judge(made(99), Recorded(1, "x", [summed_up(made(seed)) for seed in range(4)]))
    figures = {f.figure.name: f for f in found.findings}
    still, slow = figures["clipped ratio"], figures["seconds a step"]
    assert still.least >= still.figure.least > still.moved == 0
    assert slow.least > slow.moved == 0
    assert not still.blind
    assert not slow.blind


def test_a_machine_that_others_use_too_is_no_slower_code(tmp_path):
    """Its steps take up to four times as long most of the time, and some have it to themselves."""

    def judged(factor, slow):
        luck = random.Random(factor)
        shared = {"step_time": lambda x, t: x * factor * luck.choice(slow)}
        then = [summed_up(Log(tmp_path, tuple(rows(s)), None, "a", 1e9)) for s in range(5)]
        now = Log(tmp_path, tuple(rows(9, **shared)), None, "a", 1e9)
        found = judge(now, Recorded(1, "x", then)).findings
        return [f.figure.name for f in found if f.outside]

    assert judged(1.0, (1, 2, 3, 4)) == []
    assert judged(1.7, (1, 2, 3, 4)) == ["seconds a step"]
    assert judged(1.7, (1,)) == ["seconds a step"]


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


def test_the_picture_has_a_place_for_each_curve_and_none_that_is_empty(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda picture, *_, **__: drawn.append(picture)
    )
    plot(log(9, tmp_path), recorded(tmp_path), tmp_path / "curves.png")
    (picture,) = drawn
    titles = [axes.get_title() for axes in picture.axes]
    keys = [figure.key for figure, _ in figures(log(9, tmp_path))]
    assert titles == [*dict.fromkeys(keys)], "the rewards of functions too"
    assert "rewards/format/mean" in titles
    for axes in picture.axes:
        assert len(axes.lines) == 6, "five recorded runs and this one"
        (shade,) = axes.collections
        low = shade.get_paths()[0].vertices[:, 1].min()
        never_negative = min(line.get_ydata().min() for line in axes.lines) >= 0
        assert low >= 0 or not never_negative
        if axes.get_title() in {"completions/clipped_ratio", "frac_reward_zero_std"}:
            assert shade.get_paths()[0].vertices[:, 1].max() <= 1


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
        plot(run(9, 4), then, tmp_path / "curves.png" / "curves.png")


# ------------------------------------------------------------------ recording


@pytest.mark.parametrize("steps", [7, WINDOWS, 50, 59])
def test_the_windows_of_a_curve_have_every_step_once(steps, tmp_path):
    run = log(1, tmp_path, steps=steps)
    found = windows(run, "reward")
    assert [n for w in found for n in range(w.first, w.last + 1)] == [*range(1, steps + 1)]
    sizes = [w.last - w.first + 1 for w in found]
    assert (len(found), max(sizes) - min(sizes) <= 1) == (min(steps, WINDOWS), True)
    for w in found:
        part = [row["reward"] for row in run.rows if w.first <= row["step"] <= w.last]
        assert w.mean == pytest.approx(statistics.fmean(part))


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
    assert main(["log", "run4", "--name", "gsm", "--plot", "new/curves.png"]) == 0
    assert "PASS: gsm against 4 recorded runs" in capsys.readouterr().out
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")
    broken = {"entropy": lambda x, t: x / 6}
    write(tmp_path / "worse", {"log_history": rows(7, **broken)})
    assert main(["log", "worse", "--name", "gsm"]) == 1
    said = capsys.readouterr().out
    assert "\nFAIL: gsm" in said
    assert said.startswith("not judged: reward without correctness")
    assert "entropy: " in said
    assert main(["log", "run4", "--name", "gsm", "--plot", "run0"]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert main(["log", "run4", "--name", "gsm", "--recipe", "none.yaml"]) == 2
    assert capsys.readouterr().out == "", "the recipe is read first"
    three = ["run1", "run2", "run3"]
    assert main(["log", *three, "--name", "gsm", "--record", "--recipe", "ours.yaml"]) == 2
    assert "leave it out with --record" in capsys.readouterr().err
    sold = {"rewards/accuracy/mean": lambda x, t: x - t, "reward": lambda x, t: x}
    write(tmp_path / "sold", {"log_history": rows(8, **sold)})
    capsys.readouterr()
    assert main(["log", "sold", "--name", "new", "--decisive", "accuracy"]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("FAIL: reward without correctness"), "it needs no recorded runs"
    assert "no recorded runs" in told.err
    assert main(["log", "sold", "--name", "gsm", "--decisive", "acuracy"]) == 2
    assert "rewards are accuracy, format" in capsys.readouterr().err
    assert main(["log", "run0", "run1", "--name", "gsm"]) == 2
    assert "one run is judged" in capsys.readouterr().err


def test_every_figure_has_a_name_of_its_own():
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)


# ------------------------------------------------------------------ the suite


def test_every_verdict_on_a_training_is_shown(project):
    """The curves and the checkpoint are of the same training: neither hides the other."""
    (project.path / "test_own.py").write_text(
        "from grpo_harness.plugin.assertions import conclude\n"
        "def test_curves(request):\n"
        "    said = 'UNPROVEN: bands too wide'\n"
        "    conclude(request.node, 'curves', 'ours', 'runs', 'UNPROVEN', said)\n"
        "def test_checkpoint(request):\n"
        "    said = 'UNPROVEN: noise too wide'\n"
        "    conclude(request.node, 'checkpoint', 'ours', 'log', 'UNPROVEN', said)\n"
    )
    said = project.runpytest_subprocess().stdout
    assert "UNPROVEN: " not in said.str(), "the verdict is said once"
    said.fnmatch_lines_random(["UNPROVEN curves, ours*bands too wide"])
    said.fnmatch_lines_random(["UNPROVEN checkpoint, ours*noise too wide"])


def test_the_suite_judges_the_training_that_is_named(project):
    suite = Path(__file__).parents[1] / "suites" / "test_training_run.py"
    (project.path / "test_own.py").write_text(suite.read_text())
    run(project, deselected=3)
    for seed in range(4):
        write(project.path / f"run{seed}", {"log_history": rows(seed)})
    run(project, "--grpo-training", "run3", errors=1, skipped=1).stdout.fnmatch_lines(
        ["*no recorded runs*"]
    )
    logs = [read(project.path / f"run{seed}") for seed in range(3)]
    record("default", logs, project.path / "baselines")
    run(project, "--grpo-training", "run3", "--grpo-report", "report", passed=1, skipped=1)
    assert (project.path / "report" / "training.png").is_file()
    broken = {"entropy": lambda x, t: x / 6}
    write(project.path / "worse", {"log_history": rows(7, **broken)})
    table = project.path / "pyproject.toml"
    table.write_text(table.read_text().replace("problems = 64", 'training = "worse"', 1))
    run(project, failed=1, skipped=1).stdout.fnmatch_lines(
        ["*FAIL: default against 3*", "*entropy: *below*"]
    )
    run(project, "--grpo-training", "nowhere", errors=2).stdout.fnmatch_lines(["*does not exist*"])
