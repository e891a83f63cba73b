"""Scores to look at: rewards as the colour of the text (Fig. 8), and a histogram."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

LOW, HIGH = (33, 102, 172), (217, 95, 2)  # blue and orange, which the colour-blind tell apart
BARS = 16
WIDTH = 40  # of the longest bar


def scale_of(records: Sequence[Mapping[str, Any]]) -> float:
    """The size of reward that is drawn in full colour: nine of ten tokens have less."""
    rewards = [abs(r) for record in records for r in record["per_token"]["reward"]]
    return float(np.quantile(rewards, 0.9)) or 1.0 if rewards else 1.0


def answer_text(record: Mapping[str, Any], scale: float) -> Text:
    """An answer whose tokens have their rewards as background."""
    text = Text()
    tokens = record["per_token"]
    for piece, reward in zip(tokens["piece"], tokens["reward"], strict=True):
        shown = piece.replace("\n", "\u21b5\n") or "\u2205"
        text.append(shown, style=colour(reward, scale))
    return text


def colour(reward: float, scale: float) -> str:
    """White at 0, blue below, orange above."""
    strength = min(abs(reward) / scale, 1.0)
    end = HIGH if reward > 0 else LOW
    red, green, blue = (round(255 + strength * (x - 255)) for x in end)
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 128
    return f"{'white' if dark else 'black'} on rgb({red},{green},{blue})"


def answers(records: Sequence[Mapping[str, Any]], gamma: float) -> Group:
    """Answers in colour, each under its sums, and what the colours mean."""
    scale = scale_of(records)
    parts: list[Text] = []
    for record in records:
        parts.append(
            Text(
                f"line {record['line']}"
                + (f", sample {record['sample']}" if "sample" in record else "")
                + f": reward {record['reward']:.2f}, discounted {record['discounted_reward']:.2f}, "
                f"log-likelihood {record['logprob']:.2f}, V(start) {record['value']:.2f}"
                + ("" if record["finished"] else ", not finished"),
                style="bold",
            )
        )
        parts += [answer_text(record, scale), Text()]
    key = Text("reward of a token at \u03b3 = ")
    key.append(f"{gamma:g}: ")
    for part in (-1.0, -0.5, 0.0, 0.5, 1.0):
        key.append(f" {part * scale:.2g} ", style=colour(part * scale, scale))
    return Group(*parts, key)


def histogram(name: str, values: Sequence[float]) -> Table:
    """How values are spread, as bars."""
    table = Table(title=f"{name}, {len(values)} answers", box=None, pad_edge=False)
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    table.add_column("answers", justify="right")
    table.add_column("")
    counts, edges = np.histogram(values, bins=min(BARS, max(1, len(set(values)))))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "\u2588" * round(WIDTH * count / max(counts.max(), 1))
        table.add_row(f"{low:.4g}", f"{high:.4g}", str(count), bar)
    return table


def write_html(path: Path, *shown: Any) -> None:
    """What would be printed, as a page."""
    console = Console(record=True, file=io.StringIO(), width=100, color_system="truecolor")
    for one in shown:
        console.print(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(console.export_html(), encoding="utf-8")
