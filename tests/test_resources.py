"""What a run took, and that only the same hardware is compared."""

import dataclasses
import json
import math
import sys

import pytest

from grpo_harness.training.resources import (
    Resources,
    ResourcesError,
    compare,
    peak_memory,
    read_resources,
    resources,
    write_resources,
)

ROWS = [
    {"step": 1, "step_time": 4.0, "completions/mean_length": 10.0},
    {"step": 2, "step_time": 1.0},  # the second pass over the same completions
    {"step": 3, "step_time": 1.0, "completions/mean_length": 20.0},
]


def test_figures_are_the_rows():
    took = resources(ROWS, completions=16, processes=2, peak=7, cuda=False)
    assert took.step_seconds == 1.0
    assert took.tokens_per_second == pytest.approx((10 + 20) * 16 / 6)
    assert (took.processes, took.peak_memory_bytes) == (2, 7)
    assert took.hardware


def test_they_are_read_as_they_were_written(tmp_path):
    took = resources(ROWS, completions=16, processes=1, peak=7, cuda=False)
    write_resources(took, tmp_path)
    assert read_resources(tmp_path) == took


NOTHING = json.dumps(dataclasses.asdict(Resources("abacus", 1, 0.0, 100.0, 50)))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"hardware": "abacus"}', NOTHING, "[" * 10**5])
def test_what_cannot_be_read_is_an_error(text, tmp_path):
    if text is not None:
        (tmp_path / "resources.json").write_text(text)
    with pytest.raises(ResourcesError, match=r"resources\.json cannot be read"):
        read_resources(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hardware", 7),
        ("processes", "x"),
        ("processes", 0),
        ("processes", True),
        ("step_seconds", math.nan),
        ("step_seconds", None),
        ("tokens_per_second", math.inf),
        ("peak_memory_bytes", 1.5),
        ("peak_memory_bytes", 10**400),
    ],
)
def test_a_figure_that_is_none_is_named(name, value, tmp_path):
    figures = dataclasses.asdict(Resources("abacus", 1, 2.0, 100.0, 50)) | {name: value}
    (tmp_path / "resources.json").write_text(json.dumps(figures))
    with pytest.raises(ResourcesError, match=f"cannot be read .*({name}|malformed|range)"):
        read_resources(tmp_path)


def test_hardware_of_a_foreign_file_reaches_the_terminal_escaped(tmp_path):
    write_resources(Resources("\x1b[31mabacus", 1, 2.0, 100.0, 50), tmp_path)
    assert str(read_resources(tmp_path)).isprintable()


def test_only_the_same_hardware_is_compared():
    then = Resources("abacus", 1, 2.0, 100.0, 50)
    now = dataclasses.replace(then, step_seconds=3.0, tokens_per_second=50.0)
    assert compare(now, then) == {
        "step_seconds": 1.5,
        "tokens_per_second": 0.5,
        "peak_memory_bytes": 1.0,
    }
    with pytest.raises(ResourcesError, match="hardware was abacus, and is slide rule"):
        compare(dataclasses.replace(now, hardware="slide rule"), then)
    with pytest.raises(ResourcesError, match="processes was 1, and is 2"):
        compare(dataclasses.replace(now, processes=2), then)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account")
def test_peak_memory_is_what_the_system_says():
    ballast = bytearray(b"x" * 64 * 2**20)
    with open("/proc/self/status") as file:  # noqa: PTH123
        (line,) = [line for line in file if line.startswith("VmHWM")]
    assert peak_memory(cuda=False) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
    assert peak_memory(cuda=False) > len(ballast)
