"""The loss with its gradient already in the forward pass: one read and one write of the logits.

The backward pass hands that gradient over, scaled by the gradient from above (no work where that is
1).
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch import native_loss, ops, triton_loss
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.call import Call, Outcome

WHOLE = {  # backends that do a whole call at once
    "triton": triton_loss.loss_and_grad,
    "native": native_loss.loss_and_grad,
}


def loss_and_metrics(
    call: Call, logits: Tensor, inplace: bool, backend: str
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The loss summed over rows, differentiable once, and the metrics where they are wanted."""
    with torch.no_grad():
        outcome, dlogits = _at_once(call, logits.detach(), inplace, backend)
    gradients = (dlogits, outcome.dvalues, outcome.dnext_values)
    loss: Tensor = HandOver.apply(  # type: ignore[no-untyped-call]
        logits, call.values, call.next_values, outcome.loss, *gradients, backend
    )
    return loss, outcome.metrics


class HandOver(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        loss: Tensor,
        dlogits: Tensor,
        dvalues: Tensor | None,
        dnext_values: Tensor | None,
        backend: str,
    ) -> Tensor:
        """The loss, as a function of the first three."""
        ctx.save_for_backward(dlogits, dvalues, dnext_values)
        ctx.backend, ctx.handed_over = backend, False
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients times the gradient from above."""
        ops.refuse_second_derivative()
        if ctx.handed_over:
            raise RuntimeError(
                "irl_ops: backward ran a second time through the same loss, whose gradient the "
                "first pass has handed over; call the loss again for another pass"
            )
        dlogits, dvalues, dnext_values = ctx.saved_tensors
        if torch.compiler.is_compiling():
            dlogits = dlogits * dloss  # the compiler knows best whether that storage is free
        else:
            ctx.handed_over = True
            if _is_direct(ctx.backend, dlogits):
                BACKENDS[ctx.backend].scale_(dlogits, dloss)
            else:
                ops.scale_(dlogits, dloss, ctx.backend)
        dvalues = None if dvalues is None else dvalues * dloss
        dnext_values = None if dnext_values is None else dnext_values * dloss
        return dlogits, dvalues, dnext_values, *[None] * 5


def _at_once(call: Call, logits: Tensor, inplace: bool, backend: str) -> tuple[Outcome, Tensor]:
    """The outcome and the gradient of the logits, by the backend itself or step by step."""
    if _is_direct(backend, logits):
        dlogits = logits if inplace else torch.empty_like(logits)
        outcome = WHOLE[backend](call, logits, dlogits)
        if outcome is not None:
            if inplace:
                torch.autograd.graph.increment_version(logits)
            return outcome, dlogits
    return _step_by_step(call, logits, inplace, backend)


def _is_direct(backend: str, x: Tensor) -> bool:
    """Whether operators are not needed: compilers, and subclasses such as FakeTensor, want them."""
    return backend in WHOLE and type(x) is Tensor and not torch.compiler.is_compiling()


def _step_by_step(
    call: Call, logits: Tensor, inplace: bool, backend: str
) -> tuple[Outcome, Tensor]:
    rows = ops.rows_of(call.labels, logits.shape[-1], call.sequence)
    loss = call.weights(xp, rows.kind)
    out = algebra.single_pass(
        xp,
        Kernels(backend, inplace),
        logits,
        rows,
        loss,
        next_values=None if call.next_values is None else call.next_values.float(),
        values=None if call.values is None else call.values.float(),
        detach_next=call.detach_next,
    )
    metrics = algebra.metrics(xp, rows.kind, loss, out.stats, out.step) if call.metrics else None
    return Outcome(out.loss, out.dvalues, out.dnext_values, metrics), out.dlogits


class Kernels:
    """The row kernels as ``algebra.single_pass`` calls them."""

    def __init__(self, backend: str, inplace: bool) -> None:
        self.backend, self.inplace = backend, inplace

    def label_logit(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``q[label]``, before anything is overwritten."""
        picked: Tensor = ops.label_logit(logits, labels, self.backend)
        return picked

    def row_stats_grad(
        self, logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient in the logits' storage, or in one of its own."""
        arguments = (logits, alpha, beta, entropy_weight, self.backend)
        if self.inplace:
            row_max, logsum, entropy = ops.row_stats_grad_(*arguments)
            return row_max, logsum, entropy, logits
        row_max, logsum, entropy, dlogits = ops.row_stats_grad(*arguments)
        return row_max, logsum, entropy, dlogits

    def set_label(self, dlogits: Tensor, labels: Tensor, elements: Tensor) -> Tensor:
        """In place."""
        ops.set_label_(dlogits, labels, elements, self.backend)
        return dlogits
