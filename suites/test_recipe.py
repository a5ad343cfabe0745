"""Does each recipe of the project mean what was recorded of it, and does it train by GRPO?

The recipes are those that the setting ``recipe`` names: files in TRL's format.
"""

import pytest


def test_resolved_config(grpo_recipe, grpo_session):
    """The recipe resolves to its recorded config: nothing in it, and no default, has changed."""
    from grpo_harness.plugin.state import clearly
    from grpo_harness.training.recorded import differences, recorded

    was = clearly(lambda: recorded(grpo_recipe.name, grpo_session.settings.baselines))
    changed = differences(grpo_recipe, was, device="cpu")
    if changed:
        told = "; ".join(changed)
        pytest.fail(f"{told}. If it is meant: grpo-harness recipes --record", pytrace=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # TRL asks so
def test_contract(grpo_recipe, small_policy, grpo_session, tmp_path):
    """A few steps of the recipe, from a small policy, compute what GRPO says, by its own values."""
    from grpo_harness.contract import watch
    from grpo_harness.plugin.state import clearly
    from grpo_harness.training.run import build

    small, device = grpo_recipe.small(small_policy), grpo_session.settings.device
    run = watch(clearly(lambda: build(small, tmp_path / "run", device=device)))
    if grpo_recipe.values.get("use_vllm"):
        run.not_looked_at["use_vllm"] = "the smoke run samples without vLLM"
    run.holds()
