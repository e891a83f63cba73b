"""The study's figures."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

from study.config import Experiment
from study.results import Results, mean, of
from study.tables import NAMES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vPX*"


def draw(experiment: Experiment, results: Results, seeds: Sequence[int], path: Path) -> None:
    """The plot that a configuration asks for: "scatter" (a Pareto plot) or "curve"."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    kind = experiment.plot["kind"]
    (scatter if kind == "scatter" else curves)(axes, experiment, results, seeds)
    axes.set_title(f"{experiment.title}\n", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def scatter(axes: Axes, experiment: Experiment, results: Results, seeds: Sequence[int]) -> None:
    """Each run a point with standard errors; decodings of a run are joined by a line."""
    x, y = experiment.plot["x"], experiment.plot["y"]
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for (label, run), (colour, marker) in zip(experiment.runs.items(), styles, strict=False):
        records = results.seeds(run, seeds)
        places = [
            (of(records, x, how.name), of(records, y, how.name)) for how in experiment.decodings
        ]
        found = [(a, b) for a, b in places if a is not None and b is not None]
        if not found:
            continue
        (xs, dx), (ys, dy) = (zip(*side, strict=True) for side in zip(*found, strict=True))
        axes.errorbar(
            xs, ys, xerr=bars(dx), yerr=bars(dy), color=colour, marker=marker, markersize=7,
            label=label, linewidth=1, capsize=2,
        )  # fmt: skip
    axes.set(xlabel=NAMES[x], ylabel=NAMES[y])


def curves(axes: Axes, experiment: Experiment, results: Results, seeds: Sequence[int]) -> None:
    """Held-out NLL over the updates, the mean over seeds."""
    y = experiment.plot["y"]
    styles = zip(cycle(COLOURS), cycle(("-", "--", ":")), strict=False)
    for (label, run), (colour, line) in zip(experiment.runs.items(), styles, strict=False):
        records = results.seeds(run, seeds)
        if not records:
            continue
        steps = [point["step"] for point in records[0]["curve"]]
        values = [mean([r["curve"][i][y] for r in records]) for i in range(len(steps))]
        middle, error = zip(*values, strict=True)
        axes.errorbar(steps, middle, yerr=bars(error), color=colour, linestyle=line, label=label)
    axes.set(xlabel="updates", ylabel=f"held-out {NAMES[y]}")


def bars(errors: Sequence[float | None]) -> list[float]:
    """Standard errors as they are drawn; one seed has none."""
    return [error or 0.0 for error in errors]
