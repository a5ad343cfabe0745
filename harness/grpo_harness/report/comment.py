"""A report as a comment of a pull request: the verdict first, all else folded, and not too long."""

from collections.abc import Iterator, Sequence
from typing import Any

from grpo_harness.report.report import Report
from grpo_harness.text import markdown

MARKER = "<!-- grpo-harness -->"
"""The first line, by which a later run finds the comment that it replaces."""

LONGEST = 60_000
"""Characters of a comment at most: GitHub takes 65,536."""

_LEFT_OUT = "\n\nThe rest has no room here: see the report.\n"

_SIGN = {"ERROR": "🛑", "FAIL": "❌", "UNPROVEN": "❓", "PASS": "✅"}


def comment(report: Report, limit: int = LONGEST) -> str:
    """Return the Markdown, of at most ``limit`` characters; what has no room is left out whole."""
    text = f"{MARKER}\n{_verdict(report)}\n"
    for part in _parts(report):
        if len(text) + len(part) + len(_LEFT_OUT) + 2 > limit:
            return text + _LEFT_OUT
        text += f"\n{part}\n"
    return text


def _verdict(report: Report) -> str:
    counts = report.counts()
    failed = len(report.failed)
    sign = _SIGN[report.worst()]
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    said = f"## {sign} grpo-harness: {found or 'nothing was judged'}"
    if failed:
        said += f"; {failed} {'test' if failed == 1 else 'tests'} failed"
    if report.status != "finished":
        said += f" (the run is {report.status})"
    names = ", ".join(map(markdown, report.run["trained"]))
    of = f"{names} against {markdown(report.run['base'])} and the baselines"
    return f"{said}\n\n{of}, seed {report.run['seed']}"


def _parts(report: Report) -> Iterator[str]:
    """Yield what a comment says, the most important first."""
    if lines := report.unsettled():
        yield "\n".join(f"- {markdown(line, 2_000)}" for line in lines)
    tables = {
        "Policies against their baselines": report.measured(),
        "Trained against base": report.improvements(),
    }
    for title, table in tables.items():
        if table:
            yield f"### {title}\n\n{table.markdown()}"
    for check in report.worst_first():
        if check.get("changed"):
            title = f"{check['title']} of {check['policy']} on {check['task_type']}"
            yield _folded(f"Problems that changed most: {title}", check["changed"])
    if report.failed:
        failures = [f"{name}: {' '.join(said.split())}" for name, said in report.failed.items()]
        yield _folded("Tests that failed or could not be run", failures)
    if report.notices:
        yield _folded("To know", report.notices)
    if table := report.details():
        yield _details("Every check", table.markdown())


def _folded(title: str, lines: Sequence[Any]) -> str:
    return _details(title, "\n".join(f"- {markdown(str(line), 2_000)}" for line in lines))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{markdown(title)}</summary>\n\n{text}\n\n</details>"
