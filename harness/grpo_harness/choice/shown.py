"""What was found, as tables and sentences, and as a report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_harness.choice.pairs import Pair, best, overall, unbeaten
from grpo_harness.choice.search import GOOD, Answer, Probe
from grpo_harness.report.tables import Table
from grpo_harness.text import escape, together

if TYPE_CHECKING:
    from grpo_harness.choice.named import Measured
    from grpo_harness.evaluation import Evaluation
    from grpo_harness.gate.stats import Estimate
    from grpo_harness.policy import PolicyName
    from grpo_harness.session import Session

_LEVEL = 0.95
"""One-sided confidence of either end of an interval, as everywhere in a report."""


def table(pairs: Sequence[Pair]) -> Table:
    """One row per pair and task: which is better, by how much, and what would have been found."""
    return Table.of([_row(pair) for pair in pairs], ("p (Holm)", "MDE90", "n × k"))


def _row(pair: Pair) -> dict[str, str]:
    check, e = pair.check, pair.evidence
    ends = f"{100 * e.lower:+.1f} to {100 * e.upper:+.1f}"
    return {
        "task type": check.task_type,
        "policy": check.policy,
        "is": pair.relation,
        "against": check.reference,
        "n × k": f"{e.n} × {e.k}",
        "correct": f"{e.now:.1%}",
        "the other": f"{e.then:.1%}",
        "Δ points (90 % CI)": f"{100 * e.delta:+.1f} ({ends})",
        "p (Holm)": f"{pair.adjusted:.2g}",
        "MDE90": f"{100 * e.mde90:.1f}",
    }


def summary(pairs: Sequence[Pair]) -> str:
    """Say which policy is proven best, if one is."""
    found, what = best(pairs), overall(pairs)[0].check.task_type
    on = "all tasks together" if what == "all" else what
    if found is not None:
        each = "every other" if len(overall(pairs)) > 1 else "the other"
        return f"best on {on}: {escape(found)}, proven better than {each}"
    names = together([escape(name) for name in unbeaten(pairs)])
    return f"no policy is proven best on {on}; not proven worse than any other: {names}"


def points(of: Estimate) -> str:
    """Write a loss in points, with its interval."""
    ends = f"{100 * of.lower(_LEVEL):.1f} to {100 * of.upper(_LEVEL):.1f}"
    return f"{100 * of.mean:.1f} points ({ends})"


_STATES = {"kept": "before the drop", "dropped": "after the drop", "undecided": "undecided"}


def probed(probe: Probe, name: PolicyName, *, bad: bool) -> str:
    """Say what was found of a checkpoint."""
    state = "" if bad else f"{_STATES[probe.state]}, "
    return f"{escape(name.text)}: {state}lost {points(probe.lost)} by {probe.n} problems"


def concluded(answer: Answer, names: Sequence[PolicyName]) -> list[str]:
    """Say where the drop is. ``names`` are numbered as in the search."""
    kept, dropped = escape(names[answer.kept].text), escape(names[answer.dropped].text)
    if answer.found:
        lines = [f"first after the drop: {dropped}; the last before it: {kept}"]
    else:
        lines = [
            f"UNPROVEN: the drop is after {kept} and at {dropped} or before; the "
            f"{answer.dropped - answer.kept - 1} between them are not decided by all problems, so "
            "ask more --problems or --samples"
        ]
    of = f"between these two, {points(answer.step)} of {100 * answer.bad.lost.mean:.1f} were lost"
    if answer.found and answer.step.upper(_LEVEL) < answer.bad.lost.mean / 2:
        of += ": less than half, so the loss is gradual"
        if answer.kept != GOOD:
            of += f"; what was lost before is found with --bad {kept}"
    return [*lines, of]


def cost(answer: Answer, measured: Measured, full: int, candidates: int, seconds: float) -> str:
    """Say what an answer has cost, beside ``full``: all completions of all checkpoints."""
    stored = measured.completions - measured.drawn
    reused = f", {stored:,} of them stored before," if stored else ""
    return (
        f"asked {len(answer.probes)} of {candidates} checkpoints, {measured.completions:,} "
        f"completions{reused} in {seconds:.0f} s; to judge each in full would take {full:,}"
    )


def write(
    folder: Path,
    session: Session,
    policies: Sequence[Sequence[Evaluation]],
    pairs: Sequence[Pair],
    started: datetime,
) -> list[Path]:
    """Write the report of a comparison; returns the paths of its files. Raises ``ReportError``."""
    from grpo_harness.begun import begun
    from grpo_harness.report.files import problems_of, write, write_samples

    report = begun(
        session.settings,
        [of[0].policy for of in policies],
        baselines=session.settings.table.baselines,
        seed=session.run_seed,
        started=started,
        seconds=(datetime.now(UTC) - started).total_seconds(),
        status="finished",
    )
    report.notices = [summary(pairs), *session.notices()]
    for evaluation in (e for of in policies for e in of):
        write_samples(folder, evaluation)
        row = {"kind": "evaluation", **evaluation.summary()}
        report.add(row)
        key = evaluation.policy, evaluation.task
        report.problems[key] = problems_of(folder, row, None)
    for pair in pairs:
        report.add({"kind": "check", **pair.check.asdict()})
    return write(report, folder)
