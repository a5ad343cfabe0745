"""Which policies' weights are in memory at once: all, one, or as many as fit. Loads no torch."""

from __future__ import annotations

from typing import Literal, Protocol

from grpo_harness.engines.engine import EngineError
from grpo_harness.policy.policy import Policy

Mode = Literal["auto", "one", "all"]


class Holder(Protocol):
    """An engine that holds weights on a device of this machine."""

    policy: Policy

    def close(self) -> None:
        """Let the weights go."""

    def fits(self) -> bool:
        """Tell whether the device has room for the weights, and as much again to draw with."""


class Residents:
    """The engines of a run whose weights are in memory.

    ``mode`` says how many may be: ``one``, ``all``, or with ``auto`` as many as the device has
    room for. No two of them may hold the same weights under two fingerprints.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._mode = mode
        self._held: list[Holder] = []
        self._known: dict[str, Policy] = {}

    def make_room(self, engine: Holder) -> None:
        """Let weights go, the longest held first, before ``engine`` takes its own."""
        while self._held and self._mode != "all" and (self._mode == "one" or not engine.fits()):
            self._held[0].close()

    def take_in(self, engine: Holder, digest: str) -> None:
        """Remember that ``engine`` holds weights, and by which digest they are known in memory.

        Raises ``EngineError`` where a policy of other files was loaded with the same weights.
        """
        self._held.append(engine)
        twin = self._known.setdefault(digest, engine.policy)
        if twin.fingerprint.weights != engine.policy.fingerprint.weights:
            raise EngineError(
                f"{engine.policy.checkpoint} ({engine.policy.fingerprint}) has in memory the very "
                f"weights of {twin.checkpoint} ({twin.fingerprint}), tensor by tensor, although "
                "its files are others: one was loaded for the other, or they differ by less than "
                "the number format can hold (--grpo-dtype)"
            )

    def leave(self, engine: Holder) -> None:
        """Forget an engine that has let its weights go."""
        if engine in self._held:
            self._held.remove(engine)

    def close(self) -> None:
        """Let all weights go."""
        while self._held:
            self._held[0].close()
