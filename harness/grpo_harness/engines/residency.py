"""Which policies' weights are in memory at once: all, one, or as many as fit. Loads no torch."""

from typing import Literal, Protocol

from grpo_harness.engines.engine import EngineError
from grpo_harness.policy.policy import Policy

Mode = Literal["auto", "one", "all", "none"]


class Holder(Protocol):
    """An engine that holds weights on a device of this machine."""

    policy: Policy

    def close(self) -> None:
        """Release the weights."""

    def fits(self) -> bool:
        """Tell whether the device has memory for the weights, and as much again to draw with."""


class Residents:
    """The engines of a run whose weights are in memory.

    ``mode`` is ``one``, ``all``, ``none``, or ``auto``: as many as fit into the device's memory.
    Two policies with different files must not have the same weights in memory.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._mode = mode
        self._held: list[Holder] = []
        self._known: dict[str, Policy] = {}

    def make_room(self, engine: Holder) -> None:
        """Release weights, the longest held first, before ``engine`` loads its own.

        Raises ``EngineError`` if none are to be loaded.
        """
        self.permit(engine.policy)
        while self._held and self._mode != "all" and (self._mode == "one" or not engine.fits()):
            self._held[0].close()

    def permit(self, policy: Policy) -> None:
        """Raise ``EngineError`` if no weights are to be loaded."""
        if self._mode == "none":
            raise EngineError(
                f"{policy.checkpoint} would be loaded, and --grpo-rescore loads no weights: "
                "leave out the test, or the option"
            )

    def take_in(self, engine: Holder, digest: str) -> None:
        """Register that ``engine`` holds weights, with their ``digest`` in memory.

        Raises ``EngineError`` if a policy with other files was loaded with the same weights.
        """
        self.distinguish(engine.policy, digest)
        self._held.append(engine)

    def distinguish(self, policy: Policy, digest: str) -> None:
        """Register the ``digest`` of a policy's weights, wherever they are in memory.

        Raises ``EngineError`` if a policy with other files was loaded with the same weights.
        """
        twin = self._known.setdefault(digest, policy)
        if twin.fingerprint.weights != policy.fingerprint.weights:
            raise EngineError(
                f"{policy.checkpoint} ({policy.fingerprint}) has the same weights "
                f"in memory as {twin.checkpoint} ({twin.fingerprint}), tensor by tensor, although "
                "their files differ: one was loaded for the other, or they differ by less than "
                "the number format can hold (--grpo-dtype)"
            )

    def digest(self, policy: Policy) -> str:
        """Return the digest of a policy's weights, which have been in memory."""
        weights = policy.fingerprint.weights
        return next(of for of, it in self._known.items() if it.fingerprint.weights == weights)

    def leave(self, engine: Holder) -> None:
        """Remove an engine that has released its weights."""
        if engine in self._held:
            self._held.remove(engine)

    def close(self) -> None:
        """Release all weights."""
        while self._held:
            self._held[0].close()
