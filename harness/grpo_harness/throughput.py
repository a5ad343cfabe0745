"""How much of what the machine can do does the sampler reach?

Its speed is measured in turns with the floor (`engines/floor.py`), so that a slow machine changes
both. The share is judged against the recorded one of the same hardware:
``<baselines>/throughput/<policy>.json``, in git.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import psutil
from msgspec import Meta
from scipy.special import stdtrit

from grpo_harness.atomic import read, replace
from grpo_harness.engines.engine import Request, Sample, sample_seed
from grpo_harness.errors import HarnessError
from grpo_harness.text import escape
from grpo_harness.training.resources import hardware

if TYPE_CHECKING:
    from grpo_harness.engines.transformers import TransformersEngine
    from grpo_harness.evaluation import Questions

ROUNDS = 4
"""How often the sampler and the floor are timed, in turns."""

PROBLEMS, SAMPLES = 16, 4

LEAST = 0.25
"""A share that is lower by less than this part is never a fault."""

BUSY = 0.2
"""If others take this part of the processors or more, the speed is not judged."""

FOLDER = "throughput"
_RECORD = "record it with --grpo-record -k throughput"
_SCHEMA = 1
_RISK = 0.001


class ThroughputError(HarnessError):
    """The speed cannot be compared. One line: the file, what is wrong, what to do."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was recorded on one class of hardware: the share of the floor in each round."""

    hardware: str
    dtype: str
    shares: Annotated[list[Annotated[float, Meta(gt=0, lt=100)]], Meta(min_length=2)]


class Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The recorded speed of a policy, one entry for each class of hardware."""

    schema: int
    policy: str
    machines: list[Machine]


@dataclass(frozen=True)
class Throughput:
    """A measured speed. ``busy`` is the part of the processors that others took meanwhile."""

    machine: Machine
    tokens_per_second: float
    busy: float

    @property
    def disturbed(self) -> str:
        """Why the speed says nothing, or an empty text."""
        if self.busy < BUSY:
            return ""
        return f"other processes took {self.busy:.0%} of the processors: run it alone"

    @property
    def share(self) -> float:
        """The share of the floor, the geometric mean over the rounds."""
        return math.exp(_log_mean(self.machine.shares))


@dataclass(frozen=True)
class Judgement:
    """A verdict, and why; ``None`` means that nothing could be judged here."""

    verdict: Literal["PASS", "FAIL", "UNPROVEN"] | None
    reason: str


class Race:
    """The sampler against the floor, in turns: call ``floor`` and ``draw`` each round."""

    def __init__(self, engine: TransformersEngine, questions: Questions) -> None:
        self._engine = engine
        prompts = questions.prompts[:PROBLEMS]
        self._requests = [
            Request(prompt, sample_seed(0, prompt, number))
            for prompt in prompts
            for number in range(SAMPLES)
        ]
        self._prompts = [len(ids) for ids in engine.tokens([*dict.fromkeys(prompts)])]
        self._samples: list[Sample] | None = None
        self._floors: list[float] = []
        self._began = time.perf_counter(), _others()

    def draw(self) -> list[Sample]:
        """Draw completions: the same in each round."""
        self._samples = self._engine.sample(self._requests)
        return self._samples

    def floor(self) -> None:
        """Time the floor of the same work."""
        from grpo_harness.engines.floor import floor

        samples = self._samples or self.draw()
        self._floors.append(floor(self._engine.model, self._prompts, samples, rounds=1))

    def result(self, seconds: Sequence[float]) -> Throughput:
        """Return the speed, from the seconds of each ``draw`` but those that were a warm-up."""
        assert self._samples is not None
        floors = self._floors[-len(seconds) :]
        device = self._engine.device
        machine = Machine(
            hardware=hardware(cuda=device.type == "cuda"),
            dtype=str(self._engine.dtype).removeprefix("torch."),
            shares=[least / took for least, took in zip(floors, seconds, strict=True)],
        )
        tokens = sum(sample.tokens for sample in self._samples)
        began, others = self._began
        elapsed = (time.perf_counter() - began) * (psutil.cpu_count() or 1)
        busy = max(0.0, _others() - others) / elapsed
        return Throughput(machine, tokens * len(seconds) / sum(seconds), busy)


def judge(now: Throughput, path: Path) -> Judgement:
    """Judge a speed: FAIL if its share of the floor is lower than recorded, beyond the noise.

    It is not judged if nothing was recorded on this hardware or the machine is busy, and UNPROVEN
    if half the speed would not be seen. Raises ``ThroughputError`` for a damaged file.
    """
    found = f"{now.tokens_per_second:.4g} tokens a second, {now.share:.1%} of the floor"
    own = now.machine
    then = _of(path, own)
    if then is None:
        why = f"{path} has nothing of {escape(own.hardware)} in {own.dtype}: {_RECORD}"
        return Judgement(None, f"{found}, not judged: {why}")
    if now.disturbed:
        return Judgement(None, f"{found}, not judged: {now.disturbed}")
    change = _log_mean(own.shares) - _log_mean(then.shares)
    noise = _noise(own.shares, then.shares)
    said = f"{found}, and {math.exp(_log_mean(then.shares)):.1%} was recorded"
    if change < -max(noise, -math.log1p(-LEAST)):
        return Judgement(
            "FAIL", f"{said}: the sampler is {1 - math.exp(change):.0%} slower on this machine"
        )
    if noise > math.log(2):
        return Judgement("UNPROVEN", f"{said}; the rounds differ so much that half is not seen")
    return Judgement("PASS", said)


def path_of(baselines: Path, slugs: Iterable[str]) -> Path:
    """Return the file of the first of ``slugs`` that has one, or else where the first's would be.

    The first is the policy's own, and the others stand in for it.
    """
    paths = [baselines / FOLDER / f"{slug}.json" for slug in slugs]
    return next((path for path in paths if path.is_file()), paths[0])


def load(path: Path) -> Recorded:
    """Load a recorded speed. Raises ``ThroughputError``."""
    return read(path, Recorded, _SCHEMA, ThroughputError)


def record(now: Throughput, policy: str, path: Path) -> None:
    """Record a speed, in place of that of the same hardware. Raises ``ThroughputError``."""
    if now.disturbed:
        raise ThroughputError(f"no speed is recorded: {now.disturbed}")
    own = now.machine
    others = [
        of
        for of in (load(path).machines if path.is_file() else [])
        if (of.hardware, of.dtype) != (own.hardware, own.dtype)
    ]
    rounded = msgspec.structs.replace(own, shares=[round(share, 4) for share in own.shares])
    content = msgspec.to_builtins(Recorded(_SCHEMA, policy, [*others, rounded]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(content, indent=1) + "\n")


def _of(path: Path, machine: Machine) -> Machine | None:
    """Return what was recorded on the same hardware, if anything."""
    machines = load(path).machines if path.is_file() else []
    same = (of for of in machines if (of.hardware, of.dtype) == (machine.hardware, machine.dtype))
    return next(same, None)


def _log_mean(shares: Sequence[float]) -> float:
    return fmean(map(math.log, shares))


def _noise(now: Sequence[float], then: Sequence[float]) -> float:
    """Return the difference of mean logarithms that chance exceeds with ``_RISK`` (Student's t)."""
    logs = [[math.log(share) for share in side] for side in (now, then)]
    freedom = len(now) + len(then) - 2
    within = sum((len(side) - 1) * variance(side) for side in logs) / freedom
    error = math.sqrt(within * (1 / len(now) + 1 / len(then)))
    return float(stdtrit(freedom, 1 - _RISK)) * error


def _others() -> float:
    """Return the processor seconds of all processes but this one, since the machine started."""
    times = psutil.cpu_times()
    own = psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
    return float(sum(times) - idle - own.user - own.system)
