"""A loss as a function of its logits and values, with a gradient computed at once or later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.call import Call
from irl_ops.torch import pool
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.refusals import refuse_second_derivative, refuse_second_pass
from irl_ops.torch.whole import gradient_later, loss_by, loss_for_later


def asks_for_gradient(*arrays: Tensor | None) -> bool:
    """Whether a call of these has a gradient to compute."""
    if torch.is_grad_enabled():
        for x in arrays:
            if x is not None and x.requires_grad:
                return True
    return False


class AtOnce(torch.autograd.Function):
    """The gradient comes with the loss: one read and one write of the logits.

    The backward pass hands it over, scaled by the gradient from above; no work where that is 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        labels: Tensor,
        call: Call,
        backend: str,
        inplace: bool,
        box: list[Any],
    ) -> Tensor:
        """The loss; the metrics go into ``box``."""
        dlogits = logits.detach() if inplace else pool.empty_like(logits)
        outcome = loss_by(backend)(call, logits, labels, dlogits, None)
        if inplace:
            torch.autograd.graph.increment_version(dlogits)
        ctx.save_for_backward(dlogits, outcome.dvalues, outcome.dnext_values)
        ctx.backend, ctx.handed_over = backend, False
        box.append(outcome.metrics)
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the one from above."""
        refuse_second_derivative()
        if ctx.handed_over:
            refuse_second_pass()
        ctx.handed_over = True
        dlogits, dvalues, dnext_values = ctx.saved_tensors
        BACKENDS[ctx.backend].scale_(dlogits, dloss)
        dvalues = None if dvalues is None else dvalues * dloss
        dnext_values = None if dnext_values is None else dnext_values * dloss
        return dlogits, dvalues, dnext_values, *[None] * 5


class Later(torch.autograd.Function):
    """The gradient is computed in the backward pass, the one from above being part of it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        labels: Tensor,
        call: Call,
        backend: str,
        inplace: bool,
        box: list[Any],
    ) -> Tensor:
        """The loss; the metrics go into ``box``."""
        outcome, kept = loss_for_later(backend, call, logits, labels)
        # an alias, since the caller's own tensor is poisoned where the gradient takes its storage
        logits = logits.detach() if inplace else logits
        ctx.save_for_backward(logits, values, next_values, labels, *kept)
        ctx.call, ctx.backend, ctx.inplace, ctx.handed_over = call, backend, inplace, False
        box.append(outcome.metrics)
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """One read and one write of the logits."""
        refuse_second_derivative()
        if ctx.handed_over:
            refuse_second_pass()
        logits, values, next_values, labels, *kept = ctx.saved_tensors
        dlogits = logits if ctx.inplace else pool.empty_like(logits)
        call: Call = ctx.call
        if call.metrics or not call.plain:
            heads = call.heads._replace(values=values, next_values=next_values)
            call = call._replace(heads=heads, metrics=False)
        dvalues, dnext_values = gradient_later(
            ctx.backend, call, logits, labels, dlogits, dloss, tuple(kept)
        )
        if ctx.inplace:
            ctx.handed_over = True
            torch.autograd.graph.increment_version(logits)
        return dlogits, dvalues, dnext_values, *[None] * 5
