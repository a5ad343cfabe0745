"""The gate holds its promises on simulated runs, and every mutant of it breaks one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from grpo_harness.tasks import task_types
from tools.calibration import __main__ as command
from tools.calibration import false_alarms, promises
from tools.calibration.__main__ import STUDIES, default_seed, main
from tools.calibration.gates import MUTANTS, decide, reference
from tools.calibration.promises import CHANCE, QUICK, Bound, Promise, rows
from tools.calibration.report import table
from tools.calibration.simulation import HARMS, Batch, Draws, Pattern, Scenario
from tools.calibration.studies import Study, step_down

SMALL = replace(QUICK, studies=100)
OBVIOUS = {"tolerance .05", "tolerance", "drops alone", "means of 64"}
"""The mutants of studies that a small one shows."""


def test_the_gate_keeps_its_promises_and_no_mutant_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "The gate keeps every promise" in printed
    assert all(mutant in printed for mutant in MUTANTS)
    assert (tmp_path / "calibration.txt").read_text(encoding="utf-8") == printed
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__)
def test_the_gate_keeps_its_promises_over_several_runs(study) -> None:
    seed = default_seed()
    found = study(Draws(seed), SMALL)
    text, broken = table(found.rows)
    told = f"--seed {seed}\n{found.title}\n{text}"
    assert not broken - set(found.mutants), told
    assert OBVIOUS & set(found.mutants) <= broken, told


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch):
    """Let the command hold nothing but this one promise."""

    def only(bound: Bound) -> None:
        monkeypatch.setattr(promises, "core_bounds", lambda *_: [bound])
        for others in ("alarm_bounds", "power_bounds", "announced_bounds"):
            monkeypatch.setattr(promises, others, lambda *_: [])

    return only


def test_a_gate_that_breaks_a_promise_fails_the_calibration(
    promised, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed = Draws(0)(Scenario(64, 4, pattern="spread", drop=0.3), 50)
    promised(Bound(harmed, "FAIL", high=0.01))
    assert main(["--quick", "--seed", "0"]) == 1
    printed = capsys.readouterr().out
    assert "100.0*" in printed
    assert "gate breaks a promise" in printed


def test_a_mutant_that_survives_fails_the_calibration(
    promised, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    promised(Bound(Draws(0)(Scenario(64, 4), 50), "FAIL", high=0.01))
    monkeypatch.setattr(command, "MUTANTS", {"identical": reference})
    assert main(["--quick", "--seed", "0"]) == 1
    assert "no promise is broken by identical" in capsys.readouterr().out


def test_a_study_counts_like_the_rest(
    promised, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    promised(Bound(Draws(0)(Scenario(64, 4), 50), "FAIL", high=0.01))
    monkeypatch.setattr(command, "MUTANTS", {})
    outcomes = {"kept": np.zeros(50, bool), "broken": np.ones(50, bool)}
    study = Study("Always", [(Promise("x", "event", high=0.5), outcomes)], ("kept",))
    monkeypatch.setattr(command, "STUDIES", [lambda *_: study])
    monkeypatch.setattr(command, "QUICK", replace(QUICK, studies=1))
    assert main(["--quick", "--seed", "0"]) == 1
    printed = capsys.readouterr().out
    assert "Always: broken breaks a promise" in printed
    assert "Always: no promise is broken by kept" in printed


@pytest.mark.parametrize("pattern", HARMS)
def test_an_injected_drop_is_as_large_as_it_says(pattern: Pattern) -> None:
    rng = np.random.default_rng(0)
    now, then = Scenario(512, 8, pattern=pattern, drop=0.05).draw(rng, 200)
    drops = (then / 16).mean(axis=1) - (now / 8).mean(axis=1)
    assert drops.mean() == pytest.approx(0.05, abs=4 * drops.std() / 200**0.5)


def test_simulated_skill_is_as_specified() -> None:
    _, then = Scenario(4096, 4).draw(np.random.default_rng(0), 20)
    rates = then / 16
    assert rates.mean() == pytest.approx(0.7, abs=0.01)
    # Of the variance of one sample, half lies between problems; a 16th of the rest is noise.
    assert rates.var() == pytest.approx(0.7 * 0.3 * (0.5 + 0.5 / 16), rel=0.03)


def test_draws_depend_on_seed_and_scenario_alone() -> None:
    one, again, other = (Draws(s)(Scenario(64, 4), 3) for s in (1, 1, 2))
    assert (one.now == again.now).all()
    assert (one.now != other.now).any()
    assert (one.then != Draws(1)(Scenario(64, 8), 3).then).any()


def test_the_predictions_of_power_enclose_it_and_meet_at_large_n() -> None:
    small, large = (Draws(0)(Scenario(n, 4), 20) for n in (64, 4096))
    assert small.predicted_power(0.05) < small.predicted_power(0.05, guarded=False) - 0.1
    assert large.predicted_power(0.01) == pytest.approx(
        large.predicted_power(0.01, guarded=False), abs=0.01
    )


def test_a_session_has_a_verdict_if_one_of_its_checks_has() -> None:
    batch = Batch(Scenario(64, 4, checks=2), np.zeros((4, 64), int), np.zeros((4, 64), int))
    bound = Bound(batch, "FAIL", high=0.5)
    names = decide(np.array([False, True, False, False]), np.zeros(4, bool))
    assert bound.sessions(lambda _: names).tolist() == [True, False]


@pytest.mark.parametrize(
    ("low", "high", "hits", "broken"),
    [
        (0.0, 0.1, 0, False),
        (0.0, 0.1, 12, False),
        (0.0, 0.1, 50, True),
        (0.1, 1.0, 0, True),
        (0.1, 1.0, 9, False),
        (0.1, 1.0, 50, False),
        (0.3, 0.6, 45, False),
        (0.3, 0.6, 10, True),
        (0.3, 0.6, 80, True),
    ],
)
def test_a_promise_is_broken_beyond_chance_only(
    low: float, high: float, hits: int, broken: bool
) -> None:
    promise = Promise("x", "event", low, high)
    assert promise.broken(np.arange(100) < hits, CHANCE) == broken


@pytest.mark.parametrize(("mean", "broken"), [(0.4, False), (0.6, False), (0.7, True)])
def test_a_promise_of_a_mean_is_broken_beyond_chance_only(mean: float, broken: bool) -> None:
    numbers = mean + np.random.default_rng(0).normal(0, 0.1, 100)
    assert (
        Promise("x", "problems", high=0.6).broken(numbers - numbers.mean() + mean, CHANCE) == broken
    )


def test_a_promise_says_its_limits() -> None:
    limits = [(0.0, 0.015), (0.95, 1.0), (0.2, 0.5)]
    said = [str(Promise("x", "FAIL", low, high)) for low, high in limits]
    assert said == ["FAIL <= 1.5 %", "FAIL >= 95 %", "FAIL 20 to 50 %"]


@pytest.mark.parametrize("by_rule", [False, True])
def test_the_table_names_the_gates_that_break_a_promise(by_rule: bool) -> None:
    batch = Draws(0)(Scenario(64, 4), 100)
    gates = {"calm": reference, "shrill": lambda b: np.full(len(b.now), "FAIL")}
    text, broken = table(rows([Bound(batch, "FAIL", high=0.01)], gates), by_rule=by_rule)
    assert broken == {"shrill"}
    assert text.count("*") == 1
    assert "100.0*" in text


def test_holm_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, (2, 12)).round(2)
    expected = [multipletests(session, method="holm")[1] for session in p]
    assert step_down(p) == pytest.approx(np.array(expected))


@pytest.mark.heavy
def test_false_alarms_are_counted_on_the_real_pair(capfd):
    """One run of the length suite: its checks are counted, and the seed is named."""
    assert false_alarms.main(["--runs", "1", "--suite", "suites/test_length.py"]) == 0
    first, last = capfd.readouterr().out.splitlines()
    assert first.startswith("run 1, seed ")
    counted = json.loads(last.partition("checks: ")[2])
    assert sum(counted.values()) == 2 * len(task_types()) * 3
