"""What is known of one fine-tuning run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """A point of the learning curves: held-out means after so many steps."""

    step: int
    nll: float
    td: float  # squared TD residual


class Spread(NamedTuple):
    """Repeated measurements of one thing."""

    median: float
    quartiles: tuple[float, float]


@dataclass
class Run:
    """One fine-tuning run and what was measured on it."""

    lam: float
    curve: list[Point]
    nll: float
    td: float
    entropy: float
    self_bleu: float
    length: float
    unfinished: float  # share of the samples that were cut at the longest length
    step_ms: float
    samples: dict[str, list[str]]  # by prompt
    loss_ms: float = 0.0
    loss_ms_quartiles: tuple[float, float] = (0.0, 0.0)
    loss_mb: float = 0.0
    model: str | None = None  # where it was saved
    value_head: bool = False  # V is that of a head, not of the logits

    @property
    def name(self) -> str:
        """What the run is called in the table and the figure."""
        if not self.lam:
            return "MLE"
        return f"IQLearn λ={self.lam:g}" + (" head" if self.value_head else "")


def spread(values: Sequence[float]) -> Spread:
    """Summarise repeated measurements, at least two of them."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, (low, high))
