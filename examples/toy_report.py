"""The toy MDP's table, figure and sentences."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from rich import box
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = 11.0  # points that online is said to gain over offline, with recovery


class Result(NamedTuple):
    """Success rates of the seeds, of one objective."""

    model: str  # "table" or "network"
    objective: str
    recovery: bool
    offline: list[float]
    online: list[float] | None  # None for MLE

    @property
    def gain(self) -> tuple[float, float]:
        """Online less offline in points: the mean over seeds, and its standard error."""
        assert self.online is not None
        return mean([100 * (on - off) for on, off in zip(self.online, self.offline, strict=True)])


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def percent(rates: Sequence[float]) -> str:
    """A success rate, the mean over seeds."""
    return f"{100 * statistics.mean(rates):.1f}"


def pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Each objective with recovery, and without."""
    return [(one, other) for one, other in zip(results[::2], results[1::2], strict=True)]


def reproduces(recovery: Result, none: Result) -> str:
    """Which half of the paper's finding a pair shows: "gain", "no gain", "both" or "none"."""
    other, error = none.gain
    gains, stays = recovery.gain[0] > PAPER, abs(other) <= max(2 * error, 1.0)
    if gains and stays:
        return "both"
    return "gain" if gains else "no gain" if stays else "none"


def table(results: Sequence[Result], best: Sequence[float]) -> Table:
    """Success in per cent, one row for an objective."""
    made = Table(
        title="Success in %, offline and online, with recovery and with none",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("objective", no_wrap=True)
    for name in ("with\noff", "\non", "\ngain"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("none\noff", "\non", "\ngain"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("as the\npaper", no_wrap=True)
    models = dict.fromkeys(one.model for one in results)
    for model in models:
        made.add_row(f"Q in a {model}", style="bold")
        for pair in pairs([one for one in results if one.model == model]):
            cells = [cell for one in pair for cell in figures(one)]
            said = reproduces(*pair) if pair[0].online is not None else ""
            made.add_row(pair[0].objective, *cells, said)
    limits = [f"{100 * rate:.1f}" for rate in best]
    made.add_row("always right, and back", limits[0], "", "", limits[1], style="dim")
    return made


def figures(one: Result) -> list[str]:
    """Success offline and online, and the gain."""
    if one.online is None:
        return [percent(one.offline), "", ""]
    return [percent(one.offline), percent(one.online), "{:+.1f}\u00b1{:.1f}".format(*one.gain)]


def sentences(results: Sequence[Result]) -> list[str]:
    """What the numbers say of the paper's finding."""
    said = []
    for model in dict.fromkeys(one.model for one in results):
        found = [p for p in pairs(results) if p[0].model == model and p[0].online is not None]
        whole = [p[0].objective for p in found if reproduces(*p) == "both"]
        rest = [p[0].objective for p in found if p[0].objective not in whole]
        said.append(
            f"Q in a {model}: more than {PAPER:g} points with recovery and none without: "
            f"{'; '.join(whole) or 'no objective'}. Not so: {'; '.join(rest) or 'none'}."
        )
    return said


def draw(results: Sequence[Result], best: Sequence[float], path: Path) -> None:
    """Success offline and online, a panel for each model and variant."""
    models = list(dict.fromkeys(one.model for one in results))
    figure, grid = plt.subplots(
        len(models), 2, figsize=(11, 3.4 * len(models)), squeeze=False, layout="constrained"
    )
    for axes, model in zip(grid, models, strict=True):
        for panel, recovery, ceiling in zip(axes, (True, False), best, strict=True):
            shown = [r for r in results if r.model == model and r.recovery == recovery]
            for place, one in enumerate(reversed(shown)):
                for shift, rates, colour in ((0.2, one.offline, "#999999"),
                                             (-0.2, one.online, "#0072b2")):  # fmt: skip
                    if rates is None:
                        continue
                    middle, error = mean([100 * rate for rate in rates])
                    panel.barh(place + shift, middle, 0.36, xerr=error, color=colour)
            panel.axvline(100 * ceiling, color="#666666", linestyle="--", linewidth=1)
            panel.set_yticks(range(len(shown)), [one.objective for one in reversed(shown)])
            panel.set_xlim(0, 100)
            panel.set_xlabel("success, %")
            variant = "with recovery" if recovery else "without recovery"
            panel.set_title(f"Q in a {model}, {variant}", loc="left", fontweight="bold")
            panel.spines[["top", "right"]].set_visible(False)
    colours = {"offline": "#999999", "online": "#0072b2"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle("Dashed: always right, and back", x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
