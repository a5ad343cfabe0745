"""Evaluations and checks -> tables for a terminal, Markdown and JSON.

Rows arrive as plain data (``Evaluation.summary()``, ``Check.asdict()``), because under
pytest-xdist they come from other processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harness.checks import AGAINST_BASE
from harness.stats import holm
from harness.text import escape

Row = Mapping[str, Any]

_WORST_FIRST = ("ERROR", "FAIL", "UNPROVEN", "PASS")


@dataclass
class Report:
    """What a session found: one entry per evaluation and check, however often it was reported.

    ``task_types`` and ``roles`` (policies) give the order of the rows, which the order of the
    tests does not decide.
    """

    header: Mapping[str, Any]
    task_types: Sequence[str] = ()
    roles: Sequence[str] = ()
    evaluations: dict[tuple[str, str], Row] = field(default_factory=dict)
    checks: dict[tuple[str, str, str], Row] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Take a row of the kind ``evaluation`` or ``check``; others are not this report's."""
        if row["kind"] == "evaluation":
            self.evaluations[row["policy"], row["task_type"]] = row
        elif row["kind"] == "check":
            self.checks[row["question"], row["policy"], row["task_type"]] = row

    def __bool__(self) -> bool:
        """Tell whether there is anything to show."""
        return bool(self.evaluations or self.checks)

    def policies(self) -> pd.DataFrame:
        """One row per task type and policy: what was measured, and the worst verdict on it."""
        return pd.DataFrame([self._policy_row(row) for row in self._sorted(self.evaluations)])

    def improvements(self) -> pd.DataFrame:
        """One row per task type: trained against base on the same problems."""
        rows = []
        for row in self._sorted(self.checks):
            if row["question"] not in AGAINST_BASE:
                continue
            v = row["verdict"]
            rows.append(
                {
                    "task type": row["task_type"],
                    "n × k": f"{v['n']} × {v['k']}" if v else "",
                    f"base: {row['reference']}": _percent(v["then"]) if v else "",
                    f"trained: {row['policy']}": _percent(v["now"]) if v else "",
                    "Δ points (90 % interval)": _interval(v) if v else "",
                    "asked": row["question"],
                    "verdict": row["name"],
                }
            )
        return pd.DataFrame(rows)

    def details(self) -> pd.DataFrame:
        """One row per check: the numbers that its verdict rests on."""
        checks = self._sorted(self.checks)
        judged = [row for row in checks if row["verdict"]]
        adjusted = holm([row["verdict"]["p"] for row in judged])
        by_key = {id(row): p for row, p in zip(judged, adjusted, strict=True)}
        rows = []
        for row in checks:
            v = row["verdict"]
            rows.append(
                {
                    "check": row["question"],
                    "policy": row["policy"],
                    "task type": row["task_type"],
                    "reference": row["reference"],
                    "n × k": f"{v['n']} × {v['k']}" if v else "",
                    "then": _side(row, "then"),
                    "now": _side(row, "now"),
                    "Δ": _points(v["delta"]) if v else "",
                    "lower": _points(v["lower"]) if v else "",
                    "upper": _points(v["upper"]) if v else "",
                    "p": f"{v['p']:.2g}" if v else "",
                    "p (Holm)": f"{by_key[id(row)]:.2g}" if v else "",
                    "MDE90": _percent(v["mde90"]) if v else "",
                    "needed": (v["needed"] or "unreachable") if v else "",
                    "verdict": row["name"],
                }
            )
        return pd.DataFrame(rows)

    def unsettled(self) -> list[str]:
        """Name every check that is not a PASS, worst first, with its reason."""
        rows = [row for row in self._sorted(self.checks) if row["name"] != "PASS"]
        return [
            f"{row['name']:8} {row['question']}, {row['policy']} on {row['task_type']}: "
            f"{row['reason']}"
            for row in sorted(rows, key=lambda row: _WORST_FIRST.index(row["name"]))
        ]

    def write(self, folder: Path) -> list[Path]:
        """Write ``report.md`` and ``report.json`` into ``folder`` and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            **self.header,
            "evaluations": self._sorted(self.evaluations),
            "checks": self._sorted(self.checks),
        }
        markdown, numbers = folder / "report.md", folder / "report.json"
        markdown.write_text(self.markdown(), encoding="utf-8")
        text = json.dumps(_finite(content), indent=1, ensure_ascii=True, allow_nan=False)
        numbers.write_text(f"{text}\n", "utf-8")
        return [markdown, numbers]

    def markdown(self) -> str:
        """Return all tables as one Markdown document."""
        parts = ["# grpo-harness"]
        parts.append("\n".join(f"- {name}: {_cell(value)}" for name, value in self.header.items()))
        parts += self._sampling()
        for title, table in (
            ("Policies against their baselines", self.policies()),
            ("Trained against base", self.improvements()),
            ("Every check", self.details()),
        ):
            if len(table):
                parts.append(f"## {title}\n\n{_render(table, 'pipe')}")
        if lines := self.unsettled():
            parts.append("## Not passed\n\n" + "\n".join(f"- {_cell(line)}" for line in lines))
        return "\n\n".join(parts) + "\n"

    def terminal(self) -> list[str]:
        """Return the lines that a terminal shows: the two tables, then what did not pass."""
        lines = [*self._sampling(), ""] if self.evaluations else []
        for table in (self.policies(), self.improvements()):
            if len(table):
                lines += [*_render(table, "simple").splitlines(), ""]
        return lines + self.unsettled()

    def _sampling(self) -> list[str]:
        """Print every setting that decides a draw, once for all policies that share it."""
        shared: dict[str, list[str]] = {}
        for row in self._sorted(self.evaluations):
            settings = " ".join(f"{name}={value}" for name, value in row["sampling"].items())
            policies = shared.setdefault(settings, [])
            if row["policy"] not in policies:
                policies.append(row["policy"])
        return [
            _cell(f"sampling of {' and '.join(policies)}: {settings}")
            for settings, policies in shared.items()
        ]

    def _sorted(self, rows: Mapping[Any, Row]) -> list[Row]:
        """Sort rows by task type and policy; what is in neither list comes last, as found."""

        def place(names: Sequence[str], name: str) -> int:
            return names.index(name) if name in names else len(names)

        return sorted(
            rows.values(),
            key=lambda row: (
                place(self.task_types, row["task_type"]),
                place(self.roles, row["policy"]),
            ),
        )

    def _policy_row(self, row: Row) -> dict[str, Any]:
        key = (row["policy"], row["task_type"])
        own = [
            check
            for (question, *of), check in self.checks.items()
            if tuple(of) == key and question not in AGAINST_BASE
        ]
        accuracy = self.checks.get(("accuracy", *key))
        v = accuracy["verdict"] if accuracy else None
        return {
            "task type": row["task_type"],
            "policy": row["policy"],
            "n × k": f"{_asked(row)} × {v['k'] if v else row['k']}",
            "baseline": _percent(v["then"]) if v else "",
            # A rerun is judged on the samples of all its attempts, so those are shown.
            "now": _percent(v["now"] if v else row["accuracy"]),
            "Δ points (90 % interval)": _interval(v) if v else "",
            "strict": _percent(row["strict_accuracy"]),
            "reward": f"{row['mean_reward']:+.3f}",
            "tokens": f"{row['mean_length']:.1f}",
            "truncated": _percent(row["outcomes"]["truncated"]),
            "verdict": _worst(own),
        }


def _finite(value: Any) -> Any:
    """The same with null for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _worst(checks: Iterable[Row]) -> str:
    by_name: dict[str, list[str]] = {}
    for check in checks:
        by_name.setdefault(check["name"], []).append(check["question"])
    for name in _WORST_FIRST:
        if name in by_name:
            return name if name == "PASS" else f"{name}: {', '.join(by_name[name])}"
    return "not judged"


def _asked(row: Row) -> str:
    """The number of problems, and of how many where a run stopped at a decision."""
    return f"{row['n']}" if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"


def _side(row: Row, side: str) -> str:
    if not row["verdict"]:
        return ""
    value = row["verdict"][side]
    return f"{value:.1f} tokens" if row["unit"] == "tokens" else _percent(value)


def _interval(v: Row) -> str:
    return f"{_points(v['delta'])} ({_points(v['lower'])} to {_points(v['upper'])})"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _render(table: pd.DataFrame, style: str) -> str:
    shown = table.map(_cell)
    shown.columns = pd.Index([_cell(name) for name in shown.columns])
    return str(shown.to_markdown(index=False, tablefmt=style, disable_numparse=True))


def _cell(value: object) -> str:
    # Names of policies and task types come from outside as much as completions do; a pipe would
    # end a cell of a Markdown table.
    return escape(str(value), 1000).replace("|", "\\|")


def write_summary(report: Report, target: str) -> None:
    """Append the Markdown to the job summary of a CI system, a file that it names."""
    with Path(target).open("a", encoding="utf-8") as file:
        file.write(report.markdown())
