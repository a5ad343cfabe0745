"""Divide requests into chunks, and hand these out to workers. Loads no torch.

The chunks depend on the requests alone, and never on how many workers there are.
"""

import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

_W = TypeVar("_W", bound=Hashable)

_CHUNK = 128
"""Requests of a chunk at most, unless more have one prompt."""

AGAIN = 2
"""How often a chunk is handed out again at most, after workers that had it were lost."""

_STRAGGLES = 2.0
"""A chunk is handed to a second worker after this many times the usual duration."""


def chunks(prompts: Sequence[str]) -> list[list[int]]:
    """Divide requests, given by their prompts, into chunks; return the numbers of each.

    The requests of a prompt stay together, since an engine reads it once for all of them.
    """
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(number)
    found: list[list[int]] = []
    for group in groups.values():
        if not found or len(found[-1]) + len(group) > _CHUNK:
            found.append([])
        found[-1] += group
    return found


class LostError(Exception):
    """A chunk was lost with its workers too often."""


class Handout(Generic[_W]):
    """Which worker has which of ``n`` chunks.

    Chunks are handed out one at a time, as workers ask for them. What a lost worker had is handed
    out again. When none is left to hand out, a worker that asks gets what another has had for twice
    the usual time: the first answer counts. Times are seconds of any one clock.
    """

    def __init__(self, n: int) -> None:
        self._waiting = deque(range(n))
        self._running: dict[_W, tuple[int, float]] = {}
        self._left = set(range(n))
        self._lost = [0] * n
        self._durations: list[float] = []

    @property
    def finished(self) -> bool:
        """Tell whether every chunk is done."""
        return not self._left

    def take(self, worker: _W, now: float) -> int | None:
        """Hand out a chunk to an idle worker; ``None`` if there is nothing for it to do."""
        chunk = self._waiting.popleft() if self._waiting else self._straggling(now)
        if chunk is not None:
            self._running[worker] = chunk, now
        return chunk

    def done(self, worker: _W, now: float) -> int | None:
        """Note that a worker has answered; return its chunk, or ``None`` if that was done."""
        chunk, since = self._running.pop(worker)
        self._durations.append(now - since)
        if chunk not in self._left:
            return None
        self._left.remove(chunk)
        return chunk

    def lose(self, worker: _W) -> None:
        """Note that a worker was lost. Raises ``LostError`` if its chunk was lost too often."""
        chunk, _ = self._running.pop(worker, (None, 0.0))
        if chunk not in self._left or chunk in (of for of, _ in self._running.values()):
            return
        self._lost[chunk] += 1
        if self._lost[chunk] > AGAIN:
            raise LostError
        self._waiting.appendleft(chunk)

    def _straggling(self, now: float) -> int | None:
        """Return the chunk that one worker has had the longest, if that is unusually long."""
        had = [chunk for chunk, _ in self._running.values()]
        alone = [
            (since, chunk)
            for chunk, since in self._running.values()
            if chunk in self._left and had.count(chunk) == 1
        ]
        if not alone or not self._durations:
            return None
        since, chunk = min(alone)
        usual = statistics.median(self._durations)
        return chunk if now - since > _STRAGGLES * usual else None
