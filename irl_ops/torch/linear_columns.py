"""The pass over logits that are never stored, of whose columns this process has a part.

Each chunk is read while its logits are there: its statistics are merged with those of the other
processes by a collective of the chunk's, and its gradient is written and multiplied back before the
next chunk's logits take their place. So the logits are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from irl_ops.algebra import Coefficients, RowStatistics, no_columns
from irl_ops.torch import collectives, ops
from irl_ops.torch.chunks import Linear
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.shards import Reading, labels_of, whole_rows

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def without_padding(
    weight: Tensor, bias: Tensor | None, how: Reading
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the columns here; views."""
    width = weight.shape[0] if how.columns is None else how.columns.width
    return weight[:width], None if bias is None else bias[:width]


def padded(x: Tensor | None, rows: int) -> Tensor | None:
    """With 0 where the weight has padding."""
    if x is None or x.shape[0] == rows:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - x.shape[0]))


def layer_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    asked: list[bool],
    total: Tensor | None,
    how: Reading,
    compute: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor | None, ...]],
) -> Three:
    """The gradients by hidden, weight and bias, those that are asked; one collective, of hidden's.

    ``compute(weight, bias, total)`` gives them for the columns here, without padding; with a
    ``total`` it adds that of weight to it.
    """
    mine, own_bias = without_padding(weight, bias, how)
    if mine.shape[0]:
        found = compute(mine, own_bias, None if total is None else total[: mine.shape[0]])
    else:
        given = (hidden, mine, own_bias)
        found = tuple(None if x is None else torch.zeros_like(x) for x in given)
    dhidden, dweight, dbias = (x if wish else None for x, wish in zip(found, asked, strict=True))
    if dhidden is not None and how.columns is not None:
        dist.all_reduce(dhidden, group=how.columns.group)
    dweight = None if total is not None else padded(dweight, weight.shape[0])
    return dhidden, dweight, padded(dbias, weight.shape[0])


class LinearColumns(Linear):
    """As ``Linear``; ``layer.weight`` has the columns here that are no padding, maybe none.

    ``dhidden`` is the part of these columns.

    Attributes:
        count: how many columns the whole vocabulary has; None before a chunk was read.
    """

    def __init__(
        self,
        kernels: ModuleType,
        layer: Layer,
        wanted: tuple[bool, bool, bool],
        how: Reading,
        td: bool,
    ) -> None:
        super().__init__(kernels, layer, wanted)
        assert how.columns is not None
        self.how, self.columns, self.td = how, how.columns, td
        self.count: int | Tensor | None = None

    def label_logit(self, labels: Tensor) -> Tensor:
        """q[a] of whole rows; one collective, which settles the size of the chunks as well.

        By default that follows the width of the weight on a CPU, and shards may be uneven.
        """
        hidden, mine = self.layer.hidden, labels_of(labels, self.columns)
        q = torch.zeros_like(ops.row_vector(hidden))
        if self.td and self.columns.width:
            q = super().label_logit(mine)
        sent = q if self.td else q[:0]
        words, (shards,) = collectives.gather(self.columns.group, (self.layer.chunk,), [sent])
        if words.device.type == "cpu":
            self.layer = self.layer._replace(chunk=int(words.min()))
        return shards.sum(0) if self.td else q  # one term is not 0

    def row_stats_grad(
        self, logits: Tensor, labels: Tensor, given: Coefficients
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """As that of ``Linear``, with the statistics of whole rows between; one collective."""
        mine, entropy = labels_of(labels, self.columns), given.entropy_weight is not None
        found = no_columns(xp, ops.row_vector(logits), entropy)
        if self.columns.width:
            found = RowStatistics(*self.kernels.row_stats(logits, mine, entropy, **self.readout))
        whole, self.count = whole_rows(found, labels, self.how)
        unread = given.alpha == -torch.inf  # rows that nobody needs, NaN or not
        row_max, logsum, picked = (x.masked_fill(unread, 0.0) for x in whole[:3])
        h: Tensor | None = None
        a = given.alpha.masked_fill(unread, 0.0)
        beta, b = given.beta.masked_fill(unread, 0.0), torch.zeros_like(a)
        a = a + torch.where(beta != 0, beta * (row_max + logsum), 0.0)
        if given.entropy_weight is not None and whole.entropy is not None:
            h = whole.entropy.masked_fill(unread, 0.0)
            b = given.entropy_weight.masked_fill(unread, 0.0)
            a = a + torch.where(b != 0, b * h, 0.0)
        if self.columns.width:
            none = torch.zeros_like(a)  # the element at the label is written afterwards
            self.kernels.row_grad(logits, mine, row_max, logsum, a, b, none, logits, **self.readout)
        return mine, picked, row_max, logsum, h
