"""A rerun adds to the evidence of the runs before it that did not pass."""

import pytest

from grpo_harness.reruns import POOLED, Attempt, Reruns
from grpo_harness.store import StoreError


@pytest.fixture
def attempts(tmp_path):
    return Reruns(tmp_path / "cache")


def seeds(found):
    return [attempt.seed for attempt in found]


def test_nothing_precedes_the_first(attempts):
    assert attempts.before("a", 1) == []


def test_what_did_not_pass_precedes_the_next(attempts):
    attempts.add("a", Attempt(1, 256, "FAIL", 0.01))
    attempts.add("b", Attempt(9, 256, "FAIL", 0.01))
    attempts.add("a", Attempt(2, 128, "UNPROVEN", 0.01))
    assert attempts.before("a", 3) == [
        Attempt(1, 256, "FAIL", 0.01),
        Attempt(2, 128, "UNPROVEN", 0.01),
    ]


def test_a_pass_ends_the_series(attempts):
    attempts.add("a", Attempt(1, 256, "FAIL", 0.01))
    attempts.add("a", Attempt(2, 256, "PASS", 0.01))
    assert attempts.before("a", 3) == []
    attempts.add("a", Attempt(3, 256, "UNPROVEN", 0.01))
    assert seeds(attempts.before("a", 4)) == [3]


def test_a_replay_is_no_attempt(attempts):
    attempts.add("a", Attempt(7, 256, "PASS", 0.01))
    attempts.add("a", Attempt(8, 256, "FAIL", 0.01))
    attempts.add("a", Attempt(7, 256, "PASS", 0.01))
    assert seeds(attempts.before("a", 9)) == [8]
    attempts.add("a", Attempt(9, 256, "PASS", 0.01))
    attempts.add("a", Attempt(8, 256, "FAIL", 0.01))
    assert seeds(attempts.before("a", 10)) == []


def test_none_is_forgotten(attempts):
    for seed in range(20):
        attempts.add("a", Attempt(seed, 256, "UNPROVEN", 0.01))
    assert seeds(attempts.before("a", 99)) == list(range(20))


def test_the_first_run_of_a_seed_is_the_one_that_is_repeated(attempts):
    for seed, n, alpha in ((1, 64, 0.001), (1, 256, 0.002), (1, 256, 0.01)):
        attempts.add("a", Attempt(seed, n, "FAIL", alpha))
    assert attempts.same("a", 1, 256).alpha == 0.002
    assert attempts.same("a", 1, 128) is None
    assert attempts.same("a", 2, 256) is None
    assert attempts.same("b", 1, 256) is None


DAMAGE = [
    b"5",
    b"null",
    b"{}",
    b'{"check": "a"}',
    b'{"check": "a", "attempt": {"seed": 1}}',
    b'{"check": "a", "attempt": {"seed": "1", "n": 256, "verdict": "FAIL", "alpha": 0.01}}',
    b'{"check": "a", "attempt": {"seed": 1, "n": -1, "verdict": "FAIL", "alpha": 0.01}}',
    b'{"check": "a", "attempt": {"seed": 1, "n": 256, "verdict": "fail", "alpha": 0.01}}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_is_left_out_and_said_once(attempts, tmp_path, line):
    attempts.add("a", Attempt(1, 256, "FAIL", 0.01))
    with (tmp_path / "cache" / "attempts.jsonl").open("ab") as file:
        file.write(b"\n" + line)
    attempts.add("a", Attempt(2, 256, "FAIL", 0.01))
    assert seeds(attempts.before("a", 3)) == [1, 2]
    (notice,) = attempts.notices
    assert "1 of the lines in " in notice
    again = Reruns(tmp_path / "cache")
    assert seeds(again.before("a", 3)) == [1, 2]
    assert again.notices == []


class TestSeries:
    def test_the_first_run_has_its_whole_risk(self, attempts):
        series = attempts.series("a", 1, 256, 0.004)
        assert (series.earlier, series.attempts, series.alpha) == ((), 0, 0.004)
        assert str(series) == ""

    def test_each_earlier_run_halves_it_and_the_last_seven_are_pooled(self, attempts):
        for seed in range(10):
            attempts.add("a", Attempt(seed, 256, "FAIL", 0.004))
        series = attempts.series("a", 99, 256, 0.004)
        assert [attempt.seed for attempt in series.earlier] == list(range(10 - POOLED, 10))
        assert series.alpha == 0.004 / 2**10
        assert "of the last 7 of 10 earlier runs" in str(series)

    def test_a_repeated_seed_has_the_risk_that_it_had(self, attempts):
        attempts.add("a", Attempt(1, 256, "FAIL", 0.001))
        attempts.add("a", Attempt(2, 256, "FAIL", 0.001))
        assert attempts.series("a", 2, 256, 0.01).alpha == 0.0005
        assert attempts.series("a", 3, 256, 0.01).alpha == 0.0025

    def test_what_never_pools_has_no_earlier_runs(self, attempts):
        attempts.add("a", Attempt(1, 256, "FAIL", 0.001))
        assert attempts.series("a", 3, 256, 0.01, pools=False).attempts == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be read or written"):
        Reruns(tmp_path / "file").add("a", Attempt(1, 256, "FAIL", 0.01))


def test_a_repeated_seed_is_judged_as_it_was_and_counts_once(attempts):
    for seed in (1, 2, 2, 1):
        attempts.add("a", Attempt(seed, 256, "FAIL", 0.01))
    assert seeds(attempts.before("a", 1)) == []
    assert seeds(attempts.before("a", 2)) == [1]
    assert seeds(attempts.before("a", 3)) == [1, 2]
    attempts.add("a", Attempt(3, 256, "PASS", 0.01))
    assert seeds(attempts.before("a", 2)) == [1]


@pytest.mark.parametrize("cut", range(1, 50, 7))
def test_a_line_that_was_cut_short_spoils_only_itself(attempts, tmp_path, cut):
    attempts.add("a", Attempt(1, 256, "FAIL", 0.01))
    attempts.add("a", Attempt(2, 256, "FAIL", 0.01))
    path = tmp_path / "cache" / "attempts.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    attempts.add("a", Attempt(3, 256, "FAIL", 0.01))
    assert seeds(attempts.before("a", 4)) == [1, 3]
