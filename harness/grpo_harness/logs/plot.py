"""The curves of a run over those of the recorded runs and their bands, and a picture of them."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grpo_harness.logs.figures import figures
from grpo_harness.logs.judge import RISK, bands
from grpo_harness.logs.read import Log, LogError
from grpo_harness.logs.recorded import Recorded, windows
from grpo_harness.text import one_line


@dataclass(frozen=True)
class Curve:
    """A figure along a training: of this run, and of the recorded ones with their band.

    All are means over windows of steps: ``now`` at ``steps``, and each of ``then``, their ``mean``,
    ``lower`` and ``upper`` at ``then_steps``.
    """

    name: str
    steps: list[float]
    now: list[float]
    then_steps: list[float]
    then: list[list[float]]
    mean: list[float]
    lower: list[float]
    upper: list[float]


def curves(log: Log, recorded: Recorded) -> list[Curve]:
    """Return the curves that all runs have."""
    found = {
        figure.key: figure
        for figure, _ in figures(log)
        # A figure that some steps lack may have fewer windows in one run than in another.
        if windows(log, figure.key)
        and all(figure.key in run.curves for run in recorded.runs)
        and len({len(run.curves[figure.key]) for run in recorded.runs}) == 1
    }
    drawn = []
    for key, figure in found.items():
        then = [[window.mean for window in run.curves[key]] for run in recorded.runs]
        limits = [b.possible(figure) for b in bands(recorded.runs, key, figure, RISK)]
        own = windows(log, key)
        # What is never below 0, such as a length, has no band there.
        least = min(value for curve in ([w.mean for w in own], *then) for value in curve)
        drawn.append(
            Curve(
                name=key,
                steps=[(w.first + w.last) / 2 for w in own],
                now=[w.mean for w in own],
                then_steps=[(w.first + w.last) / 2 for w in recorded.runs[0].curves[key]],
                then=then,
                mean=[fmean(values) for values in zip(*then, strict=True)],
                lower=[max(b.lower, 0.0) if least >= 0 else b.lower for b in limits],
                upper=[b.upper for b in limits],
            )
        )
    return drawn


def plot(log: Log, recorded: Recorded, path: Path) -> None:
    """Write a PNG with a picture for each curve that all runs have.

    Raises ``LogError`` if there is none, or if the file cannot be written.
    """
    # Figure instead of pyplot: it needs no display and leaves no global state.
    from matplotlib.figure import Figure

    drawn = curves(log, recorded)
    if not drawn:
        raise LogError(f"nothing can be drawn: no curve of {log.path} is in all recorded runs")
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    picture = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    places = [*picture.subplots(rows, columns, squeeze=False).flat]
    for axes in places[len(drawn) :]:
        axes.remove()
    for axes, of in zip(places, drawn, strict=False):
        axes.fill_between(of.then_steps, of.lower, of.upper, color="#c8d3e6", lw=0)
        for curve in of.then:
            axes.plot(of.then_steps, curve, color="#8a99b5", lw=0.8)
        axes.plot(of.steps, of.now, color="#c0392b")
        axes.set_title(of.name.replace("$", r"\$"), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0)
        axes.grid(color="#eeeeee", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle("this run (red), recorded runs and their band (blue)", fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise LogError(f"the curves cannot be drawn to {path} ({one_line(error)})") from error
