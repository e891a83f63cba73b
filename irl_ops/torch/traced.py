"""The losses for compilers and tensor subclasses: two operators, and the algebra between them.

``row_stats`` reads the logits once in the forward pass; ``row_grad`` reads them again and writes
the gradient, once, in the backward pass. Neither writes into a tensor that is there already: a
compiler would copy it first. So ``inplace=True`` changes nothing here. ``irl_ops.torch.compiled``
takes one pass for what it serves.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.call import Call
from irl_ops.readout import Readout
from irl_ops.torch import ops
from irl_ops.torch.stepwise import heads_in, in_dtype

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def loss_of(call: Call, logits: Tensor, labels: Tensor, backend: str) -> Loss:
    """Any loss, differentiable."""
    heads, weighting = in_dtype(call, logits)
    rows = ops.align(labels, logits.shape[-1], call.sequence)
    loss = algebra.weigh(xp, rows.kind, call.terms, weighting)
    stats = statistics(logits, rows, loss.entropy_coef is not None, backend, call.readout)
    step = transition(rows, stats, loss.gamma, heads)
    total: Tensor = algebra.row_losses(xp, loss, stats, step)
    total = total if call.weighting.reduction == "none" else total.sum()
    if not call.metrics:
        return total
    with torch.no_grad():
        return total, algebra.metrics(xp, rows.kind, loss, stats, step)


def statistics(
    logits: Tensor, rows: algebra.Rows, entropy: bool, backend: str, readout: Readout
) -> algebra.Statistics:
    """Row statistics from one read of the logits, differentiable."""
    row_max, logsum, label_logit, h = ops.row_stats(logits, rows.labels, entropy, backend, *readout)
    h = h if entropy else None
    return algebra.statistics(xp, rows.labels, row_max, logsum, label_logit, h)


def transition(
    rows: algebra.Rows, stats: algebra.Statistics, gamma: Any, heads: algebra.Heads
) -> algebra.Transition:
    """The TD residual and what it is made of, differentiable."""
    return algebra.transition(
        xp,
        rows.kind,
        stats,
        gamma,
        heads_in(heads, stats.value.dtype),
        stop_gradient=Tensor.detach if heads.detach_next else None,
    )
