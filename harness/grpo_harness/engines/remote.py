"""What engines share that draw elsewhere: there are no weights in this process."""

from __future__ import annotations

import copy
from typing import Any, Self

from grpo_harness.engines.engine import PINNED, Sampling
from grpo_harness.policy.policy import Policy


class Remote:
    """A policy and how it is drawn. Nothing is loaded when it is entered, or released."""

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self.policy = policy
        self._sampling = sampling

    def drawing(self, sampling: Sampling) -> Self:
        """Return an engine of the same policy, drawn at the same place, that draws otherwise."""
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def __enter__(self) -> Self:
        """Return the engine: there are no weights to load here."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there are no weights to release here."""

    def settings(self) -> dict[str, Any]:
        """Return the sampling settings, the pinned settings and the end tokens."""
        ends = {"eos_token_ids": list(self.policy.eos_token_ids)}
        return {**self._sampling.asdict(), **PINNED, **ends}
