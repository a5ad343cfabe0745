"""The report of a run before it found anything: what is run, by what."""

from collections.abc import Sequence
from datetime import datetime

from grpo_harness.baselines.provenance import git, versions
from grpo_harness.report.report import Report
from grpo_harness.report.schema import Status
from grpo_harness.settings import Settings


def begun(
    settings: Settings,
    policies: Sequence[str],
    *,
    baselines: str,
    seed: int,
    started: datetime,
    seconds: float | None,
    status: Status,
) -> Report:
    """Return the report of a run of ``policies``, the base first. ``baselines`` is its folder."""
    run = {
        "base": policies[0],
        "trained": [*policies[1:]],
        "problems": settings.problems,
        "samples": settings.samples,
        "sampling": settings.sampling.asdict(),
        "baselines": baselines,
        "seed": seed,
        "started": started.isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
        "commit": git("rev-parse", "HEAD", cwd=settings.root),
    }
    return Report(
        run,
        list(settings.tasks),
        policies,
        status,
        environment=versions(),
        settings=settings.content(),
    )
