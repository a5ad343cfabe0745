"""Does a training run look like the recorded ones? Its log, judged figure by figure.

The run is the one that the setting ``training`` names, or ``--grpo-training DIR``: what TRL's
trainer or `grpo-harness train` wrote. `grpo-harness log RUN RUN RUN --record` records the runs.
"""

import pytest


def test_curves(grpo_log, recorded_runs, pytestconfig):
    """No figure is outside the band of one more run."""
    from grpo_harness.logs.judge import judge
    from grpo_harness.logs.plot import plot

    judgement = judge(grpo_log, recorded_runs)
    if folder := pytestconfig.getoption("grpo_report"):
        place = pytestconfig.invocation_params.dir / folder
        place.mkdir(parents=True, exist_ok=True)
        plot(grpo_log, recorded_runs, place / "training.png")
    if judgement.verdict != "PASS":
        pytest.fail(judgement.message(), pytrace=False)
