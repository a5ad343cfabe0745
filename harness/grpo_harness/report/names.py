"""Short names for policies that are named by long paths."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from grpo_harness.report.report import Report, Row

_LONGEST = 32
"""Characters of a name that is left as it is."""


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a name for each: of a long path as much of its end as no other path ends with."""
    every = [*dict.fromkeys(names)]
    return {name: _short(name, [other for other in every if other != name]) for name in every}


def _short(name: str, others: Iterable[str]) -> str:
    parts = name.rstrip("/").split("/")
    if len(name) <= _LONGEST:
        return name
    for number in range(1, len(parts)):
        end = "/".join(parts[-number:])
        if not any(other == end or other.rstrip("/").endswith(f"/{end}") for other in others):
            return min(f"…/{end}", name, key=len)
    return name


def shortened(report: Report, names: Mapping[str, str]) -> Report:
    """Return a report with other names of policies everywhere but in what says what was run."""

    def of(name: str) -> str:
        start = "baseline of "
        if name.startswith(start):
            return start + of(name.removeprefix(start))
        return names.get(name, name)

    def row(row: Row) -> Row:
        renamed = {key: of(row[key]) for key in ("policy", "reference") if key in row}
        return {**row, **renamed}

    def key(key: tuple[str, str]) -> tuple[str, str]:
        return of(key[0]), key[1]

    return replace(
        report,
        policies=[of(name) for name in report.policies],
        evaluations={key(name): row(of_it) for name, of_it in report.evaluations.items()},
        checks={
            (rule, of(policy), task): row(check)
            for (rule, policy, task), check in report.checks.items()
        },
        problems={key(name): found for name, found in report.problems.items()},
        recorded={key(name): found for name, found in report.recorded.items()},
    )
