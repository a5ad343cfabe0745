"""Does a training run look like the recorded ones, and is what was saved what was trained?

The run is the one that the setting ``training`` names, or ``--grpo-training DIR``: what TRL's
trainer or `grpo-harness train` wrote. `grpo-harness log RUN RUN RUN --record` records the runs.
"""

import pytest


def test_curves(grpo_log, recorded_runs, request):
    """No figure is outside the band of one more run."""
    from dataclasses import asdict

    from grpo_harness.logs.judge import judge
    from grpo_harness.logs.plot import curves, plot
    from grpo_harness.plugin.assertions import conclude
    from grpo_harness.plugin.state import carry, clearly

    judgement = judge(grpo_log, recorded_runs)
    for curve in curves(grpo_log, recorded_runs):
        carry(request.node, "curve", {"training": recorded_runs.training, **asdict(curve)})
    if folder := request.config.getoption("grpo_report"):
        place = request.config.invocation_params.dir / folder
        place.mkdir(parents=True, exist_ok=True)
        clearly(lambda: plot(grpo_log, recorded_runs, place / "training.png"))
    said = judgement.message()
    name = recorded_runs.training
    conclude(request.node, "curves", name, "recorded runs", judgement.verdict, said)


def test_reward_is_not_earned_without_correctness(grpo_log, grpo_session):
    """No reward has risen while the reward that decides correctness fell."""
    from grpo_harness.logs.hacking import hacking

    found = hacking(grpo_log, grpo_session.settings.decisive())
    if found.decisive is None:
        pytest.skip(found.reason)
    if found.verdict != "PASS":
        pytest.fail(found.message(), pytrace=False)


def test_checkpoint_earns_what_was_logged(grpo_log, grpo_recipe, grpo_session, request):
    """The saved checkpoint, asked training prompts, earns the reward of the last steps."""
    from grpo_harness.logs.reconcile import reconcile
    from grpo_harness.plugin.assertions import conclude
    from grpo_harness.plugin.state import clearly

    if grpo_log.training not in (None, grpo_recipe.name):
        pytest.skip(f"the training is of the recipe {grpo_log.training}, not {grpo_recipe.name}")
    device = grpo_session.settings.device
    found = clearly(lambda: reconcile(grpo_log, grpo_recipe, device=device))
    name = grpo_recipe.name
    conclude(request.node, "checkpoint", name, "its log", found.verdict, found.message())
