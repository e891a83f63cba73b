"""What the demo shows: a progress bar, a table, a figure, and sentences made from the numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    console.print(table(runs, facts))
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
        caption=(
            "NLL, TD² (the squared TD residual) and entropy: means over the held-out tokens. "
            f"Self-BLEU (BLEU of a sample against the others of its prompt; lower is more diverse) "
            f"and length: {facts['samples']} samples at temperature 1 of each of "
            f"{facts['prompts']} prompts, cut at {facts['max_new_tokens']} tokens; reference "
            f"completions have {facts['reference_length']:.1f}. Loss: forward and backward on "
            f"{facts['loss_rows']} x {facts['vocab_size']} logits, median; memory held at most "
            "beside the logits. MLE is the loss that Transformers comes with."
        ),
        caption_justify="left",
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
            f"{r.loss_ms:.1f}",
            f"{r.loss_mb:.1f}",
            f"{r.step_ms:.0f}",
        )
    return result


def read_the_numbers(runs: Sequence[Run], facts: Mapping[str, Any]) -> list[str]:
    """Say in words what the table shows, and what it does not."""
    best = min(runs, key=lambda r: r.nll)
    worst = max(runs, key=lambda r: r.nll)
    diverse = min(runs, key=lambda r: r.self_bleu)
    small = min(runs, key=lambda r: r.td)
    short = min(runs, key=lambda r: r.length)
    long = max(runs, key=lambda r: r.length)
    said = []
    if len(runs) > 1:
        said = [
            f"Held-out NLL is lowest with {best.name} ({best.nll:.3f}) and highest with "
            f"{worst.name} ({worst.nll:.3f}).",
            f"The TD residual is smallest with {small.name} ({small.td:.2f} squared, on average).",
            f"Self-BLEU is lowest, that is samples differ most, with {diverse.name} "
            f"({diverse.self_bleu:.1f}). Samples have {short.length:.1f} ({short.name}) to "
            f"{long.length:.1f} ({long.name}) tokens; Self-BLEU moves with length as well.",
        ]
    return [
        *said,
        f"One seed ({facts['seed']}), {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{facts['held_out']} held-out completions: this shows how to run the comparison. "
        "It does not say which loss is better for a model or data of another size.",
    ]


def draw(runs: Sequence[Run], facts: Mapping[str, Any], path: Path) -> None:
    """Draw the learning curves and, beside them, likelihood against diversity."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for r, colour in zip(runs, COLOURS * len(runs), strict=False):
        steps, nll = zip(*r.curve, strict=True)
        left.plot(steps, nll, color=colour, marker="o", markersize=3.5, label=r.name)
        right.plot(r.self_bleu, r.nll, color=colour, marker="o", markersize=9, linestyle="none")
        right.annotate(
            f"{r.name}\n{r.length:.0f} tokens",
            (r.self_bleu, r.nll),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    left.set(xlabel="fine-tuning step", ylabel="held-out NLL (nats a token)")
    left.set_title("Learning curves", loc="left")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    right.set(xlabel="Self-BLEU (left: samples differ more)", ylabel="held-out NLL (down: better)")
    right.set_title("Likelihood and diversity, with mean length of the samples", loc="left")
    right.margins(x=0.35, y=0.25)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)
