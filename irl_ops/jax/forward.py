"""From checked arguments to a loss: rows, weights, and the cheapest pass that serves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.arguments import Reduction
from irl_ops.jax.arguments import arguments
from irl_ops.jax.backends import check_backend
from irl_ops.jax.rows import constant
from irl_ops.jax.scalar_loss import Static, scalar_loss, statistics

Array = Any  # a jax.Array, or what jax.numpy takes for one: a numpy.ndarray
Scalar = Any  # a number or a 0-d array
Loss = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


class Sequences(NamedTuple):
    """The options of ``algebra.rows_of`` that a program is made for."""

    ignore_index: int
    shift: bool
    eos_token_id: tuple[int, ...] | None
    boundary: str


class Program(NamedTuple):
    """All that a program is made for."""

    objective: Callable[..., algebra.Objective]
    sequences: Sequences
    reduction: str
    static: Static


def loss_of(
    objective: Callable[..., algebra.Objective],
    logits: Array,
    labels: Array,
    *,
    terms: dict[str, Any],
    sequence: dict[str, Any],
    entropy_coef: Scalar,
    token_weights: Array | None,
    num_items: Any,
    reduction: Reduction,
    return_metrics: bool,
    inplace: bool,
    backend: str,
    detach_next: bool = False,
    next_values: Array | None = None,
    values: Array | None = None,
) -> Loss:
    """Any loss, by its objective."""
    arguments.check_scalar("entropy_coef", entropy_coef, logits, -math.inf, math.inf)
    arguments.check_switches(
        detach_next=detach_next, return_metrics=return_metrics, inplace=inplace
    )
    sequences, markers = prepare(logits, labels, sequence)
    arguments.check_weights(
        labels, token_weights=token_weights, num_items=num_items, reduction=reduction
    )
    arguments.check_values(labels, next_values=next_values, values=values)
    if inplace and reduction == "none":
        raise ValueError("inplace=True with reduction='none'; accepted: 'mean', 'sum'")
    entropy = algebra.needs_entropy(entropy_coef)
    static = Static(detach_next, entropy, return_metrics, inplace, check_backend(backend, logits))
    total, metrics = _run(
        Program(objective, sequences, reduction, static),
        logits,
        labels,
        markers,
        (values, next_values),
        dict(terms, entropy_coef=entropy_coef, token_weights=token_weights, num_items=num_items),
    )
    return (total, metrics) if return_metrics else total


def prepare(
    logits: Array, labels: Array, sequence: dict[str, Any]
) -> tuple[Sequences, dict[str, Array | None]]:
    """Checks, and parts what a program is made for from the arrays that it takes."""
    arguments.check_logits(logits, labels)
    arguments.check_sequence(labels, **sequence)
    arrays = dict(sequence)
    eos = arrays.pop("eos_token_id")
    sequences = Sequences(
        arrays.pop("ignore_index"),
        arrays.pop("shift"),
        None if eos is None else algebra.end_tokens(eos),
        arrays.pop("boundary"),
    )
    return sequences, arrays


# A function of its own for eager callers: what runs is compiled once, and then found by the types.
@functools.partial(jax.jit, static_argnums=0)
def _run(
    program: Program,
    logits: jax.Array,
    labels: jax.Array,
    markers: dict[str, Any],
    heads: tuple[jax.Array | None, jax.Array | None],
    given: dict[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    static = program.static
    rows = rows_of(labels, logits.shape[-1], program.sequences, markers)
    given = {name: _constants(name, x) for name, x in given.items() if x is not None}
    weights = program.objective(
        jnp,
        rows.kind,
        given.pop("token_weights", jnp.ones(labels.shape, jnp.float32)),
        reduction=program.reduction,
        num_items=given.pop("num_items", None),
        **given,
    )
    weights = weights._replace(gamma=jnp.asarray(weights.gamma, jnp.float32))
    values, next_values = (None if x is None else x.astype(jnp.float32) for x in heads)
    if program.reduction != "none":
        return scalar_loss(static, logits, (values, next_values), rows, weights)

    loss = static.objective(weights)
    stats = statistics(logits, rows, static.entropy, static.backend)
    step = transition(rows, stats, loss.gamma, static.detach_next, values, next_values)
    per_row = algebra.row_losses(jnp, loss, stats, step.reward)
    if not static.metrics:
        return per_row, None
    metrics = algebra.metrics(jnp, rows.kind, loss, stats, step)
    return per_row, jax.lax.stop_gradient(metrics)


def rows_of(
    labels: jax.Array, vocab: int, sequences: Sequences, markers: dict[str, Any]
) -> algebra.Rows:
    """The labels aligned with their logits, int32, and the kind of every row."""
    rows = algebra.rows_of(jnp, labels, vocab, **sequences._asdict(), **markers)
    return rows._replace(labels=rows.labels.astype(jnp.int32))


def transition(
    rows: algebra.Rows,
    stats: algebra.Statistics,
    gamma: jax.Array,
    detach_next: bool,
    values: jax.Array | None,
    next_values: jax.Array | None,
) -> algebra.Transition:
    """The TD residual and what it is made of, differentiable."""
    return algebra.transition(
        jnp,
        rows.kind,
        stats,
        gamma,
        next_values=next_values,
        values=values,
        stop_gradient=jax.lax.stop_gradient if detach_next else None,
    )


def _constants(name: str, x: Any) -> Any:
    """In float32 but for masks, and refused as an argument to differentiate by."""
    if isinstance(x, tuple):
        return tuple(_constants(name, part) for part in x)
    return x if x.dtype == jnp.bool_ else constant(name, jnp.asarray(x, jnp.float32))
