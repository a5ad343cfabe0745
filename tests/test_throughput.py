"""The speed of the sampler is judged as a share of the floor, whatever the machine."""

import dataclasses
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from grpo_harness.engines import floor as floors
from grpo_harness.engines.engine import Sample
from grpo_harness.throughput import (
    Machine,
    Throughput,
    ThroughputError,
    judge,
    load,
    path_of,
    record,
)

STEADY = [0.50, 0.52, 0.51, 0.49]


def measured(shares, *, hardware="a processor, 2 threads", dtype="float32", busy=0.0):
    return Throughput(Machine(hardware, dtype, shares), tokens_per_second=100.0, busy=busy)


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "throughput" / "policy.json"
    record(measured(STEADY), "policy", path)
    return path


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        (STEADY, "PASS"),
        ([0.9 * share for share in STEADY], "PASS"),  # less than a quarter
        ([0.8 * share for share in STEADY], "PASS"),
        ([0.7 * share for share in STEADY], "FAIL"),
        ([0.1 * share for share in STEADY], "FAIL"),
        ([2.0 * share for share in STEADY], "PASS"),  # faster is no fault
        ([0.05, 0.9, 0.2, 0.5], "UNPROVEN"),  # chance alone could halve it
    ],
)
def test_the_share_is_judged(recorded, shares, verdict):
    found = judge(measured(shares), recorded)
    assert found.verdict == verdict, found.reason
    assert "51" not in found.reason or "50.5% was recorded" in found.reason


def test_a_fault_says_how_much_slower(recorded):
    found = judge(measured([share / 2 for share in STEADY]), recorded)
    assert "the sampler is 50% slower on this machine" in found.reason


@pytest.mark.parametrize("other", [{"hardware": "another, 2 threads"}, {"dtype": "bfloat16"}])
def test_other_hardware_is_not_judged(recorded, other):
    found = judge(measured([0.01, 0.011], **other), recorded)
    assert found.verdict is None
    assert "record it with --grpo-record -k throughput" in found.reason


def test_a_busy_machine_is_not_judged_and_not_recorded(recorded):
    busy = measured([0.1, 0.1], busy=0.5)
    found = judge(busy, recorded)
    assert found.verdict is None
    assert "other processes took 50% of the processors" in found.reason
    before = recorded.read_bytes()
    with pytest.raises(ThroughputError, match="no speed is recorded"):
        record(busy, "policy", recorded)
    assert recorded.read_bytes() == before


def test_each_class_of_hardware_has_its_own_entry(recorded):
    record(measured([0.2, 0.3], hardware="another"), "policy", recorded)
    record(measured([0.6, 0.7]), "policy", recorded)
    machines = {machine.hardware: machine.shares for machine in load(recorded).machines}
    assert machines == {"another": [0.2, 0.3], "a processor, 2 threads": [0.6, 0.7]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda of: b"",
        lambda of: b"\xff",
        lambda of: b"[" * 100_000,
        lambda of: json.dumps({**of, "schema": 2}).encode(),
        lambda of: json.dumps({**of, "more": 1}).encode(),
        lambda of: json.dumps(of).replace("0.52", "-1").encode(),
        lambda of: json.dumps(of).replace("0.52", "1e999").encode(),
    ],
)
def test_a_damaged_file_is_one_clear_line(recorded, damage):
    recorded.write_bytes(damage(json.loads(recorded.read_text())))
    with pytest.raises(ThroughputError, match=r"policy\.json is damaged") as caught:
        judge(measured(STEADY), recorded)
    assert "\n" not in str(caught.value)


def test_a_policy_without_a_file_has_that_of_its_stand_in(recorded):
    assert path_of(recorded.parents[1], ["new", "policy"]) == recorded
    assert path_of(recorded.parents[1], ["new", "newer"]).name == "new.json"


def small(kind):
    if kind == "gpt2":  # its layers are no Linear
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_floor_has_every_product_of_the_model_once(kind, monkeypatch):
    """Counted by torch's own counter of operations, in a forward call of the model itself."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rows = small(kind), 3
    with FlopCounterMode(display=False) as whole, torch.inference_mode():
        model(torch.zeros(rows, 1, dtype=torch.long), use_cache=False)
    counts = whole.get_flop_counts()["Global"]
    products = sum(n for of, n in counts.items() if str(of) in ("aten.mm", "aten.addmm"))

    def counted(what, device):
        with FlopCounterMode(display=False) as counter:
            what()
        return counter.get_total_flops()

    monkeypatch.setattr(floors, "_seconds", counted)
    drawn = [Sample("", 5, truncated=False)] * rows
    head = 2 * 32 * 64
    per_token = products / rows
    wanted = (per_token - head) * 7 + per_token * 5 * rows
    assert floors.floor(model, [3, 4], drawn) == pytest.approx(wanted)


def test_a_slow_sampler_fails_and_a_recorded_one_passes(pytester, monkeypatch):
    """In a project of its own, whose engine sleeps."""
    pytester.makepyprojecttoml(
        "[tool.grpo-harness]\nbase = 'nano-base'\ntrained = 'nano-trained'\ntasks = ['gcd']\n"
    )
    pytester.makepyfile(
        test_speed="""
        import pytest
        from grpo_harness.throughput import Machine, Throughput, judge, record

        def test_race(throughput, throughput_file):
            throughput.floor()
            seconds = []
            for _ in range(3):
                throughput.floor()
                throughput.draw()
                seconds.append(0.5)
            found = throughput.result(seconds)
            assert len(found.machine.shares) == 3 and found.share > 0
            quiet = Throughput(found.machine, found.tokens_per_second, 0.0)
            record(quiet, "nano-trained", throughput_file)
            assert judge(quiet, throughput_file).verdict in ("PASS", "UNPROVEN")
            slow = throughput.result([10_000 * second for second in seconds])
            slow = Throughput(slow.machine, slow.tokens_per_second, 0.0)
            assert judge(slow, throughput_file).verdict == "FAIL"
        """
    )
    result = pytester.runpytest_subprocess("-k", "trained", "-p", "no:xdist")
    result.assert_outcomes(passed=1, deselected=1)


def test_the_share_is_a_geometric_mean():
    assert measured([0.25, 1.0]).share == pytest.approx(0.5)
    assert dataclasses.replace(measured([0.3, 0.3]), busy=1.0).share == pytest.approx(0.3)
