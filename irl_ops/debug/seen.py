"""What a set-up was seen to do with a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from irl_ops.options import IQLearnOptions, names_in

BATCH_KEYS = (
    "segment_ids", "position_ids", "cu_seqlens", "where", "truncated", "token_weights",
    "values", "next_values", "num_items",
)  # fmt: skip
"""Options of the loss that belong to a batch, and that a batch may hold."""


class Slopes(NamedTuple):
    """The gradient of the loss by something that has rows: the logits, or the head's input.

    Attributes:
        of: what it is the gradient of.
        found: ``[..., T, D]``.
        expected: the same from a gradient of the logits.
        dtype: in which the set-up computes it.
    """

    of: str
    found: NDArray[np.float32]
    expected: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    dtype: str


@dataclass
class Part:
    """One micro-batch: logits and labels in the set-up's own arrays, and what marks its rows."""

    logits: Any
    labels: Any
    facts: dict[str, Any] = field(default_factory=dict)  # options of the loss, from the batch
    slopes: Slopes | None = None


@dataclass
class Seen:
    """The loss that a set-up gives, and what it gave it for.

    Attributes:
        found: the loss, summed over micro-batches as a step adds them up.
        dtype: of the loss.
        parts: the micro-batches.
        defaults: the options that the set-up itself was given.
        shift: whether labels are shifted in a set-up of this kind.
        num_items: the N that the set-up was given, None without one.
        world_size: its ranks.
        scale: by what it multiplies the loss, behind the division by N.
        recomputed: the logits are those of another forward, and so rounded otherwise.
    """

    found: float
    dtype: str
    parts: list[Part]
    defaults: dict[str, Any] = field(default_factory=dict)
    shift: bool = False
    num_items: float | None = None
    world_size: int = 1
    scale: float = 1.0
    recomputed: bool = False


def known_options() -> list[str]:
    """The names of the options that a loss is checked with."""
    left_out = ("inplace", "backend")
    return [name for name in names_in(IQLearnOptions) if name not in left_out]
