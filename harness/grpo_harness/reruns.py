"""The runs that did not pass, so that a rerun adds to their evidence instead of replacing it.

Who runs a red check again until it is green draws until chance helps. So a rerun of the same check
pools its samples with those of the runs before it and meets a stricter threshold. A pass ends the
series, and so does whatever makes it another question: another policy, setting, baseline or code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

POOLED = 7
"""Earlier attempts that are pooled at most: by then there are eight times the samples."""

MOST_ATTEMPTS = 64
"""So many halve the risk at most, to a level that no more of them could matter to."""


@dataclass(frozen=True)
class Attempt:
    """A run of a check: its seed, how many problems it asked, and the verdict's name.

    ``checks`` is how many the run planned that shared the risk of a false alarm.
    """

    seed: int
    n: int
    verdict: str
    checks: int


class Attempts:
    """The attempts in one folder, one a line, only ever appended."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "attempts.jsonl"

    def same(self, check: str, seed: int, n: int) -> Attempt | None:
        """Return the first run of ``check`` that asked ``n`` problems with ``seed``, if any."""
        found = (a for a in self._of(check) if (a.seed, a.n) == (seed, n))
        return next(found, None)

    def before(self, check: str, seed: int) -> list[Attempt]:
        """Return the attempts of an open series of ``check`` that precede the run of ``seed``.

        A seed draws the same samples again, so a run that repeats one is judged as it was then,
        and is no attempt of its own.
        """
        series: list[Attempt] = []
        seen: set[int] = set()
        for attempt in self._of(check):
            if attempt.seed == seed:
                break
            if attempt.seed in seen:
                continue
            seen.add(attempt.seed)
            series = [] if attempt.verdict == "PASS" else [*series, attempt]
        return series

    def add(self, check: str, attempt: Attempt) -> None:
        """Append an attempt of ``check``."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"check": check, **asdict(attempt)}, sort_keys=True)
        with FileLock(self._path.with_suffix(".lock")), self._path.open("a") as file:
            # The newline comes first: a line that a dying process cut short spoils only itself.
            file.write(f"\n{line}")

    def _of(self, check: str) -> Iterator[Attempt]:
        if not self._path.exists():
            return
        with FileLock(self._path.with_suffix(".lock")):
            lines = self._path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            # What is no line of ours, cut short or of another version, is no attempt of ours.
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                entry = json.loads(line)
                if entry.pop("check") == check:
                    yield Attempt(**entry)
