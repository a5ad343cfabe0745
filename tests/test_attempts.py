"""A rerun adds to the evidence of the runs before it that did not pass."""

import pytest

from grpo_harness.reruns import Attempt, Attempts


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path / "cache")


def seeds(found):
    return [attempt.seed for attempt in found]


def test_nothing_precedes_the_first(attempts):
    assert attempts.before("a", 1) == []


def test_what_did_not_pass_precedes_the_next(attempts):
    attempts.add("a", Attempt(1, 256, "FAIL", 1))
    attempts.add("b", Attempt(9, 256, "FAIL", 1))
    attempts.add("a", Attempt(2, 128, "UNPROVEN", 1))
    assert attempts.before("a", 3) == [Attempt(1, 256, "FAIL", 1), Attempt(2, 128, "UNPROVEN", 1)]


def test_a_pass_ends_the_series(attempts):
    attempts.add("a", Attempt(1, 256, "FAIL", 1))
    attempts.add("a", Attempt(2, 256, "PASS", 1))
    assert attempts.before("a", 3) == []
    attempts.add("a", Attempt(3, 256, "UNPROVEN", 1))
    assert seeds(attempts.before("a", 4)) == [3]


def test_a_replay_is_no_attempt(attempts):
    attempts.add("a", Attempt(7, 256, "PASS", 1))
    attempts.add("a", Attempt(8, 256, "FAIL", 1))
    attempts.add("a", Attempt(7, 256, "PASS", 1))
    assert seeds(attempts.before("a", 9)) == [8]
    attempts.add("a", Attempt(9, 256, "PASS", 1))
    attempts.add("a", Attempt(8, 256, "FAIL", 1))
    assert seeds(attempts.before("a", 10)) == []


def test_none_is_forgotten(attempts):
    for seed in range(20):
        attempts.add("a", Attempt(seed, 256, "UNPROVEN", 1))
    assert seeds(attempts.before("a", 99)) == list(range(20))


def test_the_first_run_of_a_seed_is_the_one_that_is_repeated(attempts):
    for seed, n, checks in ((1, 64, 12), (1, 256, 24), (1, 256, 1)):
        attempts.add("a", Attempt(seed, n, "FAIL", checks))
    assert attempts.same("a", 1, 256).checks == 24
    assert attempts.same("a", 1, 128) is None
    assert attempts.same("a", 2, 256) is None
    assert attempts.same("b", 1, 256) is None


@pytest.mark.parametrize("line", ["5", "null", "{}", '{"check": "a"}', '{"check": "a", "x": 1}'])
def test_a_line_of_another_kind_is_no_attempt(attempts, tmp_path, line):
    attempts.add("a", Attempt(1, 256, "FAIL", 1))
    with (tmp_path / "cache" / "attempts.jsonl").open("a") as file:
        file.write(f"\n{line}")
    attempts.add("a", Attempt(2, 256, "FAIL", 1))
    assert seeds(attempts.before("a", 3)) == [1, 2]


def test_a_repeated_seed_is_judged_as_it_was_and_counts_once(attempts):
    for seed in (1, 2, 2, 1):
        attempts.add("a", Attempt(seed, 256, "FAIL", 1))
    assert seeds(attempts.before("a", 1)) == []
    assert seeds(attempts.before("a", 2)) == [1]
    assert seeds(attempts.before("a", 3)) == [1, 2]
    attempts.add("a", Attempt(3, 256, "PASS", 1))
    assert seeds(attempts.before("a", 2)) == [1]


@pytest.mark.parametrize("cut", range(1, 50, 7))
def test_a_line_that_was_cut_short_spoils_only_itself(attempts, tmp_path, cut):
    attempts.add("a", Attempt(1, 256, "FAIL", 1))
    attempts.add("a", Attempt(2, 256, "FAIL", 1))
    path = tmp_path / "cache" / "attempts.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    attempts.add("a", Attempt(3, 256, "FAIL", 1))
    assert seeds(attempts.before("a", 4)) == [1, 3]
