"""How many problems a row of a run asks, and how many samples of each.

A row is a policy on a task. With ``problems = "auto"`` its baseline decides: as many problems as
find the margin nine times in ten. That depends on the settings alone, and not on the tests that
were selected: a test that is run again by itself draws what it drew before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grpo_harness import checks, rules
from grpo_harness.baselines import file as baselines
from grpo_harness.baselines.recording import PROBLEMS
from grpo_harness.errors import HarnessError
from grpo_harness.gate.bounds import MINIMUM_PROBLEMS, MOST_SAMPLES
from grpo_harness.gate.plan import Plan, Planner
from grpo_harness.rules import RULES, Rule, bounded
from grpo_harness.tables import SettingsError
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.asked import Task
    from grpo_harness.evaluation import Tally
    from grpo_harness.policy import PolicyName
    from grpo_harness.settings import Settings
    from grpo_harness.tasks import Source

UNPLANNED = 256
"""Problems that are asked of a policy that no baseline says anything about, or all there are."""

TIMES = 4
"""Where all recorded problems are too few, up to so many times ``samples`` are drawn of each."""

_CLOSE = 0.002
"""How near the plan of a time comes to the best one, as a part of it."""

_WORST = 64.0
"""The greatest loss that a plan of a time is for, in margins: every row then has its least size."""

_Key: TypeAlias = tuple[str, "PolicyName", str]
"""Role, policy and task of a row."""


@dataclass(frozen=True)
class Row:
    """A row with what its baseline says.

    ``records`` are those of the ``asked`` problems, in their order: all that may be asked.
    ``error`` says in a few words why its check cannot be judged, if so; the run says it in full.
    ``speed`` is in completions a second, if it is known.
    """

    task: Task
    asked: int = 0
    records: Sequence[Tally] = ()
    error: str = ""
    speed: float | None = None

    @property
    def rule(self) -> Rule:
        """The rule that is planned for: accuracy's, or the reward's if nothing is correct."""
        rule = RULES["accuracy" if self.task.asks("accuracy") else "reward"]
        return bounded(rule, self.task.bounds)


@dataclass(frozen=True)
class Size:
    """``n`` problems and ``k`` samples of each."""

    n: int
    k: int


def baseline_of(settings: Settings, role: str, own: PolicyName, task_type: str) -> Path:
    """Return the policy's own baseline, or else the first of its role's configured policies."""
    names = settings.recorded_as(role, own)
    paths = [baselines.path_of(settings.baselines, name.slug, task_type) for name in names]
    return next((path for path in paths if baselines.exists(path)), paths[0])


def to_record(settings: Settings, source: Source) -> int:
    """Return how many problems of a source a recording asks."""
    if isinstance(settings.problems, int):
        return settings.problems
    return len(source.at_most(PROBLEMS))


class Sizing:
    """The sizes of all rows of a run, each planned once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked: dict[tuple[str, int], list[str]] = {}
        self._rows: dict[_Key, Row] = {}
        self._sizes: dict[_Key, Size] = {}
        self._planners: dict[tuple[int, float], Planner] = {}
        total = not settings.sequential
        every = rules.asked(
            (task.asks for task in settings.tasks.values()), len(settings.trained), total=total
        )
        self._shares = rules.shares(every, settings.table.gate.alpha)

    def size(self, role: str, name: PolicyName, source: Source) -> Size:
        """Return the size of a row."""
        least = self._settings.draws(source)
        if isinstance(self._settings.problems, int):
            return Size(self._settings.problems, least)
        if self._settings.tasks.get(source.name) is not self._settings.task(source):
            return Size(len(source.at_most(UNPLANNED)), least)  # a source of a suite's own
        if self._settings.minutes is not None and not self._sizes:
            self._sizes = self._in_time(60 * self._settings.minutes)
        key = role, name, source.name
        if key not in self._sizes:
            self._sizes[key] = self._size(self.row(*key))
        return self._sizes[key]

    def row(self, role: str, name: PolicyName, task_type: str) -> Row:
        """Return a row with what its baseline says."""
        key = role, name, task_type
        if key not in self._rows:
            self._rows[key] = self._read(*key)
        return self._rows[key]

    def plan(self, role: str, name: PolicyName, task_type: str, alpha: float) -> Plan | str:
        """Predict what the check of a row can find, or why it will be an ERROR, in a few words.

        ``alpha`` is the check's part of the run's risk.
        """
        row = self.row(role, name, task_type)
        if row.error:
            return row.error
        size = self.size(role, name, row.task.source)
        return self._planner(row, alpha).plan(size.k, size.n)

    def _read(self, role: str, name: PolicyName, task_type: str) -> Row:
        settings, task = self._settings, self._settings.tasks[task_type]
        path = baseline_of(settings, role, name, task_type)
        asked = settings.problems
        if isinstance(asked, int) and asked < MINIMUM_PROBLEMS:
            return Row(task, error=f"fewer than {MINIMUM_PROBLEMS} problems")
        if not baselines.exists(path):
            return Row(task, error="no baseline")
        try:
            stored = baselines.load(path)
            ids = self._ids(task.source, len(stored.records))
        except (HarnessError, ValueError):
            return Row(task, error="a damaged baseline, or too few problems")
        if not all(problem in stored.records for problem in ids):
            why = f"problems that were not recorded (of {len(stored.records)} that were)"
            return Row(task, len(ids), error=why)
        records = [stored.records[problem].tally for problem in ids]
        row = Row(task, len(ids), records, speed=stored.speed)
        if len(ids) < MINIMUM_PROBLEMS:
            return replace(row, error=f"fewer than {MINIMUM_PROBLEMS} problems")
        if not task.allow_floor and row.rule.name == "accuracy":
            floor = rules.nothing_to_lose(row.records, row.rule.bounds)
            return replace(row, error="nothing to lose") if floor else row
        return row

    def _ids(self, source: Source, recorded: int) -> list[str]:
        """Return the ids of the problems that are asked, at most: of a source only once."""
        asked = self._settings.problems
        key = source.name, asked if isinstance(asked, int) else recorded
        if key not in self._asked:
            exact = isinstance(asked, int)
            problems = source.problems(key[1]) if exact else source.at_most(key[1])
            self._asked[key] = [problem.id for problem in problems]
        return self._asked[key]

    def _planner(self, row: Row, alpha: float) -> Planner:
        key = id(row), alpha
        if key not in self._planners:
            self._planners[key] = checks.planner(
                row.records, alpha, row.rule, sequential=self._settings.sequential
            )
        return self._planners[key]

    def _size(self, row: Row, part: float = 1.0) -> Size:
        """Return the size that finds ``part`` of the margin, or as much of it as can be found."""
        least = self._settings.draws(row.task.source)
        if not row.records:
            return Size(row.asked or len(row.task.source.at_most(UNPLANNED)), least)
        # Greedy samples of a problem are all the same one.
        greedy = row.task.sampling.greedy
        most = 1 if greedy else max(least, min(TIMES * least, MOST_SAMPLES))
        try:
            found = self._planner(row, self._shares[row.rule.name]).cheapest(least, most, part)
        except ValueError:  # nothing to plan by; the run says what is wrong
            return Size(len(row.records), least)
        return Size(found.n, found.k)

    def _in_time(self, seconds: float) -> dict[_Key, Size]:
        """Return the sizes of an equal part of the margin in every row, as small as time permits.

        Raises ``SettingsError`` if it is not known how long a row takes.
        """
        rows: dict[_Key, Row] = {
            (role, name, task_type): row
            for role, _, name in self._settings.policies()
            for task_type in self._settings.tasks
            if (row := self.row(role, name, task_type)).records
        }
        speed = {key: row.speed for key, row in rows.items() if row.speed is not None}
        unknown = [f"{name} on {task}" for _, name, task in rows.keys() - speed.keys()]
        if unknown:
            raise SettingsError(
                f"minutes cannot be planned: the baselines of {len(unknown)} rows, such as "
                f"{escape(unknown[0])}, do not say how fast completions are drawn: record them "
                "anew (--grpo-record), or set problems instead"
            )

        def sizes(part: float) -> dict[_Key, Size]:
            return {key: self._size(row, part) for key, row in rows.items()}

        def fits(found: Mapping[_Key, Size]) -> bool:
            return sum(of.n * of.k / speed[key] for key, of in found.items()) <= seconds

        low, high = 0.0, 1.0
        while not fits(found := sizes(high)) and high < _WORST:
            low, high = high, 2 * high
        while high - low > _CLOSE * max(high, 1 / _WORST):
            middle = (low + high) / 2
            if fits(closer := sizes(middle)):
                high, found = middle, closer
            else:
                low = middle
        return found
