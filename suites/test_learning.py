"""Does GRPO still learn, and would this file notice if it did not?

Short runs from nano-base are judged by what they gain, never by their loss. The controls are runs
in which nothing can be learned, or the wrong thing: each must fail the very same test, or its PASS
would say nothing. How often each passes and fails is in ``harness/nano/LEARNING.md``.
"""

from dataclasses import replace

import pytest

NEXT = (
    "See the exact checks of GRPO first (pytest suites/test_training.py), then the curves of "
    "one run: grpo-harness train learn --out /tmp/learn"
)


@pytest.fixture(scope="module")
def judge():
    """Run all trials, two at a time, while the tests wait for those they judge."""
    from harness.nano.learn import laboratory

    with laboratory() as trials:
        yield trials.judge


def test_grpo_learns(judge):
    """The reward rises, held-out answers are better, and every figure stays in bounds."""
    learning = judge("learn")
    assert learning.name == "PASS", f"GRPO does not learn. {learning.reason}. {NEXT}"


@pytest.mark.parametrize(
    ("control", "criteria"),
    [
        ("rate zero", {"gain", "accuracy"}),
        ("shuffled", {"gain", "accuracy"}),
        ("constant", {"gain", "accuracy", "grad_norm"}),
        ("negated", {"gain", "accuracy"}),
    ],
)
def test_control_fails(judge, control, criteria):
    """A run that cannot learn does not pass the learning test, and what is missing is named."""
    learning = judge(control)
    missing = criteria - learning.broken.keys()
    assert not missing, (
        f"the control {control!r} should break {sorted(criteria)}, and {sorted(missing)} hold "
        f"({learning.name}: {learning.reason}): the learning test no longer tells learning from "
        "chance. Compare with harness/nano/LEARNING.md"
    )


def test_collapse_is_no_learning(judge):
    """The reward rises because answers go empty: whatever gain is asked, that is a failure."""
    from harness.learning import Limits

    learning = judge("collapse", replace(Limits(), gain=0.0))
    assert learning.lower > 0.0, f"this collapse earned nothing: {learning.reason}"
    missing = {"accuracy", "length"} - learning.broken.keys()
    assert not missing, (
        f"the reward rose by {learning.gain.estimate.mean:.3f} while answers shrank to "
        f"{learning.length:.2f} of their length, held-out accuracy went from "
        f"{learning.accuracy.then:.1%} to {learning.accuracy.now:.1%}, and {sorted(missing)} "
        "does not object"
    )
