"""The terminal output of a run (what it is about, can find and found), and the report.

There is one object per run that uses the harness. Only the main process prints and writes.
"""

from __future__ import annotations

import os
import signal
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_harness.plugin.planning import asked
from grpo_harness.plugin.state import SEED, Run, rows, usage_errors
from grpo_harness.text import escape, plain, together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_harness.baselines.file import Baseline
    from grpo_harness.gate.plan import Plan
    from grpo_harness.policy import PolicyName
    from grpo_harness.report.report import Report
    from grpo_harness.sizing import Row


class Summary:
    """The hooks of a run that uses the harness, and the results of its tests so far."""

    def __init__(self, config: pytest.Config, run: Run) -> None:
        self._config = config
        self._run = run
        self._leads = not hasattr(config, "workerinput")
        self._has_header = False
        self._seen: dict[str, bool] = {}
        self._rows: list[dict[str, Any]] = []
        self._failed: dict[str, str] = {}
        self._passed: set[str] = set()
        self._written: list[str] = []
        self._final: Report | None = None
        self._handler: Any = None
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self._report_to = self._folder()
        if self._report_to is not None:
            self._begin(self._report_to)
        self._history = self._kept_in()

    def _folder(self) -> Path | None:
        folder = self._config.getoption("grpo_report")
        if folder is None or not self._leads or self._config.getoption("collectonly"):
            return None
        return Path(self._config.invocation_params.dir / folder)

    def _kept_in(self) -> Path | None:
        """Return the folder of the history, if this run is to be in it; make it if it is new."""
        folder = self._run.settings.history
        options = ("collectonly", "grpo_record")
        if folder is None or not self._leads or any(map(self._config.getoption, options)):
            return None
        from grpo_harness.history.file import prepare

        with usage_errors():
            prepare(folder)
        return folder

    def _begin(self, folder: Path) -> None:
        """Replace an earlier run's report by one with the status running."""
        from grpo_harness.report.files import begin, write

        with usage_errors():
            begin(folder)
            write(self._report("running"), folder)
        # A cluster sends SIGTERM before it takes the machine away: handle it like Ctrl-C.
        self._handler = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def pytest_unconfigure(self) -> None:
        """Restore the signal handler."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    # --- before -------------------------------------------------------------------------------

    def _size(self) -> str:
        """Return how much the run draws, as far as the settings say."""
        settings = self._run.settings
        if settings.minutes is not None:
            return f"as much as {settings.minutes:g} minutes allow"
        return f"{settings.problems} problems × {settings.samples} samples"

    def pytest_report_header(self) -> list[str]:
        """Show what the run is about, and what is needed to repeat it."""
        self._has_header = True
        settings, run = self._run.settings, self._run
        about = (
            f"{together([escape(name.text, 60) for *_, name in settings.policies()])}, "
            f"{self._size()}, seed {run.seed}"
        )
        sampling = " ".join(f"{k}={v}" for k, v in settings.sampling.asdict().items())
        lines = [
            f"grpo-harness: {about}",
            plain(f"grpo-harness: {sampling}, baselines in {self._relative(settings.baselines)}"),
        ]
        if not self._config.pluginmanager.hasplugin("cacheprovider"):
            lines.append("grpo-harness: pytest's cache is off: reruns are not pooled")
        return lines

    def pytest_report_collectionfinish(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> list[str]:
        """Show what the run will be able to find: in one line, or with ``--co`` check by check."""
        self._seen = {item.nodeid: False for item in items}
        header = [] if self._has_header else self.pytest_report_header()
        if not self._run.planned or config.getoption("grpo_record"):
            return header
        return [*header, *self._plan(items)]

    def _plan(self, items: list[pytest.Item]) -> list[str]:
        from grpo_harness.gate.plan import Plan
        from grpo_harness.rules import UNDECLARED

        settings, shares, sizing = self._run.settings, self._run.shares(), self._run.sizing
        plans: list[tuple[PolicyName, Row, Plan | str]] = []
        with usage_errors():
            for task_type, role, name in asked(self._run, items):
                row = sizing.row(role, name, task_type)
                alpha = shares.get(row.rule.name) or shares[UNDECLARED]
                plans.append((name, row, sizing.plan(role, name, task_type, alpha)))
        planned = len(self._run.planned)
        line = (
            f"plan: {planned} check{'s share' if planned > 1 else ' has'} a false-alarm risk of "
            f"{100 * settings.table.gate.alpha:g} %"
        )
        found = sorted((p for *_, p in plans if isinstance(p, Plan)), key=lambda plan: plan.mde90)
        if found:
            ends = (f"{100 * plan.mde90:.1f}" for plan in (found[0], found[-1]))
            drop = " to ".join(dict.fromkeys(ends))
            line += f"; nine times in ten, a recorded policy is caught {drop} points lower"
            drawn = sum(plan.n * plan.k for plan in found)
            line += f"; {drawn:,} completions, {_in_words(_together(plans))}"
        unknown = [plan for *_, plan in plans if isinstance(plan, str)]
        if unknown:
            whys = ", ".join(dict.fromkeys(unknown))
            every = f"{len(unknown)} of {len(plans)} accuracy checks"
            if len(unknown) == len(plans) > 1:
                every = f"all {len(plans)} accuracy checks"
            line += f"; {every} will be an ERROR, and draw nothing: {whys}"
        if not plans or not self._config.getoption("collectonly"):
            return [f"{line} (check by check: --co)" if plans else line]
        return [line, *_plan_table(plans, self._width())]

    # --- while it runs ------------------------------------------------------------------------

    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
        """Count a check that proves nothing as unproven, not as passed."""
        if _unproven(report):
            return "unproven", "u", ("UNPROVEN", {"yellow": True})
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's rows and its outcome."""
        if not self._leads:
            return
        self._seen[report.nodeid] = report.when == "teardown"
        if report.failed:
            self._failed[report.nodeid] = _said(report)
        elif report.when == "call" and report.passed:
            self._passed.add(report.nodeid)
        # Each phase of a test adds properties; the last one has them all.
        if report.when == "teardown":
            self._keep(list(rows(report)))
        if reasons := _unproven(report):
            self._tell_junit(report, reasons)

    def _keep(self, carried: list[dict[str, Any]]) -> None:
        self._rows += carried
        cache = getattr(self._config, "cache", None)
        if cache and any(row["kind"] == "evaluation" for row in carried):
            cache.set(SEED, self._run.seed)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the errors of collection."""
        if self._leads and report.failed:
            self._failed[report.nodeid] = _said(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Keep the names of the tests that pytest-xdist's workers will run."""
        for name in ids:
            self._seen.setdefault(name, False)

    def _tell_junit(self, report: pytest.TestReport, reasons: list[str]) -> None:
        """Write UNPROVEN into the test's JUnit output, because JUnit has no such status."""
        from _pytest.junitxml import xml_key

        junit = self._config.stash.get(xml_key, None)
        if junit is not None:
            element = ElementTree.Element("system-out")
            element.text = "\n".join(f"UNPROVEN: {plain(reason)}" for reason in reasons)
            junit.node_reporter(report).append(element)

    # --- after --------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, however the run ended; check that all of it has the run's seed."""
        if not self._leads:
            return
        for name in self._other_seeds():
            self._failed[name] = "it was drawn with another seed than the run's"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._config.getoption("collectonly"):
            return
        interrupted = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        from grpo_harness.report.files import ReportError, append_summary, write

        self._final = report = self._report("interrupted" if interrupted else "finished")
        if self._history is not None and not interrupted:
            self._append(report, self._history)
        try:
            if self._report_to is not None:
                self._add_problems(report, self._report_to)
                self._written += [
                    f"written: {self._relative(path)}" for path in write(report, self._report_to)
                ]
            if report and (target := os.environ.get("GITHUB_STEP_SUMMARY")):
                append_summary(report, target)
        except ReportError as error:
            self._written.append(str(error))

    def _append(self, report: Report, folder: Path) -> None:
        """Add the run to the history, if it measured anything, and the history to the report."""
        from grpo_harness.history.file import HistoryError, append, read
        from grpo_harness.history.run import run_of

        measured = [row for row in self._rows if row["kind"] == "measured"]
        if not measured:
            return
        run = run_of(
            report.run["started"],
            self._run.seed,
            measured,
            report.checks.values(),
            self._baseline,
            self._config.rootpath,
        )
        try:
            self._written.append(f"written: {self._relative(append(run, folder))}")
            report.history = read(folder)
        except HistoryError as error:
            self._written.append(str(error))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the tables, and say what was written."""
        if not self._leads or self._config.getoption("collectonly"):
            return
        say = terminalreporter.line
        recorded = {row["path"]: row["notes"] for row in self._rows if row["kind"] == "recorded"}
        if recorded:
            terminalreporter.section("grpo-harness: baselines recorded")
            for path, notes in sorted(recorded.items()):
                say(plain("\n    ".join([self._relative(Path(path)), *notes])))
            say("Read the difference and commit it: it is what later runs must meet.")
        report = self._final
        if report:
            terminalreporter.section("grpo-harness")
            styled = bool(getattr(terminalreporter, "_tw", None) and terminalreporter._tw.hasmarkup)
            for line in report.terminal(self._width(), styled=styled):
                say(line)
        for line in self._written:
            say(plain(line))
        if report or recorded:
            from grpo_harness.session import stale_entries

            for entry in stale_entries(self._run.settings):
                say(plain(f"stale: {entry}; pytest --grpo-prune deletes it"))

    def _add_problems(self, report: Report, folder: Path) -> None:
        """Add the problems of every evaluation whose samples were written and can be read."""
        from grpo_harness.report.files import ReportError, problems_of
        from grpo_harness.report.problems import recorded

        for key, row in report.evaluations.items():
            baseline = self._baseline(*key)
            if baseline is not None:
                report.recorded[key] = recorded(baseline)
            try:
                report.problems[key] = problems_of(folder, row, baseline)
            except ReportError as error:
                report.notices.append(str(error))

    def _baseline(self, policy: str, task_type: str) -> Baseline | None:
        """Return the baseline that a policy is judged by on a task, if there is one."""
        from grpo_harness.baselines.file import BaselineError, load
        from grpo_harness.sizing import baseline_of

        settings = self._run.settings
        for role, _, name in settings.policies():
            if name.text == policy:
                try:
                    return load(baseline_of(settings, role, name, task_type))
                except BaselineError:
                    return None
        return None

    def _report(self, status: Any) -> Report:
        from grpo_harness.begun import begun

        settings = self._run.settings
        report = begun(
            settings,
            [name.text for *_, name in settings.policies()],
            baselines=self._relative(settings.baselines),
            seed=self._run.seed,
            started=self._started,
            seconds=None if status == "running" else time.monotonic() - self._clock,
            status=status,
        )
        report.passed = len(self._passed - self._failed.keys())
        report.failed = self._failed
        report.not_run = [name for name, ended in self._seen.items() if not ended]
        for row in self._rows:
            report.add(row)
        return report

    def _other_seeds(self) -> list[str]:
        """Name every evaluation that was drawn with another seed than the run's."""
        return [
            f"{row['policy']} on {row['task_type']} (seed {row['run_seed']})"
            for row in self._rows
            if row["kind"] == "evaluation" and row["run_seed"] != self._run.seed
        ]

    def _relative(self, path: Path) -> str:
        cwd = self._config.invocation_params.dir
        return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)

    def _width(self) -> int:
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        return int(reporter._tw.fullwidth) if reporter else 80


def _unproven(report: pytest.CollectReport | pytest.TestReport) -> list[str]:
    """Return the reasons of the UNPROVEN checks of a passed test."""
    if not isinstance(report, pytest.TestReport) or report.when != "call" or not report.passed:
        return []
    found = (row for row in rows(report) if row["kind"] == "check")
    return [row["reason"] for row in found if row["verdict"] == "UNPROVEN"]


def _said(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return the last lines of a failure's message."""
    text = report.longreprtext.strip()
    return "\n".join(text.splitlines()[-20:])


def _seconds(row: Row, plan: Plan) -> float | None:
    """Return how long the completions of a row take, by how fast its baseline was drawn."""
    return None if row.speed is None else plan.n * plan.k / row.speed


def _together(plans: Sequence[tuple[PolicyName, Row, Plan | str]]) -> float | None:
    """Return how long all rows take, if that is known of each."""
    each = [_seconds(row, plan) for _, row, plan in plans if not isinstance(plan, str)]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


def _in_words(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown"
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def _plan_table(plans: Sequence[tuple[PolicyName, Row, Plan | str]], width: int) -> list[str]:
    from grpo_harness.report.tables import Table

    caught, needed, time = "caught (points lower)", "problems needed", "seconds"
    rows = []
    for name, of, plan in plans:
        row = {"task type": of.task.source.name, "policy": name.text, "n × k": ""}
        if isinstance(plan, str):
            row |= {"baseline": "", caught: f"ERROR: {plan}", needed: "", time: ""}
        else:
            drop = f"{100 * plan.mde90:.1f}" if plan.mde90 < plan.then else "not even a drop to 0"
            if not plan.enough:
                drop += f", not {100 * plan.margin:.1f}"
            seconds = _seconds(of, plan)
            row |= {
                "n × k": f"{plan.n} × {plan.k}",
                "baseline": f"{plan.then:.1%}",
                caught: drop,
                needed: "no number" if plan.needed is None else str(plan.needed),
                time: "unknown" if seconds is None else f"{seconds:.1f}",
            }
        rows.append(row)
    return Table.of(rows, (needed, "baseline", time)).terminal(width)
