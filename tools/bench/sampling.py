"""Measure how fast completions are drawn, side by side, against what the machine's products allow.

``python -m tools.bench.sampling`` draws the same completions by the engine, by ``generate`` and one
at a time, and times nothing but the model's matrix products for the same work: the floor. All in
one run, in float32, each way after a short warm-up, so that only ratios count. With the policy
``smollm2`` it needs ``make smollm2``.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from grpo_harness.engines.engine import Request, Sample, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy import load
from grpo_harness.tasks import task_types

_T = TypeVar("_T")

_CHUNK = 1024
"""Tokens of prompts whose products are timed at once, for the floor."""


@dataclass(frozen=True)
class Way:
    """One way to draw: seconds, completions, and drawn tokens."""

    name: str
    seconds: float
    completions: int
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of ways."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.sampling")
    parser.add_argument("--policy", default="smollm2", help="the policy (smollm2)")
    parser.add_argument("--problems", type=int, default=32, help="how many problems (32)")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16], help="each (4 16)")
    parser.add_argument("--tokens", type=int, default=48, help="drawn at most (48)")
    parser.add_argument("--alone", type=int, default=8, help="completions drawn one by one (8)")
    arguments = parser.parse_args(argv)
    policy, sampling = load(arguments.policy), Sampling(max_new_tokens=arguments.tokens)
    types = [*task_types().values()]
    problems = [
        types[i % len(types)].problems(arguments.problems)[i // len(types)]
        for i in range(arguments.problems)
    ]
    prompts = [policy.render(problem.prompt) for problem in problems]
    sys.stdout.write(f"{policy.name}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    with TransformersEngine(policy, sampling, device="cpu", dtype="float32") as engine:
        for k in arguments.samples:
            requests = [
                Request(prompt, sample_seed(1, problem.id, number))
                for problem, prompt in zip(problems, prompts, strict=True)
                for number in range(k)
            ]
            engine.sample(requests[:k])
            drawn, ours = _timed(partial(engine.sample, requests))
            ways = [_way("this engine", ours, drawn)]
            generated, plain = _timed(partial(_generate, engine, prompts, k, sampling))
            ways.append(_way("generate", plain, generated))
            if k == min(arguments.samples) and arguments.alone:
                few = requests[:: max(1, len(requests) // arguments.alone)][: arguments.alone]
                alone, slow = _timed(partial(_alone, engine, few))
                ways.append(_way("one at a time", slow, alone))
            floor = _floor(engine.model, [len(t) for t in engine.tokens(prompts)], drawn)
            ways.append(Way("floor", floor, len(drawn), sum(s.tokens for s in drawn)))
            sys.stdout.write(f"\n{len(prompts)} problems × {k} completions\n{_table(ways)}\n")
    return 0


def _way(name: str, seconds: float, samples: Sequence[Sample]) -> Way:
    return Way(name, seconds, len(samples), sum(sample.tokens for sample in samples))


def _table(ways: Sequence[Way]) -> str:
    """Format ways by tokens a second, which count whatever ended completions earlier."""
    floor = ways[-1].tokens / ways[-1].seconds
    ours = ways[0].tokens / ways[0].seconds
    rows = [
        (
            way.name, way.completions, way.tokens, way.seconds, way.completions / way.seconds,
            rate, rate / floor, ours / rate,
        )
        for way in ways
        for rate in [way.tokens / way.seconds]
    ]  # fmt: skip
    headers = ["way", "completions", "tokens", "s", "completions/s", "tokens/s", "of the floor",
               "this engine is ×"]  # fmt: skip
    return tabulate(
        rows, headers, floatfmt=("", "", "", ".1f", ".2f", ".1f", ".0%", ".2f"), tablefmt="github"
    )


def _alone(engine: TransformersEngine, requests: Sequence[Request]) -> list[Sample]:
    return [engine.sample([request])[0] for request in requests]


def _generate(
    engine: TransformersEngine, prompts: Sequence[str], k: int, sampling: Sampling
) -> list[Sample]:
    """Draw by transformers' ``generate`` with ``num_return_sequences``, 64 rows at a time."""
    found: list[Sample] = []
    tokenizer, model = engine.policy.tokenizer, engine.model
    at_once = max(1, 64 // k)
    for first in range(0, len(prompts), at_once):
        ids: Any = tokenizer.pad(
            {"input_ids": engine.tokens(prompts[first : first + at_once])},
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                **ids,
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                num_return_sequences=k,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(engine.policy.eos_token_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        for row in output[:, ids["input_ids"].shape[1] :].tolist():
            ends = (i for i, t in enumerate(row) if t in engine.policy.eos_token_ids)
            n = next(ends, len(row) - 1) + 1
            found.append(Sample("", n, truncated=False, ids=tuple(row[:n])))
    return found


@torch.inference_mode()
def _floor(model: Any, prompts: Sequence[int], drawn: Sequence[Sample]) -> float:
    """Return the seconds of the matrix products alone: each prompt once, each drawn token once.

    Products of a step have as many rows as there are completions (at most 512).
    """
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    rows = min(len(drawn), 512)
    reading = _products(layers, _CHUNK) / _CHUNK
    step = (_products(layers, rows) + _products([head], rows)) / rows
    return reading * sum(prompts) + step * sum(sample.tokens for sample in drawn)


def _products(layers: Sequence[torch.nn.Linear], rows: int) -> float:
    """Return the least seconds of three passes through layers, for so many rows."""
    given = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}

    def once() -> None:
        for layer in layers:
            torch.nn.functional.linear(given[layer.in_features], layer.weight)

    return min(_timed(once)[1] for _ in range(3))


def _timed(what: Callable[[], _T]) -> tuple[_T, float]:
    begin = time.perf_counter()
    found = what()
    return found, time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
