"""Runs that did not pass: a rerun pools its samples with theirs.

Running a red check again until it is green would turn green by chance. So a rerun of the same check
pools its samples with those of the runs before it and meets a stricter threshold. A pass ends the
series, and so does another policy, setting, baseline or code.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from filelock import FileLock
from msgspec import Meta

from grpo_harness.gate.verdicts import Verdict
from grpo_harness.store import writing

POOLED = 7
"""Maximum of earlier attempts that are pooled: eight times the samples with this run's."""

MOST_ATTEMPTS = 64
"""Maximum of attempts that halve the risk; more of them would not matter."""


class Attempt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of a check: its seed, problems asked, verdict, and part of the run's risk."""

    seed: int
    n: Annotated[int, Meta(ge=1)]
    verdict: Verdict
    alpha: Annotated[float, Meta(gt=0, lt=1)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    check: str
    attempt: Attempt


@dataclass(frozen=True)
class Series:
    """The conditions that a run of a check is judged under.

    Its samples are pooled with those of ``earlier`` attempts, the last of ``attempts`` before it.
    ``risk`` is the check's part of the run's risk, which each earlier attempt halves.
    """

    earlier: tuple[Attempt, ...]
    attempts: int
    risk: float

    @property
    def alpha(self) -> float:
        """The risk that is left for this run."""
        return self.risk * 0.5 ** min(self.attempts, MOST_ATTEMPTS)

    def __str__(self) -> str:
        """Return what was pooled, for the end of a reason; empty if nothing was."""
        if not self.attempts:
            return ""
        runs = f"{self.attempts} earlier run{'s' if self.attempts > 1 else ''}"
        some = f"the last {POOLED} of " if self.attempts > POOLED else ""
        return f"; pooled with the samples of {some}{runs} of the same that did not pass"


class Reruns:
    """The attempts in one folder, one a line, append-only; ``notices`` name damaged ones."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "attempts.jsonl"
        self.notices: list[str] = []

    def series(self, check: str, seed: int, n: int, alpha: float, *, pools: bool = True) -> Series:
        """Return the series of the run of ``seed``, which asks ``n`` problems.

        A run that repeats another's seed has the same risk as that run, even if it runs alone. A
        check that never ``pools`` has no earlier attempts.
        """
        before = self.before(check, seed) if pools else []
        again = self.same(check, seed, n)
        risk = alpha if again is None else again.alpha
        return Series(tuple(before[-POOLED:]), len(before), risk)

    def same(self, check: str, seed: int, n: int) -> Attempt | None:
        """Return the first run of ``check`` that asked ``n`` problems with ``seed``, if any."""
        found = (a for a in self._of(check) if (a.seed, a.n) == (seed, n))
        return next(found, None)

    def before(self, check: str, seed: int) -> list[Attempt]:
        """Return the attempts of an open series of ``check`` that precede the run of ``seed``.

        The same seed draws the same samples, so a run that repeats one is judged as before, and is
        not a new attempt.
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
        """Append an attempt of ``check``. Raises ``StoreError``."""
        line = json.dumps({"check": check, "attempt": msgspec.structs.asdict(attempt)})
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(), self._path.open("a", encoding="utf-8") as file:
                # The newline comes first: a line that a crash cut short damages only itself.
                file.write(f"\n{line}")

    def _of(self, check: str) -> Iterator[Attempt]:
        if not self._path.exists():
            return
        with writing(self._path), self._lock():
            entries = [(line, _read(line)) for line in self._path.read_bytes().split(b"\n") if line]
            sound = [line for line, entry in entries if entry is not None]
            if damaged := len(entries) - len(sound):
                replacement = self._path.with_suffix(".mended")
                replacement.write_bytes(b"".join(b"\n" + line for line in sound))
                replacement.replace(self._path)
                self.notices.append(
                    f"{damaged} of the lines in {self._path} were damaged: they are removed, and "
                    "a rerun does not know of those runs"
                )
        yield from (e.attempt for _, e in entries if e is not None and e.check == check)

    def _lock(self) -> FileLock:
        return FileLock(self._path.with_suffix(".lock"))


def _read(line: bytes) -> _Line | None:
    try:
        return msgspec.json.decode(line, type=_Line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
