"""What the demo says: a progress bar, a table, and sentences made from the numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from figure import draw
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table
from run_record import Run


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
    """Lay the numbers out, one row per loss."""
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
        "loss ms\n(quartiles)",
        "loss\nMB",
        "step\nms",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    for r in runs:
        low, high = r.loss_ms_quartiles
        result.add_row(
            r.name,
            f"{r.nll:.3f}",
            f"{r.td:.2f}",
            f"{r.entropy:.2f}",
            f"{r.self_bleu:.1f}",
            f"{r.length:.1f}",
            f"{100 * r.unfinished:.0f}",
            f"{r.loss_ms:.3g} ({low:.3g}-{high:.3g})",
            f"{r.loss_mb:.1f}",
            f"{r.step_ms:.0f}",
        )
    result.add_row(
        "held-out text",
        *4 * [""],
        f"{facts['reference_length']:.1f}",
        f"{100 * facts['reference_cut']:.0f}",
        style="dim",
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
            "the last row has held-out completions, cut at the same length",
        ),
        (
            "loss",
            f"forward and backward on {facts['loss_rows']} x {facts['vocab_size']} logits: median "
            "and quartiles of the time, and the most memory held beside the logits, gradient "
            "included; "
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
        f"Length of the samples: {extremes(runs, 'length', '.1f')}; held-out completions "
        f"{facts['reference_length']:.1f}.",
        f"Self-BLEU: {extremes(runs, 'self_bleu', '.1f')}. Lower is more diverse, but Self-BLEU "
        "also moves with the length of the samples: compare losses of like length only.",
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
