"""The demo's figure: four panels, each with a line that says how to read it."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from run_record import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLOURS = ("#4d4d4d", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = "osD^vP"
GREY = "#666666"

Styled = tuple[Run, str, str]  # a run with its colour and its marker


def draw(runs: Sequence[Run], facts: Mapping[str, Any], path: Path) -> None:
    """Draw likelihood and TD residual over the steps; below, diversity beside length."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((nll, td), (diversity, length)) = plt.subplots(
        2, 2, figsize=(11, 8.4), layout="constrained"
    )
    styled: list[Styled] = list(zip(runs, cycle(COLOURS), cycle(MARKERS), strict=False))
    draw_nll(nll, styled)
    draw_td(td, styled)
    draw_diversity(diversity, styled)
    draw_length(length, styled, facts)
    for axes in (nll, td, diversity):
        axes.grid(alpha=0.25)
    figure.legend(
        *nll.get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False
    )
    figure.suptitle(
        f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['data']}, "
        f"γ = {facts['gamma']:g}, one seed",
        x=0.01,
        ha="left",
        fontsize=10,
        color=GREY,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def titled(axes: Axes, title: str, how_to_read: str) -> None:
    """Put a title above a panel, and below it how to read the panel."""
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    line = axes.text(
        0, 1.02, how_to_read, transform=axes.transAxes, color=GREY, va="bottom", fontsize=9
    )
    line.set_in_layout(False)  # it may reach beyond the panel, which must not shrink for it


def draw_nll(axes: Axes, styled: Sequence[Styled]) -> None:
    """Held-out NLL over the fine-tuning steps."""
    for run, colour, marker in styled:
        steps, nll, _ = zip(*run.curve, strict=True)
        axes.plot(steps, nll, color=colour, marker=marker, markersize=4, label=run.name)
    axes.set(xlabel="fine-tuning step", ylabel="held-out NLL (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    titled(axes, "Likelihood", "Lower is better. IQLearn should stay near MLE; if not, λ is large.")


def draw_td(axes: Axes, styled: Sequence[Styled]) -> None:
    """Squared TD residual over the fine-tuning steps."""
    for run, colour, marker in styled:
        steps, _, td = zip(*run.curve, strict=True)
        axes.plot(steps, td, color=colour, marker=marker, markersize=4)
    axes.set(xlabel="fine-tuning step", ylabel="held-out squared TD residual")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    titled(axes, "TD residual", "What λ weighs: it falls as λ grows. MLE leaves it as it comes.")


def draw_diversity(axes: Axes, styled: Sequence[Styled]) -> None:
    """Likelihood against diversity, each point with the length that it depends on."""
    for run, colour, marker in styled:
        axes.plot(run.self_bleu, run.nll, color=colour, marker=marker, markersize=10)
        axes.annotate(
            f"{run.length:.0f} tokens",
            (run.self_bleu, run.nll),
            xytext=(9, 5),
            textcoords="offset points",
            color=colour,
            fontsize=9,
        )
    axes.set(xlabel="Self-BLEU of the samples (lower: more diverse)", ylabel="held-out NLL")
    axes.margins(0.25)
    titled(
        axes,
        "Likelihood and diversity",
        "Compare points of like length only: Self-BLEU moves with length.",
    )


def draw_length(axes: Axes, styled: Sequence[Styled], facts: Mapping[str, Any]) -> None:
    """Mean length of the samples and the share that was cut, beside held-out text."""
    bars = [("held-out text", facts["reference_length"], facts["reference_cut"], "#bbbbbb")]
    bars += [(run.name, run.length, run.unfinished, colour) for run, colour, _ in styled]
    names, lengths, cuts, colours = zip(*reversed(bars), strict=True)
    drawn = axes.barh(names, lengths, color=colours, height=0.6)
    axes.bar_label(
        drawn,
        [f"{x:.0f} tokens, {100 * cut:.0f} % cut" for x, cut in zip(lengths, cuts, strict=True)],
        padding=4,
        fontsize=9,
    )
    axes.axvline(facts["reference_length"], color=GREY, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.45 * max(lengths))
    axes.set_xlabel(f"mean length of the samples (tokens, cut at {facts['max_new_tokens']})")
    how_to_read = "Best near the dashed line: held-out text, cut at the same length."
    titled(axes, "Length", how_to_read)
