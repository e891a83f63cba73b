"""Rows that are cut among processes: gathered in the order of the sequence, and taken back."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor

from irl_ops.algebra import in_order, rows_at
from irl_ops.torch import collectives
from irl_ops.torch.parallel import Cut


class Gather(torch.autograd.Function):
    """Arrays of the whole axis from those of every rank; one collective.

    The gradient of what comes out is summed over ranks where each has a loss of its own, whose sum
    is meant (``own_losses``): one more collective. Where all ranks compute the same loss, each
    takes the part of its rows, and nothing crosses.
    """

    @staticmethod
    def forward(
        ctx: Any, cut: Cut, word: int, own_losses: bool, axes: tuple[int, ...], *arrays: Tensor
    ) -> tuple[Tensor, ...]:
        """``(words, order, *arrays)``: the last as they are in the whole, order as it came."""
        axes = (*axes, -1) if cut.order is not None else axes
        given = arrays if cut.order is None else (*arrays, cut.order)
        ragged = cut.sizes is not None and len(set(cut.sizes)) > 1
        if ragged:
            assert cut.sizes is not None
            longest = max(cut.sizes)
            given = tuple(_padded(x, k, longest) for x, k in zip(given, axes, strict=True))
        words, stacked = collectives.gather(cut.group, (word,), given)
        sizes = cut.sizes if ragged else None
        whole = [_joined(x, axis, sizes) for x, axis in zip(stacked, axes, strict=True)]
        order = whole.pop() if cut.order is not None else None
        if order is not None:
            whole = [in_order(xp, x, order) for x in whole]
        ctx.cut, ctx.own_losses, ctx.axes = cut, own_losses, axes
        order = words.new_empty(0) if order is None else order
        fixed = [x for x in (words, order, *whole) if not x.dtype.is_floating_point]
        ctx.mark_non_differentiable(*fixed)
        return words, order, *whole

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Tensor | None, ...]:
        """Of every array the gradient of the rows that are here."""
        gradients: list[Tensor | None] = [None] * len(above[2:])
        given = [(i, x) for i, x in enumerate(above[2:]) if ctx.needs_input_grad[4 + i]]
        whole = [x for _, x in given]
        if ctx.own_losses and whole:
            whole = collectives.summed(ctx.cut.group, whole)
        for (i, _), x in zip(given, whole, strict=True):
            gradients[i] = own(ctx.cut, x, ctx.axes[i])
        return *[None] * 4, *gradients


def own(cut: Cut, whole: Tensor, axis: int) -> Tensor:
    """The rows that are here, of an array of the whole axis."""
    if cut.order is not None:
        rows: Tensor = rows_at(xp, whole, cut.order.long())
        return rows
    rank, ranks = dist.get_rank(cut.group), dist.get_world_size(cut.group)
    sizes = cut.sizes or (whole.shape[axis] // ranks,) * ranks
    return whole.narrow(axis, sum(sizes[:rank]), sizes[rank])


def is_contiguous(cut: Cut) -> bool:
    """Whether every rank has rows, and the next rank those behind them."""
    return cut.order is None and all(cut.sizes or (1,))


def next_labels(cuts: tuple[Cut, ...], labels: Tensor, ignore_index: int) -> Tensor:
    """``labels[..., t + 1]`` of all rows here: the last one's is the first of the next rank.

    Behind the last row of the whole is ``ignore_index``. A row may get that of another segment.
    """
    behind = torch.full_like(labels[..., :1], ignore_index)
    for cut in cuts:
        if cut.axis == -1:
            first = collectives.from_next(cut.group, labels[..., :1])
            if dist.get_rank(cut.group) + 1 < dist.get_world_size(cut.group):
                behind = first
    return torch.cat([labels[..., 1:], behind], dim=-1)


def is_order(order: Tensor) -> Tensor:
    """Whether the indices of all ranks are those from 0 on, each once; 0-d bool."""
    rows = torch.arange(order.shape[-1], device=order.device)
    return (order.sort(dim=-1).values == rows).all()


def _joined(stacked: Tensor, axis: int, sizes: tuple[int, ...] | None) -> Tensor:
    """``[r, ...]`` as one array, rank by rank along the axis."""
    parts = list(stacked.unbind())
    if sizes is not None:
        parts = [x.narrow(axis, 0, size) for x, size in zip(parts, sizes, strict=True)]
    return torch.cat(parts, dim=axis)


def _padded(x: Tensor, axis: int, size: int) -> Tensor:
    """Longer along the axis, so that messages of all ranks have one size."""
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis) if shape[axis] else x
