"""What a loss is divided by, and the mistakes that are made there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from irl_ops.debug.report import Place
from irl_ops.debug.rows import Summed


class Counts(NamedTuple):
    """What a step knows of its size.

    Attributes:
        num_items: N; None for the weights of the labelled rows.
        summed: whether the loss is a sum, and N is 1.
        world_size: the number of ranks, 1 where it is unknown.
        steps: the number of micro-batches of a step, likewise.
        scale: what the loss is multiplied by behind the division, such as the ranks, whose mean
            DDP takes.
    """

    num_items: float | None
    summed: bool
    world_size: int
    steps: int
    scale: float


class Share(NamedTuple):
    """A way to come from the rows' losses to a number; ``place`` is None for the right one."""

    place: Place | None
    words: str
    of: Callable[[list[Summed]], float]


def right(counts: Counts) -> Share:
    """The sum over all micro-batches, divided by N."""
    return Share(None, "", lambda parts: counts.scale * _sum(parts) / _n(counts, parts))


def wrong(counts: Counts, parts: list[Summed]) -> Iterator[Share]:
    """The others that a step like this can show."""
    exact, n = right(counts).of, _n(counts, parts)
    own = sum(float(p.weights.sum()) for p in parts)
    if counts.summed:
        yield Share(
            "normaliser",
            f"the loss is a mean over {own:g} labels, and should be a sum",
            lambda p: exact(p) / _labels(p),
        )
    else:
        yield Share(
            "normaliser",
            f"the loss is a sum, not divided by N = {n:g}",
            lambda p: exact(p) * _n(counts, p),
        )
        yield Share(
            "normaliser",
            f"a mean is divided by N = {n:g} once more",
            lambda p: exact(p) / _n(counts, p),
        )
        yield Share(
            "normaliser",
            f"the mean over the batch's own {own:g} labels is divided by N = {n:g} once more",
            lambda p: counts.scale * _sum(p) / _labels(p) / _n(counts, p),
        )
    rows = [p.losses.size for p in parts]
    yield Share(
        "normaliser",
        f"the sum is divided by all {sum(rows)} rows, those without a label too",
        lambda p: counts.scale * _sum(p) / _rows(p),
    )
    yield Share(
        "normaliser",
        "the sum is divided by the rows of sliced sequences, those without a label too",
        lambda p: counts.scale * _sum(p) / max(1, _rows(p) - _sequences(p)),
    )
    yield Share(
        "normaliser",
        "the sum is divided by the number of sequences",
        lambda p: counts.scale * _sum(p) / _sequences(p),
    )
    yield Share(
        "normaliser",
        "each sequence is averaged by itself, and the means are averaged",
        lambda p: counts.scale * float(np.mean([x for part in p for x in _means(part)])),
    )
    if len(parts) > 1:
        yield Share(
            "accumulation",
            f"each of the {len(parts)} micro-batches is divided by its own number of labels, and "
            "the means are summed: divide by num_items, that of all of them",
            lambda p: counts.scale * sum(_sum([part]) / _labels([part]) for part in p),
        )
        yield Share(
            "accumulation",
            f"the means of {len(parts)} micro-batches are averaged, though they have different "
            "numbers of labels: divide by num_items, that of all of them",
            lambda p: counts.scale * sum(_sum([x]) / _labels([x]) for x in p) / len(p),
        )
    elif not counts.summed and own != n:
        yield Share(
            "normaliser",
            f"the sum is divided by the batch's own {own:g} labels, not by num_items = {n:g}",
            lambda p: counts.scale * _sum(p) / _labels(p),
        )
    yield from _factors(counts, exact)


def _factors(counts: Counts, exact: Callable[[list[Summed]], float]) -> Iterator[Share]:
    several: tuple[tuple[Place, int, str], ...] = (
        ("ranks", counts.world_size, f"the number of ranks ({counts.world_size})"),
        ("accumulation", counts.steps, f"the number of micro-batches ({counts.steps})"),
    )
    for place, number, name in several:
        if number > 1:
            yield Share(
                place,
                f"the loss is multiplied by {name} once too often",
                _times(exact, number),
            )
            yield Share(
                place,
                f"the loss is divided by {name} once too often",
                _times(exact, 1 / number),
            )
    if counts.world_size > 1:
        yield Share(
            "ranks",
            "each rank divides by its own number of labels, and their means are averaged: divide "
            "by num_items, that of all ranks",
            lambda p: _sum(p) / _labels(p),
        )


def _times(
    exact: Callable[[list[Summed]], float], factor: float
) -> Callable[[list[Summed]], float]:
    return lambda parts: factor * exact(parts)


def _sum(parts: list[Summed]) -> float:
    return float(sum(part.losses.sum() for part in parts))


def _labels(parts: list[Summed]) -> float:
    return float(sum(part.weights.sum() for part in parts)) or 1.0


def _n(counts: Counts, parts: list[Summed]) -> float:
    if counts.summed:
        return 1.0
    return _labels(parts) if counts.num_items is None else counts.num_items or 1.0


def _rows(parts: list[Summed]) -> int:
    return sum(part.losses.size for part in parts)


def _sequences(parts: list[Summed]) -> int:
    return sum(part.losses.size // part.losses.shape[-1] for part in parts)


def _means(part: Summed) -> list[float]:
    """Of the sequences that have labels; of all, where none has."""
    losses, weights = (x.reshape(-1, x.shape[-1]).sum(-1) for x in part)
    found: list[float] = (losses[weights > 0] / weights[weights > 0]).tolist()
    return found or [0.0]
