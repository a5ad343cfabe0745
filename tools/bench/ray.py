"""Measure how drawing on a Ray cluster scales: workers of one thread each, on this machine.

``python -m tools.bench.ray`` draws the same completions with one worker, with two and so on, and by
the engine of transformers in one thread, each after the weights are loaded. Only ratios count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate

from grpo_harness.engines.engine import Engine, Request, Sampling, sample_seed
from grpo_harness.engines.ray import RayEngine
from grpo_harness.engines.ray_cluster import Cluster
from grpo_harness.engines.residency import Residents
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy import load
from grpo_harness.tasks import task_types


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of the engines."""
    import ray

    parser = argparse.ArgumentParser(prog="python -m tools.bench.ray")
    parser.add_argument("--policy", default="nano-trained", help="the policy (nano-trained)")
    parser.add_argument("--problems", type=int, default=512, help="how many problems (512)")
    parser.add_argument("--samples", type=int, default=4, help="completions of each (4)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="workers (1 2)")
    parser.add_argument("--times", type=int, default=3, help="the fastest of so many counts (3)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    policy, sampling = load(arguments.policy), Sampling()
    types = [*task_types().values()]
    problems = [
        types[i % len(types)].problems(arguments.problems)[i // len(types)]
        for i in range(arguments.problems)
    ]
    requests = [
        Request(policy.render(problem.prompt), sample_seed(1, problem.id, number))
        for problem in problems
        for number in range(arguments.samples)
    ]
    with TransformersEngine(policy, sampling, device="cpu", dtype="float32") as local:
        rows = [("local, one thread", _fastest(local, requests, arguments.times))]
    for n in arguments.workers:
        ray.init("local", num_cpus=n, include_dashboard=False, log_to_driver=False)
        cluster = Cluster(device="cpu", dtype="float32")
        engine = RayEngine(policy, sampling, cluster, Residents())
        rows.append((f"ray, {n} of one thread", _fastest(engine, requests, arguments.times)))
        cluster.close()
        ray.shutdown()
    one = rows[1][1]
    table = [(name, s, len(requests) / s, one / s) for name, s in rows]
    headers = ["engine", "s", "completions/s", f"× {rows[1][0]}"]
    shown = tabulate(table, headers, floatfmt=("", ".1f", ".1f", ".2f"), tablefmt="github")
    sys.stdout.write(f"{policy.name}, {len(requests)} completions\n{shown}\n")
    return 0


def _fastest(engine: Engine, requests: Sequence[Request], times: int) -> float:
    """Return the least seconds of drawing, after the workers have loaded the weights."""
    seconds = []
    for _ in range(1 + times):
        begin = time.perf_counter()
        for first in range(0, len(requests), most := getattr(engine, "at_once", 512)):
            engine.sample(requests[first : first + most], None)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


if __name__ == "__main__":
    raise SystemExit(main())
