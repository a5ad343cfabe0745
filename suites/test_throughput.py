"""How fast does each policy draw completions? Measured and reported, never judged."""

from grpo_harness.tasks import task_types


def test_sampling(benchmark, policy, engine, sample):
    """Draw completions of 64 problems of the type with the longest prompts, in one batch."""
    prompts = [problem.prompt for problem in task_types()["sort"].problems(64)]
    answers = benchmark.pedantic(sample, args=(policy, prompts), rounds=3, warmup_rounds=1)
    tokens = sum(answer.tokens for answer in answers)
    benchmark.extra_info["completion_tokens"] = tokens
    benchmark.extra_info.update(engine.identity())
    if benchmark.stats is not None:  # pytest-benchmark is switched off under xdist
        benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median
