"""A loss of hidden states and a weight, with its gradients in the forward pass."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import BAD_LABEL, Heads, Objective, Rows
from irl_ops.call import Call
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.chunks import Linear
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.linear_columns import LinearColumns, padded, without_padding
from irl_ops.torch.needed import Selection, needed
from irl_ops.torch.parallel import ANY_LABEL
from irl_ops.torch.refusals import refuse_second_derivative, refuse_second_pass
from irl_ops.torch.shards import Reading
from irl_ops.torch.stepwise import aligned, in_dtype


class LinearAtOnce(torch.autograd.Function):
    """Three matrix products per chunk of rows, and no second one for the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        next_values: Tensor | None,
        labels: Tensor,
        layer: Layer,
        call: Call,
        drop: bool,
        backend: str,
        how: Reading | None,
        box: list[Any],
    ) -> Tensor:
        """The loss; the metrics go into ``box``.

        ``how`` tells of the columns that other processes have; None: the weight has all.
        """
        wanted = ctx.needs_input_grad[:3]
        ctx.total = layer.total
        layer = layer._replace(hidden=hidden, weight=weight, bias=bias)
        if how is None:
            kept = Kept(layer, aligned(call.sequence, labels, weight.shape[0]), call, drop)
            over = Linear(BACKENDS[backend], kept.layer, wanted)
            out = algebra.loss_and_grad(xp, over, kept.rows, kept.loss, kept.heads)
        else:
            assert how.columns is not None
            own_weight, own_bias = without_padding(weight, bias, how)
            part = layer._replace(weight=own_weight, bias=own_bias)
            rows = algebra.align(xp, labels.long(), ANY_LABEL, call.sequence)
            kept = Kept(part, rows, call, drop)
            td = kept.loss.td is not None
            over = LinearColumns(BACKENDS[backend], kept.layer, wanted, how, td)
            out = algebra.loss_and_grad(xp, over, kept.rows, kept.loss, kept.heads)
            _refuse_bad_labels(over.count, labels, call)
        ctx.group = None if how is None else how.columns.group  # type: ignore[union-attr]
        ctx.save_for_backward(
            None if over.dhidden is None else kept.spread(over.dhidden),
            padded(over.dweight, weight.shape[0]),
            padded(over.dbias, weight.shape[0]),
            None if out.dvalues is None else kept.spread(out.dvalues),
            None if out.dnext_values is None else kept.spread(out.dnext_values),
            kept.unit,
        )
        ctx.dtype, ctx.handed_over = weight.dtype, False
        box.append(out.metrics if call.metrics else None)
        loss: Tensor = out.loss if kept.unit is None else out.loss * kept.unit
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the one from above; a sum of the user's is added to here."""
        refuse_second_derivative()
        if ctx.handed_over:
            refuse_second_pass()
        ctx.handed_over = True
        *gradients, unit = ctx.saved_tensors
        factor = dloss if unit is None else dloss * unit
        if ctx.total is not None:
            ctx.total.addcmul_(gradients[1], factor)  # the product is not stored
            gradients[1] = None
        one = factor.device.type == "cpu" and factor.item() == 1
        scaled = [x if x is None or one else x.mul_(factor) for x in gradients]
        dhidden, dweight, dbias, dvalues, dnext_values = scaled
        if dhidden is not None and ctx.group is not None:
            dist.all_reduce(dhidden, group=ctx.group)
        dweight = None if dweight is None else dweight.to(ctx.dtype)
        dbias = None if dbias is None else dbias.to(ctx.dtype)
        return dhidden, dweight, dbias, dvalues, dnext_values, *[None] * 7


class Kept:
    """The rows of a call, flat, with their weights; with ``drop`` those that somebody needs."""

    def __init__(self, layer: Layer, whole: Rows, call: Call, drop: bool) -> None:
        hidden = layer.hidden
        self.shape = whole.labels.shape
        logits = hidden.new_empty(0).expand(*self.shape, 0)  # their dtype and device
        heads, weighting = in_dtype(call, logits)
        loss = algebra.weigh(xp, whole.kind, call.terms, weighting)
        self.unit = _unit(loss) if hidden.dtype == torch.float16 else None
        if self.unit is not None:
            td = None if loss.td is None else loss.td / self.unit
            loss = loss._replace(mle=loss.mle / self.unit, td=td)
        self.chosen = Selection(needed(whole.kind) if drop else None)
        self.rows = Rows(self.take(whole.labels), self.take(whole.kind))
        self.loss = loss._replace(mle=self.take(loss.mle), td=self.take(loss.td))
        self.heads = Heads(self.take(heads.values), self.take(heads.next_values), heads.detach_next)
        self.layer = layer._replace(hidden=self.chosen.take(hidden.flatten(0, -2)))

    def take(self, x: Any) -> Any:
        """Of an array ``[..., T]``, the rows that are kept, flat."""
        return None if x is None else self.chosen.take(x.flatten())

    def spread(self, x: Tensor) -> Tensor:
        """An array of all rows, 0 in those that were left out."""
        return self.chosen.spread(x).view(*self.shape, *x.shape[1:])


def _unit(loss: Objective) -> Tensor:
    """The largest weight, which is taken out of a float16 gradient until it meets a GradScaler."""
    largest = loss.mle.abs().amax() if loss.mle.numel() else loss.mle.sum()
    if loss.td is not None and loss.td.numel():
        largest = torch.maximum(largest, loss.td.abs().amax())
    return torch.where(largest > 0, largest, 1.0)


def _refuse_bad_labels(count: Any, labels: Tensor, call: Call) -> None:
    """Raises on a CPU, where all processes know by now how many columns there are."""
    if count is None or labels.device.type != "cpu":
        return
    rows = algebra.align(xp, labels.long(), int(count), call.sequence)
    if (rows.labels == BAD_LABEL).any():
        arguments.refuse_label(rows.labels, labels, int(count), call.sequence)
