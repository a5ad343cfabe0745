"""Measure how fast completions are drawn, side by side, against what the machine's products allow.

``python -m tools.bench.sampling`` draws the same completions by the engine, by ``generate``, by
lm-evaluation-harness's ``hf`` backend and one at a time, and times nothing but the model's matrix
products for the same work: the floor. All in one run, in float32, each way after a short warm-up,
so that only ratios count. The engine draws before the others and after them, and the mean counts,
since a machine's speed changes within minutes. ``make bench`` installs what it needs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from grpo_harness.engines.engine import Request, Sample, Sampling, sample_seed
from grpo_harness.engines.floor import floor
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy import load
from grpo_harness.tasks import Problem, task_types
from grpo_harness.training.resources import hardware

_T = TypeVar("_T")


@dataclass(frozen=True)
class Way:
    """One way to draw: seconds, completions, drawn tokens, MiB on top, and seconds in the model."""

    name: str
    seconds: float
    completions: int
    tokens: int
    mebibytes: float | None = None
    model: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of ways."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.sampling")
    parser.add_argument("--policy", default="smollm2", help="the policy (smollm2)")
    parser.add_argument("--problems", type=int, default=32, help="how many problems (32)")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16], help="each (4 16)")
    parser.add_argument("--tokens", type=int, default=48, help="drawn at most (48)")
    parser.add_argument("--alone", type=int, default=8, help="completions drawn one by one (8)")
    parser.add_argument("--batch", type=int, default=64, help="rows of the other ways (64)")
    arguments = parser.parse_args(argv)
    policy, sampling = load(arguments.policy), Sampling(max_new_tokens=arguments.tokens)
    types = [*task_types().values()]
    twice = [
        types[i % len(types)].problems(arguments.problems)[i // len(types)]
        for i in range(2 * arguments.problems)
    ]
    prompts = [policy.render(problem.prompt) for problem in twice[: arguments.problems]]

    def requests_of(problems: Sequence[Problem], k: int) -> list[Request]:
        return [
            Request(policy.render(problem.prompt), sample_seed(1, problem.id, number))
            for problem in problems
            for number in range(k)
        ]

    sys.stdout.write(f"{policy.name} in float32 on {hardware(cuda=False)}\n")
    with TransformersEngine(policy, sampling, device="cpu", dtype="float32") as engine:
        clock = _Clock(engine.model)
        took: dict[int, float] = {}
        resting = _memory("VmRSS")
        for k in arguments.samples:
            requests = requests_of(twice[: arguments.problems], k)

            def measured(name: str, draw: Callable[[], list[Sample]]) -> Way:
                nonlocal resting
                _trim()
                within = clock.seconds
                if resting is not None:  # what another way has left behind is not taken off
                    resting = min(resting, _memory("VmRSS") or resting)
                drawn, seconds = _timed(draw)
                more = None if resting is None else (_memory("VmHWM") or resting) - resting
                tokens = sum(sample.tokens for sample in drawn)
                return Way(name, seconds, len(drawn), tokens, more, clock.seconds - within)

            engine.sample(requests[:k])
            samples: list[Sample] = []
            ways = [measured("this engine", partial(_kept, samples, engine, requests))]
            others: dict[str, Callable[[], list[Sample]]] = {
                f"generate, {arguments.batch} rows": partial(
                    _generate, engine, prompts, k, sampling, arguments.batch
                )
            }
            if importlib.util.find_spec("lm_eval"):
                others["lm-evaluation-harness, hf"] = partial(
                    _lm_eval, engine, [r.prompt for r in requests], sampling, arguments.batch
                )
            if k == min(arguments.samples) and arguments.alone:
                few = requests[:: max(1, len(requests) // arguments.alone)][: arguments.alone]
                others["one at a time"] = partial(_alone, engine, few)
            read = [len(ids) for ids in engine.tokens([*dict.fromkeys(prompts)])]
            before = floor(engine.model, read, samples)
            ways += [measured(name, draw) for name, draw in others.items()]
            ways[0] = _mean(ways[0], measured("this engine", partial(engine.sample, requests)))
            took[k] = ways[0].seconds
            # Another process may have disturbed one of the two.
            least = min(before, floor(engine.model, read, samples))
            tokens = sum(sample.tokens for sample in samples)
            ways.append(Way("floor", least, len(samples), tokens))
            sys.stdout.write(f"\n{len(prompts)} problems × {k} completions\n{_table(ways)}\n")
            sys.stdout.flush()
        fewest, *more = sorted(took)
        _, seconds = _timed(partial(engine.sample, requests_of(twice, fewest)))
        grown = [
            f"{k} completions take {took[k] / took[fewest]:.2f} times as long as {fewest}"
            for k in more
        ]
        grown += [f"twice the problems {seconds / took[fewest]:.2f} times as long"]
        sys.stdout.write(f"\nThis engine: {', '.join(grown)}.\n")
    return 0


class _Clock:
    """Counts the seconds inside a model's calls."""

    def __init__(self, model: Any) -> None:
        self.seconds = self._began = 0.0
        model.register_forward_pre_hook(lambda *_: self._begin())
        model.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._began


def _mean(one: Way, other: Way) -> Way:
    """Return the mean of two times, and the greater peak."""
    assert one.tokens == other.tokens
    return replace(
        one,
        seconds=(one.seconds + other.seconds) / 2,
        model=((one.model or 0.0) + (other.model or 0.0)) / 2,
        mebibytes=max(one.mebibytes or 0.0, other.mebibytes or 0.0) or None,
    )


def _table(ways: Sequence[Way]) -> str:
    """Format ways by tokens a second, which count whatever ended completions earlier."""
    least = ways[-1].tokens / ways[-1].seconds
    ours = ways[0].tokens / ways[0].seconds
    rows = [
        (
            way.name, way.completions, way.tokens, f"{way.seconds:.1f}",
            f"{way.completions / way.seconds:.2f}", f"{rate:.1f}", f"{rate / least:.0%}",
            f"{ours / rate:.2f}", "" if way.mebibytes is None else f"{way.mebibytes:.0f}",
            "" if way.model is None else f"{1 - way.model / way.seconds:.1%}",
        )
        for way in ways
        for rate in [way.tokens / way.seconds]
    ]  # fmt: skip
    headers = ["way", "completions", "tokens", "s", "completions/s", "tokens/s", "of the floor",
               "this engine is ×", "peak MiB", "outside the model"]  # fmt: skip
    return tabulate(rows, headers, disable_numparse=True, tablefmt="github")


def _kept(
    samples: list[Sample], engine: TransformersEngine, requests: Sequence[Request]
) -> list[Sample]:
    samples += engine.sample(requests)
    return samples


def _alone(engine: TransformersEngine, requests: Sequence[Request]) -> list[Sample]:
    return [engine.sample([request])[0] for request in requests]


def _generate(
    engine: TransformersEngine, prompts: Sequence[str], k: int, sampling: Sampling, rows: int
) -> list[Sample]:
    """Draw by transformers' ``generate`` with ``num_return_sequences``, so many rows at a time."""
    found: list[Sample] = []
    tokenizer, model = engine.policy.tokenizer, engine.model
    at_once = max(1, rows // k)
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


def _lm_eval(
    engine: TransformersEngine, prompts: Sequence[str], sampling: Sampling, rows: int
) -> list[Sample]:
    """Draw by the ``hf`` backend of lm-evaluation-harness, of the same model in memory."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=engine.model, tokenizer=engine.policy.tokenizer, batch_size=rows, device="cpu"
    )
    how = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "max_gen_toks": sampling.max_new_tokens,
        "until": [],
    }
    asked = [Instance("generate_until", {}, (of, how), i) for i, of in enumerate(prompts)]
    texts = model.generate_until(asked, disable_tqdm=True)
    tokens = engine.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    # It gives texts alone: their tokens, and the one that ended them if they are short.
    counts = [min(len(ids) + 1, sampling.max_new_tokens) for ids in tokens]
    return [Sample(text, n, truncated=False) for text, n in zip(texts, counts, strict=True)]


def _timed(what: Callable[[], _T]) -> tuple[_T, float]:
    begin = time.perf_counter()
    found = what()
    return found, time.perf_counter() - begin


def _trim() -> None:
    """Give freed memory back, and forget the peak, where the system is Linux."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> float | None:
    """Return a figure of this process's memory in MiB, or ``None`` where there is no Linux."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    raise SystemExit(main())
