"""How fast does each policy draw completions, as a share of what the machine can do?

The share is judged against the recorded one of the same hardware, so that a slow machine is no
regression, and a slow sampler is. ``--grpo-record -k throughput`` records it.
"""

import pytest

from grpo_harness.throughput import ROUNDS, judge, record


def test_throughput(benchmark, policy, throughput, throughput_file, request):
    """Draw four completions of problems with long prompts, in turns with the products alone."""
    from grpo_harness.plugin.assertions import conclude
    from grpo_harness.plugin.state import carry, clearly

    benchmark.pedantic(throughput.draw, setup=throughput.floor, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is None:
        pytest.skip("pytest-benchmark is switched off, as beside other workers: nothing is timed")
    found = throughput.result(benchmark.stats.stats.data)
    benchmark.extra_info["tokens_per_second"] = found.tokens_per_second
    benchmark.extra_info["share_of_the_floor"] = found.share
    if request.config.getoption("grpo_record"):
        if found.disturbed:
            pytest.skip(f"not recorded: {found.disturbed}")
        clearly(lambda: record(found, policy.name, throughput_file))
        carry(request.node, "recorded", {"path": str(throughput_file), "notes": []})
        pytest.skip(f"recorded {throughput_file}")
    judged = clearly(lambda: judge(found, throughput_file))
    if judged.verdict is None:
        pytest.skip(judged.reason)
    verdict, said = judged.verdict, judged.reason
    conclude(
        request.node, "throughput", policy.name, "recorded speed", verdict, said, task="sampling"
    )
