"""How fast does each policy answer? Measured and reported, never judged."""

from harness.sampling import Request, Sampling, sample_seed
from harness.sampling.transformers import TransformersSampler
from harness.tasks import task_types


def test_sampling(benchmark, policy):
    """One batch of 64 answers to sort problems, the longest prompts there are."""
    problems = task_types()["sort"].problems(64)
    requests = [
        Request(policy.render(problem.prompt), sample_seed(0, problem.id, 0))
        for problem in problems
    ]
    sampler = TransformersSampler(policy, Sampling())
    samples = benchmark.pedantic(sampler.sample, args=(requests,), rounds=3, warmup_rounds=1)
    tokens = sum(sample.tokens for sample in samples)
    benchmark.extra_info["completion_tokens"] = tokens
    benchmark.extra_info["device"] = str(policy.device)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median
