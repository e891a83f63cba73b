"""Differentiable: the statistics of rows whose logits are made in chunks, and their summed loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.jax import chunks, tiles
from irl_ops.jax.backends import BACKENDS, dispatch
from irl_ops.jax.chunks import Chunk, Layer, Linear, Sums
from irl_ops.jax.linear_sharded import Sharded
from irl_ops.jax.rows import RowStats, once, row_coefficients
from irl_ops.jax.scalar_loss import Given, Metrics, transition
from irl_ops.jax.shards import Columns, Rows
from irl_ops.readout import PLAIN, Readout


class Form(NamedTuple):
    """What is fixed when a program is compiled."""

    chunk: Chunk
    accumulate: str
    backend: str
    readout: Readout = PLAIN
    drop: bool = True  # chunks that nobody needs are left out
    detach_next: bool = False
    metrics: bool = False


def dispatch_layer(form: Form, run: Callable[..., Any], layer: Layer, *arrays: Any) -> Any:
    """``run(kernels, form, layer, *arrays)``; see ``dispatch``.

    With Pallas, loops hold matrices of 16 bits in tiles; see ``irl_ops.jax.tiles``.
    """

    def by(name: str) -> Callable[..., Any]:
        plain = functools.partial(run, BACKENDS[name], form)
        if name != "pallas" or layer.weight.dtype.itemsize != 2:
            return plain
        tiled = form._replace(chunk=form.chunk._replace(tiled=True))
        rows = layer.weight.shape[0], math.prod(layer.hidden.shape[:-1])
        return tiles.where_whole(rows, functools.partial(run, BACKENDS[name], tiled), plain)

    return dispatch(form.backend, by, layer, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def row_stats(
    form: Form, entropy: bool, layer: Layer, labels: jax.Array, columns: Columns
) -> RowStats:
    """``(row_max, logsum, label_logit, entropy)``; as ``irl_ops.jax.rows.row_stats``."""

    def run(
        kernels: ModuleType, form: Form, layer: Layer, labels: jax.Array, columns: Columns
    ) -> Any:
        how = form.readout, form.chunk, entropy
        return chunks.row_stats(kernels, layer, labels, columns, *how)

    width = layer.weight.shape[0]
    own = columns.own(labels, width)
    found = dispatch_layer(form, run, layer, own, columns)
    stats: RowStats = columns.merged(labels, found, width)
    return stats


def _stats_forward(
    form: Form, entropy: bool, layer: Layer, labels: jax.Array, columns: Columns
) -> tuple[RowStats, Any]:
    layer = jax.tree.map(once, layer)
    stats = row_stats(form, entropy, layer, labels, columns)
    return stats, (layer, labels, columns, stats)


def _stats_backward(form: Form, entropy: bool, kept: Any, above: RowStats) -> tuple[Any, ...]:
    layer, labels, columns, (row_max, logsum, _, h) = kept
    dlogsum, dlabel_logit, dh = columns.above(*above[1:])
    own = columns.own(labels, layer.weight.shape[0])
    vectors = columns, own, row_max, logsum, *row_coefficients(h, dlogsum, dlabel_logit, dh)

    def run(kernels: ModuleType, form: Form, layer: Layer, *vectors: Any) -> Any:
        how = form.readout, form.chunk, form.accumulate, form.drop
        return chunks.row_grad(kernels, layer, *how, *vectors)

    dhidden, sums = dispatch_layer(form, run, layer, *vectors)
    return gradient_of(dhidden, sums, 1.0), None, None


row_stats.defvjp(_stats_forward, _stats_backward)


def statistics(
    form: Form, entropy: bool, layer: Layer, rows: algebra.Rows, own: Rows, columns: Columns
) -> algebra.Statistics:
    """Row statistics of whole sequences, differentiable."""
    found = row_stats(form, entropy, layer, own.own(rows.labels), columns)
    return algebra.statistics(jnp, rows.labels, *own.whole(found))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_loss(
    form: Form,
    layer: Layer,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
    own: Rows,
    columns: Columns,
) -> tuple[jax.Array, Metrics]:
    """The summed loss, differentiable by layer and values, and the metrics, which are constants."""
    stats = statistics(form, loss.entropy_coef is not None, layer, rows, own, columns)
    step = transition(rows, stats, loss.gamma, algebra.Heads(*given, form.detach_next))
    total = jnp.sum(algebra.row_losses(jnp, loss, stats, step))
    metrics = algebra.metrics(jnp, rows.kind, loss, stats, step) if form.metrics else None
    return total, metrics


class Kept(NamedTuple):
    """The gradients, in units of ``unit``."""

    dhidden: jax.Array
    sums: Sums
    heads: Given
    unit: jax.Array | float
    own: Rows
    columns: Columns


def _forward(
    form: Form,
    layer: Layer,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
    own: Rows,
    columns: Columns,
) -> tuple[tuple[jax.Array, Metrics], Kept]:
    layer = jax.tree.map(once, layer)
    half = layer.hidden.dtype == jnp.float16
    unit: jax.Array | float = 1.0
    if half:  # 1/N waits for the factor of a loss scale: alone it underflows
        weights = [loss.mle] if loss.td is None else [loss.mle, loss.td]
        unit = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in weights]))
        unit = jnp.where(unit > 0, unit, 1.0)
        td = None if loss.td is None else loss.td / unit
        loss = loss._replace(mle=loss.mle / unit, td=td)

    def run(
        kernels: ModuleType,
        form: Form,
        layer: Layer,
        given: Given,
        rows: algebra.Rows,
        loss: algebra.Objective,
        own: Rows,
        columns: Columns,
    ) -> Any:
        how = form.readout, form.chunk, form.accumulate, form.drop
        heads = algebra.Heads(*given, form.detach_next)
        if own.axis is None and columns.axis is None:
            out = algebra.loss_and_grad(jnp, Linear(kernels, layer, *how), rows, loss, heads)
        else:
            sharded = Sharded(kernels, layer, columns, own, *how)
            out = sharded.loss_and_grad(rows, loss, heads)
        metrics = out.metrics if form.metrics else None
        return out.loss, metrics, *out.gradient, (out.dvalues, out.dnext_values)

    arrays = layer, given, rows, loss, own, columns
    total, metrics, *gradients = dispatch_layer(form, run, *arrays)
    kept = Kept(*gradients, unit, own, columns)  # type: ignore[call-arg]
    return (total * unit if half else total, metrics), kept


def _backward(form: Form, kept: Kept, above: tuple[jax.Array, Metrics]) -> tuple[Any, ...]:
    factor = above[0] * kept.unit
    heads = tuple(None if x is None else factor * x for x in kept.heads)
    (whole,) = kept.columns.above(kept.own.above(factor))
    return gradient_of(kept.dhidden, kept.sums, whole), heads, None, None, None, None


linear_loss.defvjp(_forward, _backward)


def gradient_of(dhidden: jax.Array, sums: Sums, factor: Any) -> Layer:
    """The gradient by the layer, times the factor, in its dtypes."""
    hidden, weight, bias = (
        None if x is None else (factor * x).astype(dhidden.dtype) for x in (dhidden, *sums)
    )
    return Layer(hidden, weight, bias)  # type: ignore[arg-type]
