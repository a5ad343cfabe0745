"""How reward functions are called: TRL's contract, a limit in seconds, and errors by name."""

import asyncio
import functools
import itertools
import math
import signal
import sys
import time

import pytest

from grpo_harness.rewards.calls import RewardError, load_reward, score
from grpo_harness.rewards.functions import Batch, Log, Reward, Rewards
from grpo_harness.rewards.trials import rewards_digest
from grpo_harness.tasks import task_types

GCD = task_types()["gcd"]


def batch(texts=("a", "b", "c"), **columns):
    return Batch(
        [f"own-{i}" for i in range(len(texts))],
        ["p"] * len(texts),
        texts,
        [(1, 2)] * len(texts),
        columns,
    )


def scores(*functions, of=None, seconds=None, log=None):
    rewards = Rewards(tuple(map(Reward, functions)), seconds=seconds)
    return [list(row.values()) for row in rewards.score(of or batch(), "here", log)]


def refused(*functions, **how):
    with pytest.raises(RewardError) as error:
        scores(*functions, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def ones(completions, **_):
    return [1.0] * len(completions)


def test_a_reward_has_a_name_of_ours_or_of_trl():
    assert load_reward("math:prod") is load_reward("math.prod") is math.prod
    for wrong in ("prod", "math.", ".prod", "math:", "nowhere.at.all"):
        with pytest.raises(RewardError, match="module:function"):
            load_reward(wrong)


def test_a_column_may_have_any_name():
    names = ("reward", "where", "of", "seconds", "self", "named", "a b", "é")

    def seen(completions, **columns):
        return [float(all(columns[name][i] == i for name in names)) for i in range(3)]

    assert scores(seen, of=batch(**{name: [0, 1, 2] for name in names})) == [[1.0]] * 3
    assert score(seen, ["p"] * 3, ["a"] * 3, {name: [0, 1, 2] for name in names}, where="") == [
        1.0,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("made", [iter, lambda values: map(float, values), tuple])
def test_any_row_of_numbers_is_taken_as_trl_takes_it(made):
    async def later(completions, **_):
        return made([1.0] * len(completions))

    assert scores(lambda completions, **_: made([1.0] * len(completions)), later) == [[1, 1]] * 3


@pytest.mark.parametrize("changed", ["kind", "completion_ids", "prompts"])
def test_a_reward_that_changes_a_column_is_named(changed):
    def greedy(**given):
        given[changed][0] = "x"
        return [1.0] * len(given["completions"])

    message = refused(greedy, of=batch(kind=[math.nan, None, "a"]))
    assert f"the reward greedy (problem own-0, completion 'a') changes the {changed}" in message


def test_a_reward_model_is_refused_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "a_model.py").write_text("import torch\nmodel = torch.nn.Linear(1, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="'a_model:model' is a reward model"):
        load_reward("a_model:model")
    sys.modules.pop("a_model")


class TestCoroutines:
    def test_they_wait_together(self):
        """Each waits for the other: one after the other, they would wait for ever."""
        events = {}

        async def ping(completions, **_):
            events["ping"] = asyncio.Event()
            while "pong" not in events:
                await asyncio.sleep(0)
            events["ping"].set()
            await events["pong"].wait()
            return [1.0] * len(completions)

        async def pong(completions, **_):
            events["pong"] = asyncio.Event()
            while "ping" not in events:
                await asyncio.sleep(0)
            events["pong"].set()
            await events["ping"].wait()
            return [2.0] * len(completions)

        assert scores(ping, ones, pong, seconds=5) == [[1.0, 1.0, 2.0]] * 3

    def test_all_batches_have_one_loop(self):
        """A client that a reward keeps, such as one of HTTP, belongs to the loop of its first call.

        Also after a hang, which ends the loop that it was in.
        """
        loops = []

        async def remembers(completions, **_):
            loops.append(asyncio.get_running_loop())
            while "hang" in completions:
                pass
            return [1.0] * len(completions)

        for _ in range(3):
            scores(remembers, seconds=5)
        assert len(set(loops)) == 1
        refused(remembers, of=batch(["hang"]), seconds=0.1)
        loops.clear()
        for _ in range(3):
            scores(remembers, seconds=5)
        assert len(set(loops)) == 1

    def test_a_plain_function_may_run_a_loop_of_its_own(self):
        async def waits(completions, **_):
            await asyncio.sleep(0)
            return [1.0] * len(completions)

        def plain(**given):
            return asyncio.run(waits(**given))

        for _ in range(2):
            assert scores(waits, plain) == [[1.0, 1.0]] * 3

    @pytest.mark.parametrize("loop", [False, True], ids=["", "in a running loop"])
    @pytest.mark.parametrize(
        ("what", "says"),
        [
            (ValueError("oops"), "raised ValueError: oops"),
            (TimeoutError("of a server"), "raised TimeoutError: of a server"),
            (SystemExit(3), "raised SystemExit: 3"),
            (None, "did not return within 0.2 seconds"),
        ],
    )
    def test_the_one_that_fails_is_named_with_its_completion(self, what, says, loop):
        async def fine(completions, **_):
            await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        async def broken(completions, **_):
            if "b" in completions:
                if what is not None:
                    raise what
                await asyncio.sleep(60)
            return [1.0] * len(completions)

        async def within():
            return refused(fine, broken, fine, seconds=0.2)

        message = asyncio.run(within()) if loop else refused(fine, broken, fine, seconds=0.2)
        assert f"here: the reward broken (problem own-1, completion 'b') {says}" in message

    def test_one_that_blocks_is_named(self):
        async def fine(completions, **_):
            await asyncio.sleep(0)
            return [1.0] * len(completions)

        async def blocks(completions, **_):
            while "b" in completions:
                pass
            return [1.0] * len(completions)

        message = refused(fine, blocks, seconds=0.1)
        assert "the reward blocks (problem own-1, completion 'b') did not return within" in message


class TestSeconds:
    def test_a_reward_that_catches_all_errors_does_not_hide_a_hang(self):
        def quiet(completions, **_):
            try:
                while "b" in completions:
                    pass
            except Exception:
                return [0.0] * len(completions)
            return [1.0] * len(completions)

        assert "(problem own-1, completion 'b') did not return" in refused(quiet, seconds=0.1)

    @pytest.mark.parametrize("back", [True, False], ids=["put back", "not put back"])
    def test_a_reward_may_use_the_alarm_itself(self, back):
        """As math-verify does, which puts the handler back and stops the timer."""

        def own(completions, **_):
            before = signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(1)
            signal.alarm(0)
            if back:
                signal.signal(signal.SIGALRM, before)
            end = time.monotonic() + (60 if back else 0.3)
            while "b" in completions and time.monotonic() < end:
                pass
            return [1.0] * len(completions)

        start = time.monotonic()
        assert "(problem own-1, completion 'b') did not return" in refused(own, seconds=0.1)
        assert time.monotonic() - start < 20

    def test_an_alarm_that_was_set_before_still_rings(self):
        """Such as that of pytest-timeout."""
        rung = []
        before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            slow = [lambda completions, **_: [time.sleep(0.2)] * len(completions)]
            assert scores(*slow, seconds=30) == [[None]] * 3
            assert rung == [1]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class TestLog:
    def test_values_and_numbers_go_to_their_completions(self):
        def logs(completions, log_extra, log_metric, **_):
            log_extra("letter", completions)
            log_extra(column="n", values=range(len(completions)))
            log_metric("size", len(completions))
            log_metric(name="size", value=0)
            return [1.0] * len(completions)

        log = Log()
        rewards = Rewards((Reward(logs), Reward(ones)), batch=2)
        rewards.score(batch(), "here", log)
        assert log.extra == [{"letter": c, "n": n} for c, n in (("a", 0), ("b", 1), ("c", 0))]
        assert log.metrics == [{"size": 1.0}, {"size": 1.0}, {"size": 0.5}]

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda log_extra, **_: log_extra("a"), "raised TypeError: .*'values'"),
            (lambda log_extra, **_: log_extra("a", 5), "raised TypeError: .*not iterable"),
            (lambda log_extra, **_: log_extra("a", ["x", "y"]), "log_extra 'a' has 2 values for 1"),
            (lambda log_metric, **_: log_metric("a", "x"), "raised ValueError"),
            (lambda log_metric, **_: log_metric("a", [1]), "raised TypeError"),
            (lambda log_metric, **_: log_metric("a", 1, 2), "raised TypeError"),
        ],
    )
    def test_what_trl_could_not_log_is_named(self, call, says):
        def logs(completions, **given):
            call(**given)
            return [1.0] * len(completions)

        with pytest.raises(RewardError, match=f"the reward logs .*own-0.*{says}"):
            scores(logs)


def test_the_last_digits_of_a_network_may_differ_from_call_to_call():
    values = itertools.cycle([0.1, math.nextafter(0.1, 1.0)])
    steady = Rewards((Reward(lambda completions, **_: [next(values) for _ in completions]),))
    rewards_digest(steady, GCD)
    values = itertools.cycle([0.1, 0.1001, 0.1002])
    with pytest.raises(RewardError, match=r"\(problem gcd-\w+, .* must not differ from call"):
        rewards_digest(steady, GCD)


def test_a_partial_and_an_instance_have_the_names_that_trl_logs():
    class Even:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    found = Rewards((Reward(functools.partial(ones, by=1)), Reward(Even()))).score(batch(), "here")
    assert found == [{"ones": 1.0, "Even": 0.0}] * 3
