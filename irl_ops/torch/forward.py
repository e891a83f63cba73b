"""From checked records to a loss: by the backend as a whole, or step by step for a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.call import Call
from irl_ops.torch import compiled, traced
from irl_ops.torch.arguments import PLAIN, arguments
from irl_ops.torch.backends import choose
from irl_ops.torch.gradients import AtOnce, Later, asks_for_gradient
from irl_ops.torch.private import is_wrapped
from irl_ops.torch.whole import loss_by

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def loss_of(call: Call, logits: Tensor, labels: Tensor) -> Loss:
    """Any loss. Where a gradient is asked for, it is computed with the loss, or behind it.

    With the loss ("at once") it takes one read and one write of the logits. Behind it, in the
    backward pass, it takes one more read, and the gradient from above enters before anything is
    rounded: for float16, whose 1/N alone underflows before the factor of a GradScaler; for
    reduction "none", whose gradient from above is a vector; and for float64.
    """
    backend = choose(call.backend, logits)
    heads = call.heads
    differentiable = asks_for_gradient(logits, heads.values, heads.next_values)
    inplace = call.inplace and differentiable and logits.requires_grad
    if inplace:
        arguments.check_inplace(logits)
    given = logits
    logits = contiguous_rows(logits)
    at_once = (
        differentiable
        and logits.requires_grad
        and call.weighting.reduction != "none"
        and logits.dtype not in (torch.float16, torch.float64)
    )
    if not is_plain(logits, labels):
        if (at_once or not differentiable) and compiled.serves(call, logits, labels, backend):
            return compiled.loss_of(call, logits, labels, differentiable)
        return traced.loss_of(call, logits, labels, backend)
    box: list[Any] = []
    if not differentiable:
        outcome = loss_by(backend)(call, logits, labels, None, None)
        loss, metrics = outcome.loss, outcome.metrics
    else:
        function = AtOnce if at_once else Later
        loss = function.apply(  # type: ignore[no-untyped-call]
            logits, heads.values, heads.next_values, labels, call, backend, inplace, box
        )
        (metrics,) = box
        if inplace:
            poison(given)
    return loss if metrics is None else (loss, metrics)


def contiguous_rows(logits: Tensor) -> Tensor:
    """The logits, copied only where their last axis is not contiguous."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return logits.contiguous()
    return logits


def is_plain(*arrays: Tensor) -> bool:
    """Whether a backend may take the memory: compilers, subclasses and vmap want operators."""
    if torch.compiler.is_compiling():
        return False
    for x in arrays:
        if type(x) not in PLAIN or is_wrapped(x):
            return False
    return True


def poison(logits: Tensor) -> None:
    """NaN is what later reads of logits see whose storage holds a gradient now."""
    logits.data = logits.new_full((), torch.nan).expand(logits.shape)
