"""A served policy: its completions are its own, and no fault of a server loses or doubles one."""

import asyncio
import logging
import re
import sys
import time

import pytest

from grpo_harness.engines import client
from grpo_harness.engines.endpoint import KEY, Endpoint
from grpo_harness.engines.engine import EngineError, Request, Sampling
from grpo_harness.engines.server import ServerEngine
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy.policy import load
from grpo_harness.tasks import task_types
from tests.servers import EXTENSIONS, Server

SECRET = "sk-Very+Secret/1234567890"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 0.05)


@pytest.fixture(scope="module")
def policy():
    return load("nano-trained")


@pytest.fixture(scope="module")
def requests(policy):
    problems = [p for name in ("gcd", "sort") for p in task_types()[name].problems(8)]
    rendered = [policy.render(problem.prompt) for problem in problems]
    return [
        Request(prompt, 2**40 + 97 * k + 17 * i)
        for i, prompt in enumerate(rendered)
        for k in (1, 3)
    ]


def served(policy, server, sampling=None, **table):
    urls = [of.url for of in server] if isinstance(server, list) else server.url
    return ServerEngine(policy, sampling or Sampling(), Endpoint(url=urls, **table))


def local(policy, requests, sampling=None):
    engine = TransformersEngine(policy, sampling or Sampling(), device="cpu")
    return engine.sample([Request(r.prompt, r.seed % 2**31) for r in requests])


@pytest.fixture(scope="module")
def wanted(policy, requests):
    return local(policy, requests)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(greedy=True, max_new_tokens=5),
        Sampling(temperature=1.3, top_k=5, min_p=0.02, top_p=1.0, repetition_penalty=1.2),
        Sampling(stop=("1", ", "), max_new_tokens=12),
    ],
    ids=["default", "greedy", "all", "stop"],
)
def test_samples_are_those_of_the_local_engine(policy, requests, sampling):
    with Server(policy) as server:
        engine = served(policy, server, sampling)
        assert engine.sample(requests) == local(policy, requests, sampling)
        assert engine.settings() == TransformersEngine(policy, sampling, device="cpu").settings()
        assert engine.remarks() == {}
    assert len(server.asked) == len(requests)
    assert all("n" not in body and body["model"] == "policy" for body in server.asked)


@pytest.mark.parametrize("tells", [(), ("usage",), ("token_ids",)])
def test_what_an_answer_does_not_tell_is_made_of_its_text(policy, requests, wanted, tells):
    with Server(policy, tells=tells) as server:
        assert served(policy, server).sample(requests) == wanted


def test_a_stop_string_that_was_cut_is_put_back(policy, requests):
    sampling = Sampling(stop=("1", ", "), max_new_tokens=12)

    def trimmed(body):
        return {name: of for name, of in body.items() if name != "include_stop_str_in_output"}

    with Server(policy, alter=trimmed) as server:
        assert served(policy, server, sampling).sample(requests) == local(
            policy, requests, sampling
        )
    with (
        Server(policy, alter=trimmed, tells=()) as server,
        pytest.raises(EngineError, match="does not say whether a stop string or an end token"),
    ):
        served(policy, server, sampling).sample(requests)


def once(*faults):
    """Fail the first requests with one fault each."""
    return lambda number, body: faults[number] if number < len(faults) else None


BUSY = (429, {"error": "busy"}, {"Retry-After": "0"})


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"] * 3,
        ["half"] * 3,
        [(500, b"oops")] * 3,
        [(503, {})] * 3,
        [BUSY] * 3,
        ["drop", BUSY, "half", (502, b""), "drop"],
    ],
    ids=["drop", "half", "500", "503", "429", "all"],
)
def test_failures_are_asked_again_and_answers_never(policy, requests, wanted, faults):
    with Server(policy, faults=once(*faults)) as server:
        assert served(policy, server).sample(requests) == wanted
    answered = sorted((body["prompt"], body["seed"]) for body in server.asked)
    assert answered == sorted((r.prompt, r.seed % 2**31) for r in requests)
    assert server.requests == len(requests) + len(faults)


def test_a_stall_ends_at_the_time_limit(policy, requests, wanted):
    with Server(policy, faults=once("stall", "stall")) as server:
        began = time.monotonic()
        assert served(policy, server, seconds=1).sample(requests) == wanted
        assert 1 <= time.monotonic() - began < 10


def test_it_waits_as_long_as_it_is_told(policy, requests, wanted):
    busy = (429, {}, {"Retry-After": "1"})
    with Server(policy, faults=once(busy)) as server:
        began = time.monotonic()
        assert served(policy, server).sample(requests) == wanted
        assert time.monotonic() - began >= 1
    with Server(policy, faults=lambda *_: (503, {}, {"Retry-After": "7200"})) as server:
        with pytest.raises(EngineError, match="it asks to wait 7200 s"):
            served(policy, server).sample(requests)
        assert server.requests <= len(requests)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3), ("x", None), (None, None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("-1", None)],
)
def test_retry_after_is_read(header, seconds):
    assert client._seconds(header) == seconds


@pytest.mark.parametrize("fault", ["drop", "half", (500, {"error": "\x1b[31m" + "x" * 999})])
def test_what_fails_for_good_is_one_error(policy, requests, fault):
    with Server(policy, faults=lambda *_: fault) as server:
        with pytest.raises(EngineError) as caught:
            served(policy, server).sample(requests[:4])
        said = str(caught.value)
        assert server.url in said
        assert "so it was 6 times" in said
        assert len(said) < 800
        assert said.isprintable()
        assert server.requests <= 6 * 4
        if isinstance(fault, tuple):
            assert " answered 500: " in said
    assert caught.value.__cause__ is None


def test_no_server_is_one_error(policy, requests):
    with Server(policy) as server:
        pass
    with pytest.raises(EngineError, match="cannot be reached: ConnectError"):
        served(policy, server, model="policy").sample(requests)
    with pytest.raises(EngineError, match="does not list its models"):
        served(policy, server).sample(requests)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "malformed"),
        ({"choices": []}, "length >= 1"),
        ({"choices": [{"text": "7"}]}, "finish_reason"),
        ({"choices": [{"text": 7, "finish_reason": "stop"}]}, "Expected `str`"),
        ({"choices": [{"text": "7", "finish_reason": "error"}]}, "Invalid enum value"),
        (b'{"choices": ' + b"[" * 100_000, "Expected `object`|deep|recursion"),
    ],
    ids=["html", "none", "reason", "number", "error", "deep"],
)
def test_an_unusable_answer_is_an_error_at_once(policy, requests, body, said):
    with Server(policy, faults=lambda *_: (200, body)) as server:
        with pytest.raises(EngineError, match="which is no completion") as caught:
            served(policy, server).sample(requests[:1])
        assert server.requests == 1
    assert re.search(said, str(caught.value))


def test_an_endless_answer_is_an_error(policy, requests, monkeypatch):
    monkeypatch.setattr(client, "_LARGEST", 1 << 16)
    with (
        Server(policy, faults=lambda *_: (200, b" " * (1 << 17))) as server,
        pytest.raises(EngineError, match="cannot be used"),
    ):
        served(policy, server).sample(requests[:1])


def test_fields_without_effect_are_left_out_where_refused(policy, requests, wanted):
    with Server(policy, refuses=EXTENSIONS) as server:
        engine = served(policy, server)
        assert engine.sample(requests) == wanted
        assert server.requests < 3 * len(requests)
        left = engine.remarks()["requests"]
        assert left.startswith("without add_special_tokens, min_p, repetition_penalty")
        asked = server.requests
        assert engine.sample(requests) == wanted  # not tried again
        assert server.requests == asked + len(requests)


def test_a_refusal_without_names_leaves_out_what_can_be_spared(policy, requests, wanted):
    def strict(number, body):
        return (422, {"detail": "bad"}) if set(body) & {*EXTENSIONS} else None

    with Server(policy, faults=strict) as server:
        engine = served(policy, server)
        assert [s.tokens > 0 for s in engine.sample(requests)] == [True] * len(requests)
        assert "seed" in engine.remarks()["requests"]


@pytest.mark.parametrize(
    ("field", "value", "sampling"),
    [
        ("top_k", "5", Sampling(top_k=5)),
        ("min_p", "0.1", Sampling(min_p=0.1)),
        ("repetition_penalty", "1.5", Sampling(repetition_penalty=1.5)),
        ("temperature", "0.8", Sampling()),
        ("include_stop_str_in_output", "true", Sampling(stop=("x",))),
    ],
)
def test_a_refused_field_that_counts_is_named(policy, requests, field, value, sampling):
    with Server(policy, refuses=[field]) as server:
        with pytest.raises(EngineError) as caught:
            served(policy, server, sampling).sample(requests)
        assert f"does not take {field} = {value}: {server.url}" in str(caught.value)


def test_a_begin_token_that_would_come_twice_is_named(policy, requests, tmp_path):
    from grpo_harness.contract.policies import two_ended

    begins = load(two_ended(tmp_path / "begins"))
    asked = [Request(begins.render("1 + 1"), 0)]
    with Server(begins) as server:
        assert served(begins, server).sample(asked) == local(begins, asked)
    with (
        Server(begins, refuses=["add_special_tokens"]) as server,
        pytest.raises(EngineError, match="does not take add_special_tokens = false"),
    ):
        served(begins, server).sample(asked)


def test_samples_that_were_drawn_before_an_error_are_handed_over(policy, requests, wanted):
    asked = {(r.prompt, r.seed % 2**31): i for i, r in enumerate(requests)}

    def faults(number, body):
        late = asked[body["prompt"], body["seed"]] == len(requests) - 1
        return (400, {"message": "too long"}) if late else None

    with Server(policy, faults=faults) as server, pytest.raises(EngineError) as caught:
        served(policy, server).sample(requests)
    drawn = caught.value.drawn
    # Each answer lets one more request go out, beside the eight of the start.
    assert len(drawn) >= (len(requests) - 8) // 2 - 1
    assert all(wanted[number] == sample for number, sample in drawn.items())
    assert f"{server.url}/completions answered 400: " in str(caught.value)


def test_a_slow_and_a_fast_server_share_the_work(policy, requests):
    many = [Request(r.prompt, r.seed + i) for i in range(4) for r in requests]
    slow, fast = Server(policy, delay=0.6, serial=True), Server(policy)
    with slow, fast:
        assert served(policy, [slow, fast]).sample(many) == local(policy, many)
    assert slow.requests + fast.requests == len(many)
    assert 4 <= slow.requests < fast.requests / 2


def test_a_dead_server_among_several_is_left_out(policy, requests, wanted):
    with Server(policy) as dead:
        pass
    with Server(policy) as alive:
        engine = served(policy, [dead, alive])
        assert engine.sample(requests) == wanted
        assert engine.client.sent[f"{dead.url}/completions"] < len(requests)


def test_concurrency_grows_and_is_halved_once_for_each_sign_of_overload(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    server = client._Server("http://x")
    server.outstanding = 3
    server.answered(99.9, 1)
    assert server.limit == 8  # it never had more: nothing was shown
    for _ in range(8):
        server.outstanding = int(server.limit)
        server.answered(99.9, 1)
    assert server.limit == 16
    for _ in range(16):  # all of one round fail together
        server.failed(99.9, None)
    assert (server.limit, server.failures) == (8, 1)
    now[0] += 1
    server.outstanding = 8
    server.answered(100.5, 1)
    assert (server.limit, server.failures) == (8.125, 0)
    now[0] += 9
    server.answered(101.5, 5)  # slow
    assert server.limit == 8.125 / 2


def test_a_server_that_limits_itself_is_not_flooded(policy, requests, wanted):
    with Server(policy, delay=0.01) as server:
        server.faults = lambda *_: BUSY if server.at_once > 4 else None
        assert served(policy, server).sample(requests) == wanted
        assert server.requests < 3 * len(requests)


def test_the_key_is_sent_and_never_shown(policy, requests, monkeypatch, caplog, capfd):
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    caplog.set_level(logging.DEBUG)
    echo = (401, {"error": f"Incorrect API key provided: {SECRET}."})
    with Server(policy, faults=lambda *_: echo) as server:
        engine = served(policy, server)
        with pytest.raises(EngineError, match=r"key provided: \*\*\*") as caught:
            engine.sample(requests)
    assert {of["Authorization"] for of in server.headers} == {f"Bearer {SECRET}"}
    shown = [str(caught.value), repr(engine), repr(engine.client), repr(vars(engine))]
    assert SECRET not in "".join([caplog.text, *capfd.readouterr(), *shown, *engine.identity()])
    with Server(
        policy, faults=lambda *_: (200, {"choices": [{"text": SECRET, "finish_reason": "stop"}]})
    ) as server:
        (sample,) = served(policy, server).sample(requests[:1])
        assert sample.text == "***"


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-a\nb"])
def test_a_key_that_no_header_can_have_is_not_shown_either(policy, requests, key, monkeypatch):
    monkeypatch.setenv("OTHER", key)
    with Server(policy) as server, pytest.raises(EngineError, match="OTHER holds no key") as caught:
        served(policy, server, key="OTHER").sample(requests)
    assert key not in str(caught.value)


def test_a_named_key_that_is_not_set_is_an_error(policy, requests):
    with Server(policy) as server, pytest.raises(EngineError, match="variable NOWHERE, which is n"):
        served(policy, server, key="NOWHERE").sample(requests)


def test_without_httpx_the_extra_is_named(policy, requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(EngineError, match=r"pip install 'grpo-harness\[server\]'"):
        ServerEngine(policy, Sampling(), Endpoint(url="http://x/v1")).sample(requests)


def test_the_identity_is_what_the_server_says(policy):
    about = {"id": "a", "owned_by": "vllm", "root": "/models/a", "max_model_len": 512}
    with Server(policy, about=about) as server:
        said = served(policy, server).identity()
        assert said == {
            "engine": "server",
            "model": "a",
            "owner": "vllm",
            "root": "/models/a",
            "context": 512,
            "version": "1.2.3",
        }
        with pytest.raises(EngineError, match="does not serve b: it lists a; name one"):
            served(policy, server, model="b").identity()
        with (
            Server(policy, about={**about, "root": "/models/b"}) as other,
            pytest.raises(EngineError, match=r"do not serve the same: .*root=/models/a"),
        ):
            served(policy, [server, other]).identity()


def test_it_draws_where_an_event_loop_runs(policy, requests, wanted):
    async def within():
        with Server(policy) as server:
            return served(policy, server).sample(requests[:2])

    assert asyncio.run(within()) == wanted[:2]


def test_a_server_that_breaks_by_seeds_is_sent_none(policy, requests):
    with Server(policy) as server:
        served(policy, server, seed=False).sample(requests[:2])
        assert all("seed" not in body for body in server.asked)
