"""The gate holds its promises on simulated runs, and every mutant of it breaks one."""

from pathlib import Path

import numpy as np
import pytest

from harness import calibration
from harness.calibration import (
    HARMS,
    MUTANTS,
    Batch,
    Bound,
    Draws,
    Scenario,
    decide,
    main,
    reference,
    table,
)


def test_the_gate_keeps_its_promises_and_no_mutant_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "The gate keeps every promise." in printed
    assert all(mutant in printed for mutant in MUTANTS)
    assert (tmp_path / "calibration.txt").read_text(encoding="utf-8") == printed
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")


def test_a_gate_that_breaks_a_promise_fails_the_calibration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed = Draws(0)(Scenario(64, 4, pattern="spread", drop=0.3), 50)
    monkeypatch.setattr(calibration, "core_bounds", lambda *_: [Bound(harmed, "FAIL", 0.01)])
    monkeypatch.setattr(calibration, "further_bounds", lambda *_: [])
    monkeypatch.setattr(calibration, "power_bounds", lambda *_: [])
    assert main(["--seed", "0"]) == 1
    assert "100.0*" in capsys.readouterr().out


def test_a_mutant_that_survives_fails_the_calibration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unharmed = Draws(0)(Scenario(64, 4), 50)
    monkeypatch.setattr(calibration, "core_bounds", lambda *_: [Bound(unharmed, "FAIL", 0.01)])
    monkeypatch.setattr(calibration, "further_bounds", lambda *_: [])
    monkeypatch.setattr(calibration, "power_bounds", lambda *_: [])
    monkeypatch.setattr(calibration, "MUTANTS", {"identical": reference})
    assert main(["--seed", "0"]) == 1
    assert "No promise is broken by the mutant: identical" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", HARMS)
def test_an_injected_drop_is_as_large_as_it_says(pattern: calibration.Pattern) -> None:
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


def test_a_session_has_a_verdict_if_one_of_its_checks_has() -> None:
    batch = Batch(Scenario(64, 4, checks=2), np.zeros((4, 64), int), np.zeros((4, 64), int))
    bound = Bound(batch, "FAIL", 0.5)
    names = decide(np.array([False, True, False, False]), np.zeros(4, bool))
    assert bound.sessions(lambda _: names).tolist() == [True, False]


@pytest.mark.parametrize(
    ("hits", "least", "broken"),
    [(0, False, False), (50, False, True), (0, True, True), (50, True, False), (12, False, False)],
)
def test_a_bound_is_broken_beyond_chance_only(hits: int, least: bool, broken: bool) -> None:
    batch = Batch(Scenario(64, 4), np.zeros((100, 64), int), np.zeros((100, 64), int))
    failed = np.arange(100) < hits
    bound = Bound(batch, "FAIL", 0.1, least)
    share, is_broken = bound.measure(lambda _: decide(failed, ~failed), 0.001)
    assert (share, is_broken) == (hits / 100, broken)


def test_the_table_names_the_gates_that_break_a_promise() -> None:
    batch = Draws(0)(Scenario(64, 4), 100)
    gates = {"calm": reference, "shrill": lambda b: np.full(len(b.now), "FAIL")}
    frame, broken = table([Bound(batch, "FAIL", 0.01)], gates)
    assert broken == {"shrill"}
    assert frame["shrill"].tolist() == ["100.0*"]
