"""What a training run logged, as files: one row per step, and the curves of it."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, float]
"""What the trainer logs of one step: ``step``, ``loss``, ``reward``, ``grad_norm`` and so on."""

_SHOWN = {
    "reward": "mean reward",
    "completions/mean_length": "mean length (tokens)",
    "entropy": "entropy (nats a token)",
    "grad_norm": "gradient norm",
}


def write_curves(rows: Sequence[Row], folder: Path) -> None:
    """Write ``log.json``, ``curves.csv`` and ``curves.png`` into ``folder``."""
    (folder / "log.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    draw_curves(rows, folder / "curves.png")


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw reward, length, entropy and gradient norm over the steps into a PNG file."""
    # Figure instead of pyplot: it needs no display and leaves no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, _SHOWN.items(), strict=True):
        axes.plot([row["step"] for row in rows], [row.get(name, math.nan) for row in rows])
        axes.set(title=title, xlabel="step")
    figure.savefig(path, dpi=110, metadata={"Software": None})
