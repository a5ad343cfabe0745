"""Are the policies what they should be: complete, working, and two different ones?"""

from grpo_harness.text import escape


def test_logits_are_finite(engine, policy, task_type):
    """The policy's logits are finite for every token of a batch of padded prompts."""
    import torch

    prompts = [policy.render(problem.prompt) for problem in task_type.problems(8)]
    batch = policy.tokenizer(
        prompts, add_special_tokens=False, padding=True, return_tensors="pt"
    ).to(engine.device)
    with torch.inference_mode():
        logits = engine.model(**batch).logits
    finite = torch.isfinite(logits[batch["attention_mask"].bool()]).all(-1)
    assert finite.all(), (
        f"{policy.name}: {int((~finite).sum())} of {len(finite)} tokens have a logit that is not "
        "finite"
    )


def test_samples_are_text(policy, task_type, sample, grpo_session):
    """The policy writes text, and the same text for the same seed, unless a server draws it."""
    problems = task_type.problems(4)
    prompts = [problem.prompt for problem in problems]
    answers = sample(policy, prompts)
    for problem, answer in zip(problems, answers, strict=True):
        print(f"{problem.id}: {escape(answer.text)}")  # noqa: T201 - pytest shows it with -s
    # Few servers draw the same text whatever else they have to do.
    if policy.checkpoint.name not in grpo_session.settings.served:
        assert sample(policy, prompts) == answers, "the same seed gave other answers"
    assert any(answer.text.strip() for answer in answers), f"{policy.name} answers nothing at all"


def test_trained_is_not_base(base_policy, trained_policy, sample):
    """Training has moved the weights: a run that loads the base twice is caught here.

    Both the files and the weights in memory are checked: an engine refuses another policy's
    weights.
    """
    moved = trained_policy.fingerprint.weights != base_policy.fingerprint.weights
    assert moved, (
        f"{trained_policy.name} and {base_policy.name} have the same weights (fingerprint "
        f"{base_policy.fingerprint}): training changed nothing, or the wrong checkpoint was saved "
        "or named. Point --grpo-trained at the checkpoint that training wrote"
    )
    for policy in (base_policy, trained_policy):
        sample(policy, ["1 + 1"])
