"""From checked records to a loss: rows, weights, and the cheapest pass that serves."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.call import Call, Parallel
from irl_ops.jax.arguments import Array
from irl_ops.jax.program import computed_in, heads_of, join, objective, part, whole
from irl_ops.jax.scalar_loss import Static, scalar_loss, statistics, transition

Loss = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


def loss_of(call: Call, parallel: Parallel, logits: Array, labels: Array) -> Loss:
    """Any loss."""
    static, traced = part(call, parallel, logits)
    total, metrics = _run(static, logits, labels, traced)
    return (total, metrics) if call.metrics else total


# A function of its own for eager callers: what runs is compiled once, and then found by the types.
@functools.partial(jax.jit, static_argnums=0)
def _run(
    static: Any, logits: jax.Array, labels: jax.Array, traced: Any
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    placed, dtype = join(static, traced), computed_in(logits)
    rows, call, own, columns = whole(labels, logits.shape[-1], placed)
    loss, heads = objective(rows, call, dtype), heads_of(call.heads, dtype)
    summed = call.weighting.reduction != "none"
    if summed and own.axis is None and columns.axis is None:
        made = Static(heads.detach_next, call.metrics, call.inplace, call.backend, call.readout)
        return scalar_loss(made, logits, (heads.values, heads.next_values), rows, loss)

    with_entropy = loss.entropy_coef is not None
    stats = statistics(logits, rows, own, columns, with_entropy, call.backend, call.readout)
    step = transition(rows, stats, loss.gamma, heads)
    per_row = algebra.row_losses(jnp, loss, stats, step)
    result = jnp.sum(per_row) if summed else own.own(per_row)
    if not call.metrics:
        return result, None
    metrics = algebra.metrics(jnp, rows.kind, loss, stats, step)
    return result, jax.lax.stop_gradient(metrics)
