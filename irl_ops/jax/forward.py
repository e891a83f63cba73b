"""From checked records to a loss: rows, weights, and the cheapest pass that serves."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.call import Call
from irl_ops.jax.arguments import Array
from irl_ops.jax.program import computed_in, heads_of, join, objective, part, rows_of
from irl_ops.jax.scalar_loss import Static, scalar_loss, statistics, transition

Loss = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


def loss_of(call: Call, logits: Array, labels: Array) -> Loss:
    """Any loss."""
    static, traced = part(call, logits)
    total, metrics = _run(static, logits, labels, traced)
    return (total, metrics) if call.metrics else total


# A function of its own for eager callers: what runs is compiled once, and then found by the types.
@functools.partial(jax.jit, static_argnums=0)
def _run(
    static: Any, logits: jax.Array, labels: jax.Array, traced: Any
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    call, dtype = join(static, traced), computed_in(logits)
    rows = rows_of(labels, logits.shape[-1], call.sequence)
    loss, heads = objective(rows, call, dtype), heads_of(call.heads, dtype)
    if call.weighting.reduction != "none":
        made = Static(heads.detach_next, call.metrics, call.inplace, call.backend, call.readout)
        return scalar_loss(made, logits, (heads.values, heads.next_values), rows, loss)

    with_entropy = loss.entropy_coef is not None
    stats = statistics(logits, rows, with_entropy, call.backend, call.readout)
    step = transition(rows, stats, loss.gamma, heads)
    per_row = algebra.row_losses(jnp, loss, stats, step)
    if not call.metrics:
        return per_row, None
    metrics = algebra.metrics(jnp, rows.kind, loss, stats, step)
    return per_row, jax.lax.stop_gradient(metrics)
