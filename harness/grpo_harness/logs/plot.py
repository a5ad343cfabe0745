"""Draw the curves of a run over those of the recorded runs, and their bands."""

from pathlib import Path

from grpo_harness.logs.figures import figures
from grpo_harness.logs.judge import RISK, bands
from grpo_harness.logs.read import Log, LogError
from grpo_harness.logs.recorded import Recorded, windows
from grpo_harness.text import one_line


def plot(log: Log, recorded: Recorded, path: Path) -> None:
    """Write a PNG with a picture for each curve that all runs have.

    Raises ``LogError`` if there is none, or if the file cannot be written.
    """
    # Figure instead of pyplot: it needs no display and leaves no global state.
    from matplotlib.figure import Figure

    curves = {
        figure.key: figure
        for figure, _ in figures(log)
        # A figure that some steps lack may have fewer windows in one run than in another.
        if windows(log, figure.key)
        and all(figure.key in run.curves for run in recorded.runs)
        and len({len(run.curves[figure.key]) for run in recorded.runs}) == 1
    }
    if not curves:
        raise LogError(f"nothing can be drawn: no curve of {log.path} is in all recorded runs")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    picture = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    places = [*picture.subplots(rows, columns, squeeze=False).flat]
    for axes in places[len(curves) :]:
        axes.remove()
    for axes, (key, figure) in zip(places, curves.items(), strict=False):
        then = [run.curves[key] for run in recorded.runs]
        steps = [(window.first + window.last) / 2 for window in then[0]]
        limits = [b.possible(figure) for b in bands(recorded.runs, key, figure, RISK)]
        own = windows(log, key)
        # What is never below 0, such as a length, has no band there.
        least = min(window.mean for curve in (own, *then) for window in curve)
        lower = [max(b.lower, 0.0) if least >= 0 else b.lower for b in limits]
        axes.fill_between(steps, lower, [b.upper for b in limits], color="#c8d3e6", lw=0)
        for curve in then:
            axes.plot(steps, [window.mean for window in curve], color="#8a99b5", lw=0.8)
        axes.plot([(w.first + w.last) / 2 for w in own], [w.mean for w in own], color="#c0392b")
        axes.set_title(key.replace("$", r"\$"), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0)
        axes.grid(color="#eeeeee", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle("this run (red), recorded runs and their band (blue)", fontsize=10)
    try:
        picture.savefig(path, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise LogError(f"the curves cannot be drawn to {path} ({one_line(error)})") from error
