"""Are the policies what they are said to be: whole, sane, and two?"""

import torch

from harness.sampling import Request, Sampling, sample_seed
from harness.sampling.transformers import TransformersSampler
from harness.text import escape


def test_logits_are_finite(policy, task_type):
    """The policy gives every token of a batch of padded prompts a finite logit."""
    prompts = [policy.render(problem.prompt) for problem in task_type.problems(8)]
    batch = policy.tokenizer(
        prompts, add_special_tokens=False, padding=True, return_tensors="pt"
    ).to(policy.device)
    with torch.inference_mode():
        logits = policy.model(**batch).logits
    finite = torch.isfinite(logits[batch["attention_mask"].bool()]).all(-1)
    assert finite.all(), f"{policy.name}: {int((~finite).sum())} of {len(finite)} tokens have none"


def test_samples_are_text(policy, task_type):
    """The policy answers with text, and with the same text for the same seed."""
    problems = task_type.problems(4)
    requests = [
        Request(policy.render(problem.prompt), sample_seed(0, problem.id, 0))
        for problem in problems
    ]
    sampler = TransformersSampler(policy, Sampling(max_new_tokens=16))
    samples = sampler.sample(requests)
    for problem, sample in zip(problems, samples, strict=True):
        print(f"{problem.id}: {escape(sample.text)}")  # noqa: T201 - pytest shows it with -s
    assert sampler.sample(requests) == samples, "the same seeds gave other answers"
    assert any(sample.text.strip() for sample in samples), f"{policy.name} answers nothing at all"


def test_trained_is_not_base(base_policy, trained_policy):
    """Training has moved the weights: a run that loads the base twice is caught here."""
    moved = trained_policy.fingerprint.weights != base_policy.fingerprint.weights
    assert moved, (
        f"{trained_policy.name} and {base_policy.name} have the same weights (fingerprint "
        f"{base_policy.fingerprint}): training changed nothing, or the wrong checkpoint was saved "
        "or named. Point --grpo-trained at the checkpoint that training wrote"
    )
