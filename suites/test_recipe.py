"""Does each recipe mean what was recorded of it?

The recipes are those that the setting ``recipe`` names, or else the built-in ones. That they train
by GRPO is for `test_training.py`.
"""

import pytest


def test_resolved_config(grpo_recipe, grpo_session):
    """The recipe resolves to its recorded config: nothing in it, and no default, has changed."""
    from grpo_harness.plugin.state import clearly
    from grpo_harness.training.recorded import differences, recorded

    was = clearly(lambda: recorded(grpo_recipe.name, grpo_session.settings.baselines))
    changed = clearly(lambda: differences(grpo_recipe, was, device="cpu"))
    if changed:
        told = "; ".join(changed)
        pytest.fail(f"{told}. If it is meant: grpo-harness recipes --record", pytrace=False)
