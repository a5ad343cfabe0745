"""What a training run took: time, tokens and memory, and on which hardware.

Figures of two runs are compared only if their hardware is of the same class.
"""

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from grpo_harness.errors import HarnessError
from grpo_harness.text import escape, one_line
from grpo_harness.training.curves import Row

FILE = "resources.json"
_FIGURES = ("step_seconds", "tokens_per_second", "peak_memory_bytes")

# Larger figures are not plausible: an hour is 3600 seconds, a TiB 1.1e12 bytes.
_Figure = Annotated[float, Meta(gt=0, lt=1e15)]
_Count = Annotated[int, Meta(gt=0, lt=10**15)]


class ResourcesError(HarnessError):
    """Figures cannot be read or compared. One line with the reason."""


@dataclass(frozen=True)
class Resources:
    """What the steps of a run took.

    ``hardware`` is the class of the machine: the processor with its threads, or the GPUs.
    ``step_seconds`` is the median of the trainer's ``step_time``, ``tokens_per_second`` counts
    completion tokens of all processes, ``peak_memory_bytes`` is that of the largest process: on
    CUDA what torch allocated, on the CPU its resident set.
    """

    hardware: str
    processes: _Count
    step_seconds: _Figure
    tokens_per_second: _Figure
    peak_memory_bytes: _Count

    def __str__(self) -> str:
        return (
            f"{self.step_seconds:.2f} s a step, {self.tokens_per_second:.0f} completion tokens "
            f"a second, at most {self.peak_memory_bytes / 2**20:.0f} MiB, on {self.processes} "
            f"process{'es' if self.processes > 1 else ''} of {self.hardware}"
        )


def resources(
    rows: Sequence[Row], *, completions: int, processes: int, peak: int, cuda: bool
) -> Resources:
    """Sum up the logged ``rows`` of a run that drew ``completions`` in a generation batch."""
    # A step that reuses completions logs no length of its own.
    tokens = sum(row.get("completions/mean_length") or 0.0 for row in rows) * completions
    seconds = [row["step_time"] for row in rows]
    return Resources(
        hardware=hardware(cuda=cuda),
        processes=processes,
        step_seconds=statistics.median(seconds),
        tokens_per_second=tokens / sum(seconds),
        peak_memory_bytes=peak,
    )


def hardware(*, cuda: bool) -> str:
    """Name the class of this machine: figures of the same class can be compared."""
    import torch

    if cuda:
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, "") or platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def peak_memory(*, cuda: bool) -> int:
    """Return the peak memory of this process, in bytes."""
    if cuda:
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_resources(measured: Resources, folder: Path) -> None:
    """Write ``resources.json`` into ``folder``."""
    text = json.dumps(asdict(measured), indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_resources(folder: Path) -> Resources:
    """Read what ``write_resources`` wrote. Raises ``ResourcesError``."""
    path = folder / FILE
    try:
        measured = msgspec.json.decode(path.read_bytes(), type=Resources)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ResourcesError(
            f"{path} cannot be read ({one_line(error)}): "
            "name a folder that `grpo-harness train` left"
        ) from error
    # Untrusted: it may come with a downloaded checkpoint, and is shown on a terminal.
    return replace(measured, hardware=escape(measured.hardware))


def compare(now: Resources, then: Resources) -> Mapping[str, float]:
    """Return now over then of each figure. Raises ``ResourcesError`` for unequal machines."""
    for name in ("hardware", "processes"):
        if getattr(now, name) != getattr(then, name):
            raise ResourcesError(
                f"not comparable: {name} was {getattr(then, name)}, and is {getattr(now, name)}; "
                "compare with a run on the same"
            )
    return {name: getattr(now, name) / getattr(then, name) for name in _FIGURES}
