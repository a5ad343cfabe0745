"""How answers are drawn: requests in, samples out, in order. One file, one engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

MOST_SAMPLES = 500
"""Samples of one problem at most: none of the exact tests' probabilities is then too small for a
float.
"""


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn from the policy's distribution.

    The logits are divided by ``temperature``, then the smallest set of most likely tokens whose
    probability reaches ``top_p`` is kept. With ``greedy`` the most likely token is taken and
    both play no part. At most ``max_new_tokens`` tokens are drawn.
    """

    temperature: float = 0.8
    top_p: float = 0.9
    max_new_tokens: int = 64
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.max_new_tokens >= 1):
            raise ValueError(
                "temperature must be above 0, top_p in (0, 1] and max_new_tokens at least 1: "
                f"{self}; for greedy sampling set greedy"
            )

    def asdict(self) -> dict[str, Any]:
        """Return the settings as a baseline keeps them: greedy ones without what they ignore."""
        settings = asdict(self)
        if self.greedy:
            del settings["temperature"], settings["top_p"]
        return settings


@dataclass(frozen=True)
class Request:
    """One completion to draw: the rendered prompt, and the seed that alone decides the draw."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """One drawn completion. ``tokens`` counts the end token; ``truncated`` means it never came.

    ``error`` says why there is no completion, where the engine could not draw one.
    """

    text: str
    tokens: int
    truncated: bool
    error: str | None = None


Progress = Callable[[int], object]
"""Told how many more samples are done, each time some are."""


class Sampler(Protocol):
    """An engine: draws one sample per request, in the order of the requests.

    The sample of a request depends on its prompt and seed, the policy and the settings, and on
    nothing else: not on its neighbours, their number or their order (up to numerics).
    """

    def settings(self) -> dict[str, Any]:
        """Return every setting that decides a draw, as a baseline keeps them."""

    def sample(self, requests: Sequence[Request], progress: Progress | None) -> list[Sample]:
        """Draw the samples."""


def sample_seed(run: int, problem: str, sample: int) -> int:
    """Derive the seed of one sample from the run's seed, the problem's id and its number."""
    digest = hashlib.sha256(f"{run}|{problem}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
