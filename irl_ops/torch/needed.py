"""The rows of a linear layer that somebody needs; the others meet no matrix product."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import BOOTSTRAP, IGNORED


def needed(kind: Tensor) -> Tensor:
    """Rows that have a label, or that the row before bootstraps from.

    In what is left, row t + 1 is still the next row of every row that bootstraps.
    """
    rows: Tensor = (kind != IGNORED) | algebra.preceding(xp, kind == BOOTSTRAP, False)
    return rows


class Selection:
    """Some of the rows of arrays, in the rows' order; all of them where ``rows`` is None.

    The number of True in ``rows`` becomes a shape: the host waits for a device.
    """

    def __init__(self, rows: Tensor | None) -> None:
        self.count = 0 if rows is None else rows.numel()
        self.index = None if rows is None else rows.flatten().nonzero()[:, 0]
        if self.index is not None and self.index.numel() == self.count:
            self.index = None  # all: nothing is copied

    def take(self, x: Any) -> Any:
        """The chosen rows of ``[n, ...]``; None stays None."""
        return x if x is None or self.index is None else x[self.index]

    def spread(self, x: Tensor) -> Tensor:
        """``[n, ...]`` from the chosen rows, 0 in the others."""
        if self.index is None:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_copy_(0, self.index, x)
