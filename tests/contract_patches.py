"""The suite's whole contract against every patch of TRL, in a process each: `make contract`.

Kept out of `make test` by its name: it takes about a minute a patch.
"""

import runpy
from pathlib import Path

import pytest

from grpo_harness.contract import Oracle

tests = runpy.run_path(str(Path(__file__).with_name("test_contract.py")))

CONTRACT = ("-k", "not learns and not control_fails and not collapse")
"""The learning test trains in processes of its own, which no patch of this one reaches."""


@pytest.mark.parametrize("patch", tests["CAUGHT"])
def test_patch_breaks_its_invariant(patch, tmp_path, monkeypatch):
    tests["check_patch"](patch, Oracle.of_policy("nano-base", device="cpu"), tmp_path, monkeypatch)


@pytest.mark.parametrize("patch", tests["CAUGHT"])
def test_suite_turns_red(patch):
    _, invariant, says = tests["CAUGHT"][patch]
    result = tests["pytest_of_the_suite"](patch, *CONTRACT)
    assert result.returncode == 1, result.stdout
    assert f"{invariant}: " in result.stdout
    assert says in result.stdout


def test_suite_is_green_without_a_patch():
    result = tests["pytest_of_the_suite"](None, *CONTRACT)
    assert result.returncode == 0, result.stdout
