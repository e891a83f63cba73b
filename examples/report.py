"""What the demo shows: a progress bar, a table, a figure, and sentences made from the numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import matplotlib
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

COLOURS = ("#4d4d4d", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = "osD^vP"


@dataclass
class Run:
    """One fine-tuning run and what was measured on it."""

    lam: float
    curve: list[tuple[int, float]]  # (step, held-out NLL)
    nll: float
    td: float
    entropy: float
    self_bleu: float
    length: float
    unfinished: float  # share of the samples that were cut at the longest length
    step_ms: float
    samples: dict[str, list[str]]  # by prompt
    loss_ms: float = 0.0
    loss_mb: float = 0.0

    @property
    def name(self) -> str:
        """What the run is called in the table and the figure."""
        return f"IQLearn λ={self.lam:g}" if self.lam else "MLE"


class Progress:
    """One bar over all phases; plain lines where the output is not a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.bar = bars.Progress(
            bars.TextColumn("{task.description:<30}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Self:
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self.bar.stop()

    def phase(self, description: str) -> None:
        """Say what happens now."""
        self.bar.update(self.task, description=description)
        if not self.console.is_terminal:
            self.console.print(description)

    def advance(self) -> None:
        """Count one training step."""
        self.bar.advance(self.task)


def write_report(
    console: Console, folder: Path, runs: Sequence[Run], facts: Mapping[str, Any]
) -> None:
    """Print the table and the sentences; write the figure, the numbers and the samples."""
    sentences = read_the_numbers(runs, facts)
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, facts, folder / "report.png")
    numbers = [{"name": r.name, **asdict(r)} for r in runs]
    samples = [{"name": one["name"], "samples": one.pop("samples")} for one in numbers]
    write_json(folder / "results.json", {**facts, "runs": numbers, "notes": sentences})
    write_json(folder / "samples.json", samples)
    console.print(table(runs, facts), key(facts), "", sep="\n")
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False)
    for name in ("report.png", "results.json", "samples.json"):
        console.print(f"{folder / name}", highlight=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value for people and programs to read."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def table(runs: Sequence[Run], facts: Mapping[str, Any]) -> Table:
    """Lay the numbers out, one loss a row."""
    result = Table(
        title=f"Held-out text after {facts['steps']} steps, γ = {facts['gamma']:g}",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("loss", no_wrap=True)
    for header in (
        "NLL",
        "TD²",
        "entropy",
        "Self-\nBLEU",
        "length",
        "cut\n%",
        "loss\nms",
        "loss\nMB",
        "step\nms",
    ):
        result.add_column(header, justify="right")
    for r in runs:
        result.add_row(
            r.name,
            f"{r.nll:.3f}",
            f"{r.td:.2f}",
            f"{r.entropy:.2f}",
            f"{r.self_bleu:.1f}",
            f"{r.length:.1f}",
            f"{100 * r.unfinished:.0f}",
            f"{r.loss_ms:.1f}",
            f"{r.loss_mb:.1f}",
            f"{r.step_ms:.0f}",
        )
    return result


def key(facts: Mapping[str, Any]) -> Table:
    """Say what the columns are."""
    result = Table.grid(padding=(0, 2))
    for columns, meaning in (
        ("NLL, TD², entropy", "means over held-out tokens; TD² is the squared TD residual"),
        (
            "Self-BLEU",
            "BLEU of a sample against the others of its prompt: lower is more diverse; "
            f"{facts['samples']} samples at temperature 1 of each of {facts['prompts']} prompts",
        ),
        (
            "length, cut",
            f"tokens of a sample, and the share of samples cut at {facts['max_new_tokens']}; "
            f"held-out completions have {facts['reference_length']:.1f} tokens",
        ),
        (
            "loss",
            f"forward and backward on {facts['loss_rows']} x {facts['vocab_size']} logits: median "
            "time, and the most memory held beside the logits, gradient included; "
            f"for MLE, the loss that {facts['mle']} comes with",
        ),
        (
            "step",
            f"median time of a training step; device {facts['device']}, threads {facts['threads']}",
        ),
    ):
        result.add_row(columns, meaning)
    return result


def read_the_numbers(runs: Sequence[Run], facts: Mapping[str, Any]) -> list[str]:
    """Say in words what the table shows, and what it does not."""
    return [
        f"Held-out NLL: {extremes(runs, 'nll', '.3f')}.",
        f"Squared TD residual: {extremes(runs, 'td', '.2f')}.",
        f"Self-BLEU: {extremes(runs, 'self_bleu', '.1f')}. Lower is more diverse, but Self-BLEU "
        "also moves with the length of the samples.",
        f"Length of the samples: {extremes(runs, 'length', '.1f')}.",
        f"One seed ({facts['seed']}), {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{facts['held_out']} held-out completions: this shows how to run the comparison. "
        "It does not say which loss is better for a model or data of another size.",
    ]


def extremes(runs: Sequence[Run], measure: str, digits: str) -> str:
    """Name the runs with the lowest and the highest value of a measure."""
    ordered = sorted(runs, key=lambda run: getattr(run, measure))
    low, high = (f"{getattr(run, measure):{digits}}" for run in (ordered[0], ordered[-1]))
    if low == high:
        return f"{low} with every loss"
    return f"lowest with {ordered[0].name} ({low}), highest with {ordered[-1].name} ({high})"


def draw(runs: Sequence[Run], facts: Mapping[str, Any], path: Path) -> None:
    """Draw the learning curves and, beside them, likelihood against diversity."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for run, colour, marker in zip(runs, cycle(COLOURS), cycle(MARKERS), strict=False):
        steps, nll = zip(*run.curve, strict=True)
        left.plot(steps, nll, color=colour, marker=marker, markersize=4, label=run.name)
        right.plot(
            run.self_bleu,
            run.nll,
            color=colour,
            marker=marker,
            markersize=10,
            linestyle="none",
            label=f"{run.name}: {run.length:.1f} tokens",
        )
    left.set(xlabel="fine-tuning step", ylabel="held-out NLL (nats per token)")
    left.set_title("Learning curves", loc="left")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    right.set(xlabel="Self-BLEU (lower: more diverse)", ylabel="held-out NLL (lower: better)")
    right.set_title("Likelihood and diversity", loc="left")
    right.margins(0.25)
    right.legend(title="mean length of the samples", loc="best")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['data']}, one seed",
        x=0.01,
        ha="left",
        fontsize=11,
        color="#666666",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
