"""A GPU for each worker of pytest-xdist, chosen before torch starts. Loads no torch."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVERS = Path("/proc/driver/nvidia/gpus")


def gpus(environ: Mapping[str, str], drivers: Path = _DRIVERS) -> list[str]:
    """Return the GPUs that the process may use, by the names of ``CUDA_VISIBLE_DEVICES``."""
    named = environ.get(_VISIBLE)
    if named is None:
        return [str(number) for number in range(len([*drivers.glob("*")]))]
    names = [name.strip() for name in named.split(",")]
    # CUDA ignores what stands behind the first that is none.
    ends = (i for i, name in enumerate(names) if not name or name.startswith("-"))
    return names[: next(ends, len(names))]


def see_one(
    environ: MutableMapping[str, str], worker: str, device: str, drivers: Path = _DRIVERS
) -> None:
    """Let worker ``gw3`` see the fourth GPU alone, or one again from the first if there are fewer.

    A ``device`` with a number, and a machine without a GPU, are left as they are.
    """
    found = gpus(environ, drivers)
    number = worker.removeprefix("gw")
    if found and number.isdecimal() and device in ("auto", "cuda"):
        environ[_VISIBLE] = found[int(number) % len(found)]
