import json
import multiprocessing

import pytest

from grpo_harness.engines.engine import Sample
from grpo_harness.store import Store

WHAT = {"policy": "a1", "run_seed": 3}


def sample(text, error=None):
    return Sample(text, len(text) + 1, truncated=False, error=error)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "samples")


def test_what_was_added_is_there_again(store):
    with store.open("x", WHAT) as shelf:
        assert dict(shelf) == {}
        shelf.add({("p1", 0): sample("a\nb\u2028c\x00"), ("p1", 1): sample("\ud800")})
        kept = dict(shelf)
    with store.open("x", WHAT) as shelf:
        assert dict(shelf) == kept


def test_other_keys_have_other_samples(store):
    with store.open("x", WHAT) as shelf:
        shelf.add({("p1", 0): sample("a")})
    for other in ({**WHAT, "run_seed": 4}, {**WHAT, "policy": "b"}):
        with store.open("x", other) as shelf:
            assert dict(shelf) == {}


def test_a_failed_draw_is_not_kept(store):
    with store.open("x", WHAT) as shelf:
        shelf.add({("p1", 0): sample("", error="no memory"), ("p2", 0): sample("a")})
        assert shelf["p1", 0].error == "no memory"
    with store.open("x", WHAT) as shelf:
        assert set(shelf) == {("p2", 0)}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_process_that_died_in_a_line_loses_that_line_alone(store, tmp_path, cut):
    with store.open("x", WHAT) as shelf:
        shelf.add({("p1", 0): sample("a"), ("p2", 0): sample("b")})
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    with store.open("x", WHAT) as shelf:
        assert set(shelf) == {("p1", 0)}
        shelf.add({("p3", 0): sample("c")})
    with store.open("x", WHAT) as shelf:
        assert set(shelf) == {("p1", 0), ("p3", 0)}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def _add(folder, number):
    with Store(folder).open("x", WHAT) as shelf:
        shelf.add({(f"p{number}", i): sample("a" * 500) for i in range(20)})


def test_processes_do_not_write_into_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with Store(tmp_path).open("x", WHAT) as shelf:
        assert set(shelf) == {(f"p{number}", i) for number in range(3) for i in range(20)}
