"""What a whole call of a loss gives, in every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """The gradient of the logits is not among it: that was written where it was asked for."""

    loss: Tensor  # float32, 0-d; [..., T] for reduction "none"
    dvalues: Tensor | None  # [..., T], where ``values`` were given and a gradient was asked for
    dnext_values: Tensor | None
    metrics: dict[str, Tensor] | None  # as algebra.metrics, where they are wanted
