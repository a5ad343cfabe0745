"""The interface of every engine. Loads no torch."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Protocol, get_args, get_type_hints

import msgspec
from msgspec import Meta

from grpo_harness.errors import HarnessError


class EngineError(HarnessError):
    """Completions cannot be drawn. One line: the policy, what happened, what to do.

    ``drawn`` has the samples that had been drawn before, by the numbers of their requests.
    """

    drawn: "Mapping[int, Sample]" = MappingProxyType({})


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a completion is drawn from the policy's distribution.

    ``repetition_penalty`` divides the positive logits of the tokens in the prompt and the
    completion so far, and multiplies the negative ones. All logits are divided by ``temperature``.
    Of the ``top_k`` most likely tokens, with those as likely as the last of them, the smallest set
    of most likely ones whose probability reaches ``top_p`` is kept, and of these those that have
    ``min_p`` of the greatest probability. With ``greedy`` the most likely token is taken, and the
    last four are ignored. At most ``max_new_tokens`` tokens are drawn. Raises ``ValueError``.

    A completion ends with the first string of ``stop`` in its text, which is decoded without
    special tokens. What the last token has beyond that string is not in the text.
    """

    temperature: Annotated[
        float,
        Meta(
            gt=0,
            le=sys.float_info.max,
            description="logits are divided by it: finite and above 0; see greedy",
        ),
    ] = 0.8
    top_p: Annotated[
        float, Meta(gt=0, le=1, description="share of the likeliest tokens kept: above 0, up to 1")
    ] = 0.9
    max_new_tokens: Annotated[
        int, Meta(ge=1, le=10_000_000, description="tokens drawn at most, 1 to 10000000")
    ] = 64
    greedy: Annotated[bool, Meta(description="take the most likely token, always")] = False
    repetition_penalty: Annotated[
        float,
        Meta(
            gt=0,
            le=sys.float_info.max,
            description="logits of tokens that were there are divided by it: above 0; 1 is off",
        ),
    ] = 1.0
    top_k: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="a whole number, 1 or more: how many of the likeliest tokens are kept"),
    ] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="a number, 0 to 1: the least share of the greatest probability"),
    ] = None
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="a list of texts that end a completion, none of them empty"),
    ] = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Sampling, include_extras=True).items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                about = get_args(hint)[1].description
                raise ValueError(f"{name} cannot be {value!r} ({about})") from error

    def asdict(self) -> dict[str, Any]:
        """Return the settings as a baseline stores them, without those that have no effect."""
        settings = {**msgspec.structs.asdict(self), "stop": sorted(set(self.stop))}
        ignored = ("temperature", "top_p", "top_k", "min_p") if self.greedy else ()
        off = (name for name in ("top_k", "min_p", "stop") if not settings[name])
        for name in {*ignored, *off}:
            del settings[name]
        return settings


@dataclass(frozen=True)
class Request:
    """One completion to draw: the rendered prompt, and the seed of the draw."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """One drawn completion: its text, and how many tokens it has, the end token included.

    ``truncated`` means that neither an end token nor a stop string ended it. ``error`` is the
    reason if the engine could not draw a completion. ``ids`` are the ids of its tokens, or empty
    if the engine does not tell them. Raises ``ValueError`` if they are not ``tokens`` many.
    """

    text: str
    tokens: int
    truncated: bool
    error: str | None = None
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.ids and len(self.ids) != self.tokens:
            raise ValueError(f"{len(self.ids)} ids of {self.tokens} tokens")


PINNED = {
    "num_beams": 1,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""Settings that would change the policy's distribution, switched off whatever a checkpoint says.

typical_p and similar settings act only on sampling in ``generate``. They have no effect, because
the draw is made by what :class:`Sampling` has.
"""

Progress = Callable[[int], object]
"""Called with the number of samples that were done since the last call."""


class Engine(AbstractContextManager["Engine"], Protocol):
    """Draws one sample per request, in the order of the requests.

    The sample of a request depends only on its prompt and seed, the policy and the settings, not on
    the other requests, their number or their order (up to numerics).

    As a context manager it holds the policy's weights in memory inside, and releases them at the
    end. Outside, the first request loads them. Entering raises ``PolicyError``.
    """

    def settings(self) -> dict[str, Any]:
        """Return every setting that affects a draw, as a baseline stores them."""

    def identity(self) -> dict[str, Any]:
        """Return engine, device and number format: samples of another identity are not reused."""

    def remarks(self) -> dict[str, str]:
        """Return what a report should say of how samples were drawn, by its subject."""

    def drawing(self, sampling: Sampling) -> "Engine":
        """Return an engine of the same policy and weights that draws otherwise."""

    def sample(self, requests: Sequence[Request], progress: Progress | None) -> list[Sample]:
        """Draw the samples. Raises ``PolicyError`` and ``EngineError``."""


def sample_seed(run: int, problem: str, sample: int) -> int:
    """Derive a sample's seed from the run's seed, the problem's id and the sample's number."""
    digest = hashlib.sha256(f"{run}|{problem}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def first_end(text: str, stop: Sequence[str]) -> int:
    """Return where the stop string that ends first in ``text`` ends; 0 if there is none."""
    ends = (at + len(string) for string in stop if (at := text.find(string)) >= 0)
    return min(ends, default=0)
