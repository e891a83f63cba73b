"""Times several pieces of work against a floor, in the same moments.

On a shared machine the seconds of one run mean little, and contestants timed one after the other
meet different machines. So each round times every contestant once, in an order drawn anew (memory
that a neighbour has just freed is cheaper to get), and a contestant is judged by the median over
rounds of its time divided by the floor's in the same round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """``prepare`` is not timed; what it returns is passed to ``run``, which is."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Result:
    """Milliseconds of a contestant, and its ratios to the floors."""

    name: str
    median_ms: float
    best_ms: float
    ratios: dict[str, float]


class Contest:
    """Rounds are played by calling it; the first ``warmup`` calls are not kept."""

    def __init__(self, contestants: list[Contestant], warmup: int = 2) -> None:
        self.contestants, self.warmup, self.rounds = contestants, warmup, 0
        self.order = random.Random(0)
        self.seconds: dict[str, list[float]] = {c.name: [] for c in contestants}

    def __call__(self) -> None:
        """One round."""
        for contestant in self.order.sample(self.contestants, len(self.contestants)):
            prepared = contestant.prepare()
            begin = time.perf_counter()
            kept = contestant.run(prepared)
            elapsed = time.perf_counter() - begin
            del kept, prepared  # freeing memory is nobody's time
            if self.rounds >= self.warmup:
                self.seconds[contestant.name].append(elapsed)
        self.rounds += 1

    def results(self, floors: list[str]) -> list[Result]:
        """One result a contestant; the ratios are medians over rounds."""
        out = []
        for name, seconds in self.seconds.items():
            ratios = {
                floor: statistics.median(
                    a / b for a, b in zip(seconds, self.seconds[floor], strict=True)
                )
                for floor in floors
            }
            milliseconds = [1e3 * s for s in seconds]
            out.append(Result(name, statistics.median(milliseconds), min(milliseconds), ratios))
        return out
