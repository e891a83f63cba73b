"""The loss with its gradient already in the forward pass, as one autograd.Function.

The backward pass hands that gradient over, scaled by the gradient from above (no work where that is
1), so that a step reads the logits once and writes their gradient once.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch import ops


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


class SinglePass(torch.autograd.Function):
    """``(loss,)``, with ``metrics`` ``(loss, V, logprob, entropy, *Transition)``.

    The loss alone has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        labels: Tensor,
        kind: Tensor,
        mle: Tensor,
        td: Tensor | None,
        gamma: float | Tensor,
        entropy_coef: float | Tensor,
        detach_next: bool,
        metrics: bool,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        """The loss summed over rows, with everything ``backward`` will hand over."""
        out = algebra.single_pass(
            xp,
            Kernels(backend, inplace),
            logits.detach(),
            algebra.Rows(labels, kind),
            algebra.Objective(mle, td, gamma, entropy_coef),
            next_values=next_values,
            values=values,
            detach_next=detach_next,
        )
        ctx.save_for_backward(out.dlogits, out.dvalues, out.dnext_values)
        ctx.backend, ctx.handed_over = backend, False
        if not metrics:
            return (out.loss,)
        rest = (
            out.stats.value,
            out.stats.logprob,
            out.stats.entropy,
            out.step.value.clone(),
            out.step.next_value.clone(),
            out.step.reward,
        )
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return out.loss, *rest

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
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
            ops.scale_(dlogits, dloss, ctx.backend)
        dvalues = None if dvalues is None else dvalues * dloss
        dnext_values = None if dnext_values is None else dnext_values * dloss
        return dlogits, dvalues, dnext_values, *[None] * 10
