"""The pass over logits that are never whole: chunks of rows, from the last to the first.

Per chunk one matrix product makes the logits, the row kernel overwrites them with their gradient,
and two matrix products take that back to hidden and weight. Going backwards, the value of the row
behind a chunk is always known. Beside inputs and gradients one chunk of logits is stored.

Statistics alone need no whole rows: they come from tiles of many rows and few columns, as large as
a chunk, and are merged as those of a sharded vocabulary. Products of few rows are slow, since each
reads the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import NO_LABEL, Coefficients, Finished, RowStatistics
from irl_ops.kernels import reference
from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.readout import Readout
from irl_ops.torch import pool
from irl_ops.torch.linear_arguments import Layer

NARROWEST = 4096
"""Columns of a tile, at least: what is done for each tile and row is little beside them."""
TILE_BYTES = 2**25  # on a CPU: more are no faster
ALIGNED = 128  # columns: rows of every dtype then begin where the widest loads can
PIECE = 2048
"""Columns of one product of float32 on a CPU: their logits and weights stay in the caches."""


class Linear:
    """``layer.hidden`` has shape ``[n, D]``: rows whose next row is the next one.

    ``total``, where given, is what the gradient of the weight is added to.
    """

    def __init__(
        self,
        kernels: ModuleType,
        layer: Layer,
        wanted: tuple[bool, bool, bool],
        total: Tensor | None = None,
    ) -> None:
        self.kernels, self.layer = kernels, layer
        self.readout = Readout(1.0, layer.softcap).keywords  # the products scale
        hidden, weight, bias = layer[:3]
        own = layer.sums == "weight" or weight.dtype in (torch.float32, torch.float64)
        sums = weight.dtype if own else torch.float32
        self.dhidden = torch.empty_like(hidden) if wanted[0] else None
        self.dweight, self.blank = total, False
        if wanted[1] and total is None:
            # The first chunk's product can be written where those of others are added.
            self.blank = sums == weight.dtype and hidden.shape[0] > 0
            self.dweight = (
                pool.empty_like(weight) if self.blank else torch.zeros_like(weight, dtype=sums)
            )
        self.dbias = None
        if bias is not None and wanted[2]:
            self.dbias = torch.zeros_like(bias, dtype=sums)

    def label_logit(self, labels: Tensor) -> Tensor:
        """q[a] by a product of two vectors, in float32: not rounded as the logits are."""
        hidden, weight, bias = self.layer[:3]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        safe = labels.where((labels >= 0) & (labels < weight.shape[0]), 0)
        picked = torch.cat(
            [
                (hidden[rows].to(dtype) * weight[safe[rows]].to(dtype)).sum(-1)
                for rows in self.windows()
            ]
            or [hidden.new_empty(0, dtype=dtype)]
        )
        picked = picked if bias is None else picked + bias[safe].to(dtype)
        q: Tensor = reference.capped(picked, self.layer.scale, self.layer.softcap)
        q = q.where(labels != NO_LABEL, 0.0)
        return q.where(labels < weight.shape[0], math.nan)

    def stats_grad(self, labels: Tensor, given: Coefficients, finish: Any) -> tuple[None, Finished]:
        """The gradients are left in ``dhidden``, ``dweight`` and ``dbias``."""
        done: list[Finished] = []
        behind: Tensor | float = 0.0
        for rows, logits in self.chunks():
            part = Coefficients(*(None if x is None else x[rows] for x in given))
            mine, picked, *found = self.row_stats_grad(logits, labels[rows], part)
            done.insert(0, finish(Window(rows), *found[:2], picked, found[2], behind))
            behind = done[0].stats.value[:1]
            if logits.shape[-1]:
                self.kernels.set_label_(logits, mine, done[0].element, picked, **self.readout)
            self.back(rows, logits)
        if not done:
            nothing = labels.new_empty(0, dtype=given.alpha.dtype)
            entropy = None if given.entropy_weight is None else nothing
            done = [finish(Window(slice(0, 0)), nothing, nothing, nothing, entropy, 0.0)]
        return None, joined(done)

    def row_stats_grad(
        self, logits: Tensor, labels: Tensor, given: Coefficients
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """``(labels, q[a], row_max, logsum, entropy)`` of a chunk, labels as the kernels take them.

        The logits are overwritten by their gradient, but for the element at the label.
        """
        picked = self.kernels.label_logit(logits, labels, **self.readout)
        found = self.kernels.row_stats_grad(logits, *given, logits, **self.readout)
        return labels, picked, *found

    def row_stats(self, labels: Tensor, entropy: bool) -> RowStatistics:
        """The statistics of all rows, of which there is one or more; no gradient."""
        done, vocab = [], self.layer.weight.shape[0]
        for rows, tiles in self.tiles():
            found = []
            for start, logits in tiles:
                mine = algebra.labels_here(xp, labels[rows], start, logits.shape[-1])
                read = self.kernels.row_stats(logits, mine, entropy, **self.readout)
                found.append(RowStatistics(*read))
            done.append(algebra.merge(xp, labels[rows], stacked(found), vocab))
        statistics: RowStatistics = joined(done)
        return statistics

    def row_grad(self, labels: Tensor, *vectors: Tensor) -> None:
        """The gradients of what has that gradient by the logits: see the row kernel."""
        for rows, logits in self.chunks():
            part = (x[rows] for x in vectors)
            self.kernels.row_grad(logits, labels[rows], *part, logits, **self.readout)
            self.back(rows, logits)

    def row_measures(self, ids: Tensor, wanted: tuple[str, ...], view: Any) -> RowMeasures:
        """The measures of all rows, of which there is one or more; no gradient."""
        done, vocab = [], self.layer.weight.shape[0]
        for rows, tiles in self.tiles():
            found = []
            for start, logits in tiles:
                mine = algebra.labels_here(xp, ids[rows], start, logits.shape[-1])
                part = view.part(rows, slice(start, start + logits.shape[-1]))
                read = self.kernels.row_measures(
                    logits, mine, wanted, **part._asdict(), **self.readout
                )
                top = None if read.top1 is None else read.top1 + start
                found.append(read._replace(top1=top))
            done.append(algebra.merge_measures(xp, ids[rows], stacked(found), vocab))
        measures: RowMeasures = joined(done)
        return measures

    def row_measures_grad(
        self, ids: Tensor, row_max: Tensor, logsum: Tensor, slopes: Slopes, view: Any
    ) -> None:
        """The gradients of what has these slopes by the measures."""
        for rows, logits in self.chunks():
            part = Slopes(*(None if x is None else x[rows] for x in slopes))
            self.kernels.row_measures_grad(
                logits, ids[rows], row_max[rows], logsum[rows], part, logits,
                **view.part(rows)._asdict(), **self.readout,
            )  # fmt: skip
            self.back(rows, logits)

    def windows(self) -> Iterator[slice]:
        """Chunks of rows of nearly one size, in order."""
        count = self.layer.hidden.shape[0]
        chunks = -(-count // self.layer.chunk)
        size = -(-count // max(chunks, 1))
        for start in range(0, count, max(size, 1)):
            yield slice(start, min(start + size, count))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, scaled and not capped; from the last to the first."""
        windows = list(self.windows())
        if not windows:
            return
        buffer = pool.new_empty(self.layer.hidden, windows[0].stop, self.layer.weight.shape[0])
        for rows in reversed(windows):
            logits = buffer[: rows.stop - rows.start]
            self.product(rows, slice(None), logits)
            yield rows, logits

    def tiles(self) -> Iterator[tuple[slice, Iterator[tuple[int, Tensor]]]]:
        """Rows, and for each tile of theirs its first column and its logits, as in ``chunks``."""
        hidden, vocab = self.layer.hidden, self.layer.weight.shape[0]
        count, elements = hidden.shape[0], self.layer.chunk * vocab
        if hidden.device.type == "cpu":
            elements = min(elements, max(TILE_BYTES // hidden.itemsize, vocab))
        width = min(vocab, max(elements // count, NARROWEST))
        if width < vocab:  # tiles of nearly one size, whose rows are aligned
            width = max(width // ALIGNED, 1) * ALIGNED
            parts = -(-vocab // width)
            width = -(-vocab // parts // ALIGNED) * ALIGNED
        height = min(count, max(elements // width, 1))
        buffer = hidden.new_empty(height * width)

        def across(rows: slice) -> Iterator[tuple[int, Tensor]]:
            for start in range(0, vocab, width):
                columns = slice(start, min(start + width, vocab))
                shape = rows.stop - rows.start, columns.stop - start
                logits = buffer[: shape[0] * shape[1]].view(shape)
                self.product(rows, columns, logits)
                yield start, logits

        for first in range(0, count, height):
            rows = slice(first, min(first + height, count))
            yield rows, across(rows)

    def product(self, rows: slice, columns: slice, logits: Tensor) -> None:
        """Writes the logits of some rows and columns."""
        hidden, weight, bias, _, _, scale, _ = self.layer
        hidden, weight = hidden[rows], weight[columns]
        bias = None if bias is None else bias[columns]
        for part in pieces(logits):
            into, factor = logits[:, part], weight[part].t()
            if bias is None and scale == 1:
                torch.mm(hidden, factor, out=into)
            else:
                start = into if bias is None else bias[part]
                beta = 0 if bias is None else scale
                torch.addmm(start, hidden, factor, beta=beta, alpha=scale, out=into)

    def back(self, rows: slice, dlogits: Tensor) -> None:
        """Two products take a chunk's gradient back to hidden and weight."""
        hidden, weight, _, _, _, scale, _ = self.layer
        if self.dhidden is not None:
            into = self.dhidden[rows]
            torch.addmm(into, dlogits, weight, beta=0, alpha=scale, out=into)
        if self.dweight is not None:
            if self.dweight.dtype == dlogits.dtype:
                beta = 0 if self.blank else 1
                self.dweight.addmm_(dlogits.t(), hidden[rows], beta=beta, alpha=scale)
                self.blank = False
            else:
                self.dweight.add_(dlogits.t() @ hidden[rows], alpha=scale)
        if self.dbias is not None:
            # a product with ones: a sum over rows reads columns, which takes several times as long
            ones = dlogits.new_full((1, dlogits.shape[0]), scale)
            self.dbias.add_((ones @ dlogits)[0])


def pieces(logits: Tensor) -> Iterator[slice]:
    """The columns whose products are computed one after the other; of one size but for the last."""
    columns = logits.shape[-1]
    small = logits.device.type == "cpu" and logits.dtype == torch.float32
    size = PIECE if small else max(columns, 1)
    for start in range(0, columns, size):
        yield slice(start, min(start + size, columns))


class Window:
    """Takes the window's rows out of a vector; None stays None."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows

    def __call__(self, x: Any) -> Any:
        """``x[rows]``."""
        return None if x is None else x[self.rows]


def joined(done: list[Any]) -> Any:
    """Records of windows as one record of all rows."""
    first = done[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(done)
    return type(first)(*(joined(list(field)) for field in zip(*done, strict=True)))


def stacked(shards: list[Any]) -> Any:
    """Records of shards as one record, along a new axis 0."""
    fields = (
        None if any(x is None for x in field) else torch.stack(field)
        for field in zip(*shards, strict=True)
    )
    return type(shards[0])(*fields)


def returned(hidden: Tensor, *gradients: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What an operator returns: gradients in hidden's dtype, empty ones for those that are None."""
    a, b, c = (hidden.new_empty(0) if x is None else x.to(hidden.dtype) for x in gradients)
    return a, b, c


def like_gradients(layer: Any, asked: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the types that ``returned`` gives for hidden, weight and bias."""
    a, b, c = (
        torch.empty_like(x) if x is not None and wanted else layer[0].new_empty(0)
        for x, wanted in zip(layer, asked, strict=True)
    )
    return a, b, c
