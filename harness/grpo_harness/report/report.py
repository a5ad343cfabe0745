"""What a session found: its rows, its tables, and what did not pass.

Rows are plain data (``Evaluation.summary()``, ``Check.asdict()``), because under pytest-xdist they
come from other processes.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from grpo_harness.checks import change, side
from grpo_harness.gate.stats import holm
from grpo_harness.gate.verdicts import WORST_FIRST, chance
from grpo_harness.history.file import History
from grpo_harness.report.schema import SCHEMA, Content, Problem, Recorded, Status
from grpo_harness.report.tables import Table
from grpo_harness.text import escape, markdown, plain, together

Row = Mapping[str, Any]

_COLUMNS = (
    "task type",
    "policy",
    "n × k",
    "baseline",
    "now",
    "Δ points (90 % CI)",
    "strict",
    "reward",
    "tokens",
    "truncated",
    "verdict",
)

DIFFERENCE = "difference"
"""The rule of a comparison of two policies, before a dot and the other's name."""

_LESS_MISSED = ("strict", "truncated", "tokens", "reward", "baseline", "n × k")


@dataclass
class Report:
    """What a session found: one entry per evaluation and check, even if reported several times.

    ``run`` says what was run, as ``schema.Run`` has it. ``task_types`` and ``policies`` give the
    order of the rows, whatever the order of the tests. ``problems`` has those of an evaluation by
    policy and task type, as far as its samples were kept, and ``recorded`` how its baseline was
    recorded. ``failed`` has the tests that failed or
    could not be run, with their messages, and ``not_run`` those that were not reached.
    """

    run: Mapping[str, Any]
    task_types: Sequence[str] = ()
    policies: Sequence[str] = ()
    status: Status = "running"
    evaluations: dict[tuple[str, str], Row] = field(default_factory=dict)
    checks: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    not_run: Sequence[str] = ()
    notices: list[str] = field(default_factory=list)
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    problems: dict[tuple[str, str], list[Problem]] = field(default_factory=dict)
    recorded: dict[tuple[str, str], Recorded] = field(default_factory=dict)
    curves: list[Row] = field(default_factory=list)
    history: History = field(default_factory=lambda: History([]))

    def add(self, row: Row) -> None:
        """Add a row: an ``evaluation``, ``check``, ``curve`` or ``notice``; others are ignored."""
        if row["kind"] == "evaluation":
            self.evaluations[row["policy"], row["task_type"]] = row
        elif row["kind"] == "check":
            self.checks[row["rule"], row["policy"], row["task_type"]] = row
        elif row["kind"] == "curve":
            self.curves.append(row)
        elif row["kind"] == "notice":
            self.notices.append(row["text"])

    def __bool__(self) -> bool:
        """Tell whether there is anything to show."""
        return bool(self.evaluations or self.checks)

    def content(self) -> Content:
        """Return everything, for ``report.json``."""
        evaluations = [
            {**row, "problems": self.problems.get(key, []), "recorded": self.recorded.get(key)}
            for row in self._sorted(self.evaluations)
            for key in [(row["policy"], row["task_type"])]
        ]
        everything = {
            "schema": SCHEMA,
            "status": self.status,
            "run": self.run,
            "environment": self.environment,
            "settings": self.settings,
            "evaluations": [_stored(row) for row in evaluations],
            "checks": [_stored(row) for row in self._sorted(self.checks)],
            "curves": [_stored(row) for row in self.curves],
            "history": self.history.runs,
            "tests": {
                "passed": self.passed,
                "failed": [{"test": name, "said": said} for name, said in self.failed.items()],
                "not_run": self.not_run,
            },
            "notices": self.notices,
        }
        return msgspec.convert(everything, Content)

    @classmethod
    def of(cls, content: Content) -> Self:
        """Return the report whose ``content`` this is."""
        tests, evaluations = content.tests, content.evaluations
        report = cls(
            msgspec.to_builtins(content.run),
            [*dict.fromkeys(row.task_type for row in evaluations)],
            [*dict.fromkeys(row.policy for row in evaluations)],
            content.status,
            passed=tests.passed,
            failed={row.test: row.said for row in tests.failed},
            not_run=tests.not_run,
            notices=content.notices,
            environment=content.environment,
            settings=content.settings,
        )
        for evaluation in evaluations:
            key = evaluation.policy, evaluation.task_type
            report.problems[key] = evaluation.problems
            if evaluation.recorded is not None:
                report.recorded[key] = evaluation.recorded
            row = msgspec.structs.asdict(evaluation) | {"kind": "evaluation"}
            row["slices"] = msgspec.to_builtins(evaluation.slices)
            del row["problems"], row["recorded"]
            report.add(row)
        report.history = History(content.history)
        report.curves = [msgspec.to_builtins(curve) for curve in content.curves]
        for check in map(msgspec.to_builtins, content.checks):
            report.add({**check, "kind": "check", "evidence": _numbers(check["evidence"])})
        return report

    def measured(self) -> Table:
        """One row per task type and policy: what was measured, and the worst verdict on it."""
        return self._all_measured(self._sorted(self.evaluations))

    def _all_measured(self, evaluations: Sequence[Row]) -> Table:
        rows = []
        for row in evaluations:
            rows.append(self._measured(row))
            rows += [_sliced(row, part) for part in row.get("slices", [])]
        rows += [_together(row) for row in self._sorted(self.checks) if row["rule"] == "total"]
        return Table.of(rows, _LESS_MISSED)

    def improvements(self) -> Table:
        """One row per task type and trained policy: against base on the same problems."""
        asked = ("no_loss", "improvement")
        checks = [row for row in self._sorted(self.checks) if row["rule"] in asked]
        several = len({row["policy"] for row in checks}) > 1
        rows = []
        for row in checks:
            e = row["evidence"]
            now = _percent(e["now"]) if e else ""
            rows.append(
                {
                    "task type": row["task_type"],
                    **({"policy": row["policy"]} if several else {}),
                    "n × k": f"{e['n']} × {e['k']}" if e else "",
                    f"base: {row['reference']}": _percent(e["then"]) if e else "",
                    "trained" if several else f"trained: {row['policy']}": now,
                    "Δ points (90 % CI)": _interval(e) if e else "",
                    "asked": row["title"],
                    "verdict": row["verdict"],
                }
            )
        return Table.of(rows, ("n × k", "asked"))

    def pairs(self) -> Table:
        """One row per comparison of two policies, as `grpo-harness compare` makes them."""
        rows = [
            {
                "task type": row["task_type"],
                "policy": row["policy"],
                "against": row["reference"],
                "n × k": f"{e['n']} × {e['k']}",
                "correct": _percent(e["now"]),
                "the other": _percent(e["then"]),
                "Δ points (90 % CI)": _interval(e),
                "found": row["reason"],
            }
            for row in self.sorted_checks()
            if row["rule"].startswith(f"{DIFFERENCE}.") and (e := row["evidence"])
        ]
        return Table.of(rows, ("n × k", "the other"))

    def details(self) -> Table:
        """One row per check: the numbers behind its verdict."""
        checks = self.sorted_checks()
        # A file may hold anything.
        judged = [row for row in checks if row["evidence"] and 0 <= row["evidence"]["p"] <= 1]
        adjusted = holm([row["evidence"]["p"] for row in judged])
        by_key = {id(row): f"{p:.2g}" for row, p in zip(judged, adjusted, strict=True)}
        rows = []
        for row in checks:
            e = row["evidence"]
            rows.append(
                {
                    "check": row["title"],
                    "policy": row["policy"],
                    "task type": row["task_type"],
                    "reference": row["reference"],
                    "n × k": f"{e['n']} × {e['k']}" if e else "",
                    "then": side(e["then"], row["unit"]) if e else "",
                    "now": side(e["now"], row["unit"]) if e else "",
                    "Δ": change(e["delta"], row["unit"]) if e else "",
                    "lower": change(e["lower"], row["unit"]) if e else "",
                    "upper": change(e["upper"], row["unit"]) if e else "",
                    "p": chance(e["p"]).removeprefix("p ").removeprefix("= ") if e else "",
                    "p (Holm)": by_key.get(id(row), ""),
                    "MDE90": _least(row) if e else "",
                    "needed": str(e["needed"] or "unreachable") if e else "",
                    "verdict": row["verdict"],
                }
            )
        return Table.of(rows)

    def keys(self) -> list[tuple[str, str]]:
        """Return policy and task type of every evaluation, in the order of the rows."""
        return [(row["policy"], row["task_type"]) for row in self._sorted(self.evaluations)]

    def sorted_checks(self) -> list[Row]:
        """Return all checks in the order of the rows."""
        return self._sorted(self.checks)

    def worst(self) -> str:
        """Return the worst verdict of the run; a test that failed is a FAIL at least."""
        worst = next(iter(self.counts()), "UNPROVEN")
        return "FAIL" if self.failed and worst in ("PASS", "UNPROVEN") else worst

    def verdict(self, key: tuple[str, str]) -> str:
        """Return the worst verdict on an evaluation against its baseline, and its checks."""
        return _worst(
            check
            for (_, *of), check in self.checks.items()
            if tuple(of) == key and check["against"] == "baseline"
        )

    def worst_first(self) -> list[Row]:
        """Return all checks, the worst verdicts first."""
        rows = self.sorted_checks()
        return sorted(rows, key=lambda row: WORST_FIRST.index(row["verdict"]))

    def counts(self) -> dict[str, int]:
        """Count the checks of each verdict that occurs, the worst first."""
        return dict(Counter(row["verdict"] for row in self.worst_first()))

    def unsettled(self) -> list[str]:
        """Name every check that is not a PASS, worst first, with its reason."""
        return [
            f"{row['verdict']:8} {row['title']}, {row['policy']} on {row['task_type']}: "
            f"{row['reason']}"
            for row in self.worst_first()
            if row["verdict"] != "PASS"
        ]

    def markdown(self) -> str:
        """Return all tables as one Markdown document."""
        parts = ["# grpo-harness"]
        about = {"status": self.status, **self.run}
        parts.append("\n".join(f"- {name}: {markdown(_words(of))}" for name, of in about.items()))
        parts += [markdown(line, 10_000) for line in self._sampling()]
        for title, table in (
            ("Policies against their baselines", self.measured()),
            ("Trained against base", self.improvements()),
            ("Every check", self.details()),
        ):
            if table:
                parts.append(f"## {title}\n\n{table.markdown()}")
        failures = [f"{name}: {' '.join(said.split())}" for name, said in self.failed.items()]
        for title, lines in (
            ("Not passed", self.unsettled()),
            ("Tests that failed or could not be run", failures),
            ("Not run", self.not_run),
            ("To know", self.notices),
        ):
            if lines:
                listed = "\n".join(f"- {markdown(line, 10_000)}" for line in lines)
                parts.append(f"## {title}\n\n{listed}")
        return "\n\n".join(parts) + "\n"

    def terminal(self, width: int, *, styled: bool = False) -> list[str]:
        """Return the lines that a terminal shows: the two tables, then what did not pass.

        The worst rows come first. ``styled`` is that of `Table.terminal`.
        """
        worst = sorted(
            self._sorted(self.evaluations),
            key=lambda row: _rank(self.verdict((row["policy"], row["task_type"]))),
        )
        lines = []
        for line in self._sampling():
            lines += textwrap.wrap(escape(line, 10_000), width, subsequent_indent="  ")
        for table in (self._all_measured(worst), self.improvements()):
            if table:
                lines += ["", *table.terminal(width, styled=styled)]
        return [*lines, "", *(plain(line) for line in (*self.unsettled(), *self.notices))]

    def _sampling(self) -> list[str]:
        """Return the sampling settings, one line for all policies that share them."""
        shared: dict[str, list[str]] = {}
        for row in self._sorted(self.evaluations):
            settings = _words(row["sampling"])
            policies = shared.setdefault(settings, [])
            if row["policy"] not in policies:
                policies.append(row["policy"])
        remarks = {
            f"{row['policy']}: {subject} are {said}"
            for row in self._sorted(self.evaluations)
            for subject in ("prompts", "requests")
            if (said := row.get("engine", {}).get(subject))
        }
        return [
            *(f"sampling of {together(names)}: {how}" for how, names in shared.items()),
            *sorted(remarks),
        ]

    def _sorted(self, rows: Mapping[Any, Row]) -> list[Row]:
        """Sort rows by task type and policy; rows in neither list come last, in their order."""

        def place(names: Sequence[str], name: str) -> int:
            return names.index(name) if name in names else len(names)

        return sorted(
            rows.values(),
            key=lambda row: (
                place(self.task_types, row["task_type"]),
                place(self.policies, row["policy"]),
            ),
        )

    def _measured(self, row: Row) -> dict[str, str]:
        key = (row["policy"], row["task_type"])
        accuracy = self.checks.get(("accuracy", *key))
        e = accuracy["evidence"] if accuracy else None
        # A sequential run may have stopped early.
        asked = row["n"] if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
        return {
            "task type": row["task_type"],
            "policy": row["policy"],
            "n × k": f"{asked} × {e['k'] if e else row['k']}",
            "baseline": _percent(e["then"]) if e else "",
            # A rerun is judged on the samples of all its attempts, so those are shown.
            "now": _percent(e["now"] if e else row["accuracy"]),
            "Δ points (90 % CI)": _interval(e) if e else "",
            "strict": _percent(row["strict_accuracy"]),
            "reward": _reward(row["mean_reward"]),
            "tokens": f"{row['mean_length']:.1f}",
            "truncated": _percent(row["outcomes"]["truncated"]),
            "verdict": self.verdict(key),
        }


def _stored(row: Row) -> dict[str, Any]:
    """Return a row as the file has it: with null for every number that JSON does not have."""
    return {name: _finite(of) for name, of in row.items() if name != "kind"}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(evidence: Row | None) -> Row | None:
    """Return evidence with NaN for each number that JSON could not hold."""
    if evidence is None:
        return None
    return {
        name: math.nan if of is None and name != "needed" else of for name, of in evidence.items()
    }


def _sliced(row: Row, part: Row) -> dict[str, str]:
    """A row for one value of a column that is a slice."""
    return {
        **dict.fromkeys(_COLUMNS, ""),
        "task type": f"{row['task_type']} {part['of']}",
        "policy": row["policy"],
        "n × k": f"{part['n']} × {row['k']}",
        "now": _percent(part["accuracy"]),
        "reward": _reward(part["mean_reward"]),
        "verdict": "not judged",
    }


def _together(row: Row) -> dict[str, str]:
    """A row for all tasks of a policy."""
    e = row["evidence"]
    return {
        **dict.fromkeys(_COLUMNS, ""),
        "task type": row["task_type"],
        "policy": row["policy"],
        "n × k": f"{e['n']} × {e['k']}" if e else "",
        "baseline": _percent(e["then"]) if e else "",
        "now": _percent(e["now"]) if e else "",
        "Δ points (90 % CI)": _interval(e) if e else "",
        "verdict": row["verdict"],
    }


def _reward(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.3f}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={of}" for name, of in value.items())
    return together(value) if isinstance(value, list) else str(value)


def _worst(checks: Iterable[Row]) -> str:
    by_name: dict[str, list[str]] = {}
    for check in checks:
        by_name.setdefault(check["verdict"], []).append(check["title"])
    for name in WORST_FIRST:
        if name in by_name:
            return name if name == "PASS" else f"{name}: {', '.join(by_name[name])}"
    return "not judged"


def _rank(verdict: str) -> int:
    """Return the place of a verdict, the worst being 0; what was not judged comes last."""
    names = [*WORST_FIRST, verdict]
    return names.index(verdict.split(":")[0])


def _least(row: Row) -> str:
    """The change that the check would find nine times in ten."""
    mde90 = row["evidence"]["mde90"]
    return f"{mde90:.3g}" if row["unit"] == "reward" else _percent(mde90)


def _interval(e: Row) -> str:
    delta, lower, upper = (change(e[name], "%") for name in ("delta", "lower", "upper"))
    return f"{delta} ({lower} to {upper})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
