"""Chunks are made of the requests alone, and each is drawn although workers are lost or slow."""

import random

import pytest

from grpo_harness.engines.chunks import AGAIN, Handout, LostError, chunks


def test_every_request_is_in_one_chunk_with_all_of_its_prompt():
    rng = random.Random(7)
    for _ in range(50):
        prompts = [f"p{rng.randrange(1 + rng.randrange(90))}" for _ in range(rng.randrange(400))]
        found = chunks(prompts)
        assert sorted(number for chunk in found for number in chunk) == [*range(len(prompts))]
        where = [{i for i, chunk in enumerate(found) for n in chunk if prompts[n] == p}
                 for p in set(prompts)]  # fmt: skip
        assert all(len(places) == 1 for places in where)
        assert all(len(chunk) <= 128 or len({prompts[n] for n in chunk}) == 1 for chunk in found)


def test_chunks_are_full():
    assert [len(chunk) for chunk in chunks([f"p{i // 4}" for i in range(1024)])] == [128] * 8
    assert [len(chunk) for chunk in chunks([f"p{i // 48}" for i in range(240)])] == [96, 96, 48]
    assert [len(chunk) for chunk in chunks(["a"] * 200 + ["b"] * 3)] == [200, 3]
    assert chunks([]) == []


def test_workers_get_chunks_as_they_ask():
    handout = Handout(3)
    assert [handout.take(w, 0) for w in ("a", "b")] == [0, 1]
    assert handout.done("b", 1) == 1
    assert handout.take("b", 1) == 2
    assert [handout.done(w, 2) for w in ("b", "a")] == [2, 0]
    assert handout.finished
    assert handout.take("a", 2) is None


def test_what_a_lost_worker_had_is_next_and_at_most_twice_again():
    handout = Handout(3)
    for time, worker in enumerate(["a", "b"]):
        assert handout.take(worker, time) == 0
        handout.lose(worker)
    handout.lose("c")  # it had nothing
    assert [handout.take(w, 9) for w in ("d", "e")] == [0, 1]
    handout.lose("e")
    assert AGAIN == 2
    with pytest.raises(LostError):
        handout.lose("d")


def test_an_idle_worker_helps_a_slow_one_and_the_first_answer_counts():
    handout = Handout(3)
    assert [handout.take(w, 0) for w in ("slow", "fast")] == [0, 1]
    assert handout.done("fast", 1) == 1
    assert handout.take("fast", 1) == 2
    assert handout.done("fast", 2) == 2
    assert handout.take("fast", 2.0) is None  # twice the usual time is not yet over
    assert handout.take("fast", 2.1) == 0
    assert handout.take("third", 9) is None  # two have it
    assert handout.done("fast", 3) == 0
    assert handout.finished
    assert handout.done("slow", 30) is None


def test_a_chunk_that_two_have_is_not_lost_with_one():
    handout = Handout(2)
    assert [handout.take(w, 0) for w in ("slow", "fast")] == [0, 1]
    handout.done("fast", 1)
    assert handout.take("fast", 5) == 0
    handout.lose("slow")
    assert handout.take("third", 5.5) is None
    handout.lose("fast")
    assert handout.take("third", 6) == 0
    assert handout.done("third", 7) == 0
