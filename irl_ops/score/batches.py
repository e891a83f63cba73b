"""Batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def by_length(
    items: Sequence[T], length: Callable[[T], int], most: int
) -> Iterator[list[tuple[int, T]]]:
    """Items of like length together, with their places; the longest come first.

    Args:
        items: in any order.
        length: tokens of an item.
        most: tokens of a batch, padding included. An item that is longer has a batch of its own.
    """
    order = sorted(enumerate(items), key=lambda pair: -length(pair[1]))
    while order:
        take = max(1, most // max(1, length(order[0][1])))
        yield order[:take]
        del order[:take]
