"""A loss of hidden states and a weight, with its gradients in the forward pass."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import Heads, Objective, Rows
from irl_ops.call import Call
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.chunks import Linear
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.needed import Selection, needed
from irl_ops.torch.refusals import refuse_second_derivative, refuse_second_pass
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
        box: list[Any],
    ) -> Tensor:
        """The loss; the metrics go into ``box``."""
        wanted = ctx.needs_input_grad[:3]
        ctx.total = layer.accumulate if isinstance(layer.accumulate, Tensor) else None
        kept = Kept(layer._replace(hidden=hidden, weight=weight, bias=bias), labels, call, drop)
        over = Linear(BACKENDS[backend], kept.layer, wanted)
        out = algebra.loss_and_grad(xp, over, kept.rows, kept.loss, kept.heads)
        ctx.save_for_backward(
            None if over.dhidden is None else kept.spread(over.dhidden),
            over.dweight,
            over.dbias,
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
        dweight = None if dweight is None else dweight.to(ctx.dtype)
        dbias = None if dbias is None else dbias.to(ctx.dtype)
        return dhidden, dweight, dbias, dvalues, dnext_values, *[None] * 6


class Kept:
    """The rows of a call, flat, with their weights; with ``drop`` those that somebody needs."""

    def __init__(self, layer: Layer, labels: Tensor, call: Call, drop: bool) -> None:
        hidden, weight = layer.hidden, layer.weight
        logits = hidden.new_empty(0).expand(*labels.shape, 0)  # their dtype and device
        heads, weighting = in_dtype(call, logits)
        self.shape = labels.shape
        whole = aligned(call.sequence, labels, weight.shape[0])
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
