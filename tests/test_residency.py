"""As many policies have their weights in memory as fit, and no two the same under two names."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from grpo_harness.engines.engine import EngineError, Request, Sampling
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy import load


@pytest.fixture
def pair(tiny, save_tiny, tmp_path):
    """A function that makes the engines of two policies that share a device."""
    other = save_tiny(tmp_path / "other", seed=1)

    def pair(mode, second=other):
        residents = Residents(mode)
        return [
            TransformersEngine(
                load(str(folder)), Sampling(max_new_tokens=1), device="cpu", residents=residents
            )
            for folder in (tiny, second)
        ]

    return pair


def held(engines):
    return [engine._model is not None for engine in engines]


@pytest.mark.parametrize(
    ("mode", "room", "after"),
    [
        ("all", False, [True, True]),
        ("one", True, [False, True]),
        ("auto", True, [True, True]),
        ("auto", False, [False, True]),
    ],
)
def test_weights_go_where_there_is_no_room(pair, monkeypatch, mode, room, after):
    engines = pair(mode)
    monkeypatch.setattr(TransformersEngine, "fits", lambda self: room)
    for engine in engines:
        engine.sample([Request("a", 1)])
    assert held(engines) == after


def test_what_was_let_go_is_taken_again(pair):
    engines = pair("one")
    first = [engine.sample([Request("abc", 1)]) for engine in engines]
    again = [engine.sample([Request("abc", 1)]) for engine in engines]
    assert first == again
    assert held(engines) == [False, True]


def test_auto_asks_the_device(pair, monkeypatch):
    (engine, _) = pair("auto")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    assert engine.fits()  # an untrained layer of some ten thousand numbers
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**4}))
    assert not engine.fits()


@pytest.mark.parametrize("mode", ["all", "one"])
def test_the_same_weights_under_two_fingerprints_are_named(pair, tiny, tmp_path, mode):
    """Files that differ and weights that do not: half precision saved as full, and back."""
    twin = shutil.copytree(tiny, tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    # Tied weights are saved twice: other files, the same policy.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    first, second = pair(mode, twin)
    assert first.policy.fingerprint.weights != second.policy.fingerprint.weights
    first.sample([Request("a", 1)])
    with pytest.raises(EngineError) as error:
        second.sample([Request("a", 1)])
    for part in ("tiny", "twin", str(first.policy.fingerprint), str(second.policy.fingerprint)):
        assert part in str(error.value)


def test_one_policy_may_be_taken_twice(pair, tiny):
    for engine in pair("all", tiny):
        engine.sample([Request("a", 1)])
