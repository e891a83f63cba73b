"""From checked arguments to a loss: rows, weights, and the cheapest pass that serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.arguments import Reduction
from irl_ops.torch import ops, single_pass
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import choose
from irl_ops.torch.call import Call

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def loss_of(
    objective: Callable[..., algebra.Objective],
    logits: Tensor,
    labels: Tensor,
    *,
    terms: dict[str, Any],
    sequence: dict[str, Any],
    entropy_coef: float | Tensor,
    token_weights: Tensor | None,
    num_items: Any,
    reduction: Reduction,
    return_metrics: bool,
    inplace: bool,
    backend: str,
    detach_next: bool = False,
    next_values: Tensor | None = None,
    values: Tensor | None = None,
) -> Loss:
    """Any loss, by its objective: in a single pass where a scalar loss needs a gradient."""
    arguments.check_scalar("entropy_coef", entropy_coef, logits, -math.inf, math.inf)
    arguments.check_switches(
        detach_next=detach_next, return_metrics=return_metrics, inplace=inplace
    )
    given = logits
    logits, backend = prepare(logits, labels, sequence, backend)
    arguments.check_weights(
        labels, token_weights=token_weights, num_items=num_items, reduction=reduction
    )
    arguments.check_values(labels, next_values=next_values, values=values)
    call = Call(
        objective,
        labels,
        terms,
        sequence,
        entropy_coef,
        token_weights,
        num_items,
        reduction,
        detach_next,
        next_values,
        values,
        return_metrics,
    )
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        if reduction == "none":
            raise ValueError("inplace=True with reduction='none'; accepted: 'mean', 'sum'")
        if differentiable:
            arguments.check_inplace(given)
    # A float16 gradient waits for the backward pass, so that the factor of a GradScaler reaches it
    # before it is rounded: 1/N alone underflows.
    at_once = reduction != "none" and (inplace or logits.dtype != torch.float16)
    if differentiable and at_once:
        summed, metrics = single_pass.loss_and_metrics(call, logits, inplace, backend)
        return summed if metrics is None else (summed, metrics)
    rows = ops.rows_of(labels, logits.shape[-1], sequence)
    loss = call.weights(xp, rows.kind)
    stats = statistics(logits, rows, loss.entropy, backend)
    step = transition(rows, stats, loss.gamma, detach_next, next_values, values)
    total: Tensor = algebra.row_losses(xp, loss, stats, step.reward)
    total = total if reduction == "none" else total.sum()
    if not return_metrics:
        return total
    with torch.no_grad():
        return total, algebra.metrics(xp, rows.kind, loss, stats, step)


def prepare(
    logits: Tensor, labels: Tensor, sequence: dict[str, Any], backend: str
) -> tuple[Tensor, str]:
    """Checked logits with a contiguous last axis, and the backend's name."""
    arguments.check_logits(logits, labels)
    arguments.check_sequence(labels, **sequence)
    backend = choose(backend, logits.device)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return logits, backend


def statistics(
    logits: Tensor, rows: algebra.Rows, entropy: bool, backend: str
) -> algebra.Statistics:
    """Row statistics from one read of the logits, differentiable."""
    row_max, logsum, label_logit, h = ops.row_stats(logits, rows.labels, entropy, backend)
    h = h if entropy else None
    return algebra.statistics(xp, rows.labels, row_max, logsum, label_logit, h)


def transition(
    rows: algebra.Rows,
    stats: algebra.Statistics,
    gamma: float | Tensor,
    detach_next: bool,
    next_values: Tensor | None,
    values: Tensor | None,
) -> algebra.Transition:
    """The TD residual and what it is made of, differentiable."""
    return algebra.transition(
        xp,
        rows.kind,
        stats,
        gamma,
        next_values=None if next_values is None else next_values.float(),
        values=None if values is None else values.float(),
        stop_gradient=Tensor.detach if detach_next else None,
    )
