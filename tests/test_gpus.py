"""Each worker of pytest-xdist has a GPU of its own, as far as there are some."""

import pytest

from grpo_harness.plugin.gpus import gpus, see_one


@pytest.fixture
def drivers(tmp_path):
    """What the NVIDIA driver lists on a machine with three GPUs."""
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:41:00.0"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("GPU-8f2c, MIG-7a", ["GPU-8f2c", "MIG-7a"]),
        ("1,-1,0", ["1"]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_are_those_that_cuda_would_see(drivers, visible, wanted):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpus(environ, drivers) == wanted


def test_workers_take_turns(drivers):
    seen = []
    for number in range(5):
        environ = {}
        see_one(environ, f"gw{number}", "auto", drivers)
        seen.append(environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["0", "1", "2", "0", "1"]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_that_is_named_stays(drivers, device):
    environ = {}
    see_one(environ, "gw1", device, drivers)
    assert environ == {}


def test_a_machine_without_gpus_stays_as_it_is(tmp_path):
    environ = {}
    see_one(environ, "gw1", "auto", tmp_path / "none")
    assert environ == {}


def test_workers_of_a_run_see_theirs_before_a_test_starts(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    pytester.makepyprojecttoml('[tool.grpo-harness]\nbase = "nano-base"\n')
    pytester.makepyfile(
        """
        import os, sys
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_one(number, worker_id):
            assert "torch" not in sys.modules
            assert os.environ["CUDA_VISIBLE_DEVICES"] == {"gw0": "7", "gw1": "9"}[worker_id]
        """
    )
    result = pytester.runpytest_subprocess("-n", "2", "-p", "no:benchmark", "-p", "xdist")
    result.assert_outcomes(passed=8)
