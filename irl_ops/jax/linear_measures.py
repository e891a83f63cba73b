"""The row measures of logits that are never stored, chunk by chunk."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import jax
from jax import lax

from irl_ops.call import StatsCall
from irl_ops.jax import measures
from irl_ops.jax.chunks import Layer, Sums, backwards, logits_of
from irl_ops.jax.linear_loss import Form, dispatch_layer, gradient_of
from irl_ops.jax.measures import View
from irl_ops.jax.program import computed_in
from irl_ops.jax.rows import once
from irl_ops.jax.shards import Columns
from irl_ops.kernels.reference.measures import RowMeasures, Slopes


def of_layer(
    form: Form, call: StatsCall, layer: Layer, labels: jax.Array, columns: Columns
) -> tuple[jax.Array, RowMeasures]:
    """As ``irl_ops.jax.measures.of_logits``, differentiable by the layer."""
    ids = measures.ids_of(call, labels, columns.vocabulary(layer.weight.shape[0]))
    view = measures.view_of(call, labels.shape, computed_in(layer.hidden))
    wanted = call.measures.wanted(call.entropy)
    return ids, row_measures(form, wanted, layer, ids, view, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def row_measures(
    form: Form,
    wanted: tuple[str, ...],
    layer: Layer,
    ids: jax.Array,
    view: View,
    columns: Columns,
) -> RowMeasures:
    """As ``irl_ops.jax.measures.row_measures``, of the layer's logits."""

    own, width = columns.own(ids, layer.weight.shape[0]), layer.weight.shape[0]
    run = functools.partial(_measures, wanted)
    found = dispatch_layer(form, run, layer, own, view, columns)
    whole: RowMeasures = columns.merged_measures(ids, found, width)
    return whole


def _forward(
    form: Form,
    wanted: tuple[str, ...],
    layer: Layer,
    ids: jax.Array,
    view: View,
    columns: Columns,
) -> tuple[RowMeasures, tuple[Any, ...]]:
    layer = jax.tree.map(once, layer)
    found = row_measures(form, wanted, layer, ids, view, columns)
    return found, (layer, ids, view, columns, found)


def _backward(
    form: Form, wanted: tuple[str, ...], saved: tuple[Any, ...], above: RowMeasures
) -> tuple[Any, ...]:
    layer, ids, view, columns, found = saved

    own = columns.own(ids, layer.weight.shape[0])
    slopes = measures.slopes_of(found, above, columns)
    given = (layer, own, found.row_max, found.logsum, slopes, view, columns)
    dhidden, sums = dispatch_layer(form, _gradients, *given)
    return gradient_of(dhidden, sums, 1.0), None, None, None


row_measures.defvjp(_forward, _backward)


def _measures(
    wanted: tuple[str, ...],
    kernels: ModuleType,
    form: Form,
    layer: Layer,
    ids: jax.Array,
    view: View,
    columns: Columns,
) -> RowMeasures:
    looped, shape = layer.looped(form.chunk), ids.shape[:-1]
    seen = _rows(len(shape), (ids, view))

    def body(carry: None, start: Any, size: int) -> tuple[None, Any]:
        hidden, (ids, view) = looped.hidden(start, size), _window(seen, start, size)
        x = columns.masked(logits_of(hidden, looped))
        found = kernels.row_measures(x, ids, wanted, **view._asdict(), **form.readout.keywords)
        return None, found

    _, found = backwards(body, None, math.prod(shape), form.chunk)
    measured: RowMeasures = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)
    return measured


def _gradients(
    kernels: ModuleType,
    form: Form,
    layer: Layer,
    ids: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    slopes: Slopes,
    view: View,
    columns: Columns,
) -> tuple[jax.Array, Sums]:
    looped = layer.looped(form.chunk)
    seen = _rows(ids.ndim - 1, (ids, row_max, logsum, slopes, view))

    def body(sums: Sums, start: Any, size: int) -> tuple[Sums, jax.Array]:
        hidden, (*given, view) = looped.hidden(start, size), _window(seen, start, size)
        x = columns.masked(logits_of(hidden, looped))
        dx = kernels.row_measures_grad(x, *given, **view._asdict(), **form.readout.keywords)
        return sums.add(dx, hidden, looped)

    sums = Sums.zeros(looped, form.accumulate)
    sums, dhidden = backwards(body, sums, row_max.size, form.chunk)
    return dhidden.reshape(layer.hidden.shape), sums.whole()


def _rows(axes: int, arrays: Any) -> Any:
    """With the rows, which have so many axes, along one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), arrays)


def _window(arrays: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), arrays)
