"""Does each server serve the policy that it is said to serve?"""


def test_the_server_serves_the_policy(admission):
    """Its log-probabilities are those of the checkpoint, and it draws as it is told."""
    print(f"\n{admission.message()}")  # noqa: T201 - `grpo-harness admit` shows it
    assert admission.verdict == "PASS", admission.message()
