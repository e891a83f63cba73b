"""The row measures, which can be differentiated once, in reverse; and ``token_stats`` on them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.call import StatsCall
from irl_ops.jax.backends import BACKENDS, dispatch
from irl_ops.jax.program import computed_in
from irl_ops.jax.rows import constant, once
from irl_ops.jax.shards import Columns, Rows
from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.measures import EXTRAS
from irl_ops.readout import Readout

KERNEL = "row_measures"


class Form(NamedTuple):
    """What a program is made for."""

    wanted: tuple[str, ...]
    backend: str
    readout: Readout


class View(NamedTuple):
    """What each row has of its own when it is read; None where it has not."""

    row_scale: jax.Array | None  # [...]
    keep_mask: jax.Array | None  # [..., V]
    keep_above: jax.Array | None  # [...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_measures(
    form: Form, logits: jax.Array, ids: jax.Array, view: View, columns: Columns
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``; ``row_max`` counts as a constant.

    Where the columns are spread over devices, ids and measures are those of whole rows, and logits
    and mask those of the columns here.
    """
    return _measures(form, columns.masked(logits), ids, view, columns)


def _measures(
    form: Form, logits: jax.Array, ids: jax.Array, view: View, columns: Columns
) -> RowMeasures:
    def by(name: str) -> Any:
        def run(logits: jax.Array, ids: jax.Array, view: View) -> RowMeasures:
            measures: RowMeasures = BACKENDS[name].row_measures(
                logits, ids, form.wanted, **view._asdict(), **form.readout.keywords
            )
            return measures

        return run

    own, width = columns.own(ids, logits.shape[-1]), logits.shape[-1]
    found = dispatch(form.backend, by, logits, own, view, kernel=KERNEL)
    whole: RowMeasures = columns.merged_measures(ids, found, width)
    return whole


def _forward(
    form: Form, logits: jax.Array, ids: jax.Array, view: View, columns: Columns
) -> tuple[RowMeasures, tuple[Any, ...]]:
    logits = columns.masked(once(logits))
    found = _measures(form, logits, ids, view, columns)
    return found, (logits, ids, view, columns, found)


def _backward(form: Form, saved: tuple[Any, ...], above: RowMeasures) -> tuple[Any, ...]:
    logits, ids, view, columns, found = saved

    def by(name: str) -> Any:
        def run(
            logits: jax.Array,
            ids: jax.Array,
            row_max: jax.Array,
            logsum: jax.Array,
            slopes: Slopes,
            view: View,
        ) -> jax.Array:
            gradient: jax.Array = BACKENDS[name].row_measures_grad(
                logits, ids, row_max, logsum, slopes, **view._asdict(), **form.readout.keywords
            )
            return gradient

        return run

    own, slopes = columns.own(ids, logits.shape[-1]), slopes_of(found, above, columns)
    given = (logits, own, found.row_max, found.logsum, slopes, view)
    return dispatch(form.backend, by, *given, kernel=KERNEL), None, None, None


row_measures.defvjp(_forward, _backward)


def slopes_of(found: RowMeasures, above: RowMeasures, columns: Columns) -> Slopes:
    """The coefficients of the gradient, from the gradients by the measures."""
    logsum, picked, entropy, log_sum_sq, mean = columns.above(
        above.logsum, above.picked, above.entropy, above.log_sum_sq, above.mean_logit
    )
    given = (logsum, entropy, log_sum_sq, mean)
    a, b, d, e = algebra.measure_slopes(jnp, found.entropy, found.log_sum_sq, found.kept, given)
    return Slopes(a, b, picked, d, e)


def ids_of(call: StatsCall, labels: jax.Array, vocab: int) -> jax.Array:
    """The labels and the extra ids."""
    ids: jax.Array = algebra.aligned_ids(
        jnp, labels, call.measures.extra_ids, vocab, call.sequence.ignore_index
    )
    return ids


def view_of(call: StatsCall, shape: tuple[int, ...], dtype: Any) -> View:
    """What each row has of its own, in the dtype that is computed in."""
    heat, _, mask, above, *_ = call.measures
    if heat is not None:
        heat = constant("temperature", jnp.broadcast_to(jnp.asarray(heat, dtype), shape))
        heat = jnp.where(heat > 0, 1 / heat, jnp.nan)  # what a temperature cannot be
    if above is not None:
        above = constant("keep_above", jnp.asarray(above, dtype))
    return View(heat, None if mask is None else jnp.asarray(mask), above)


def of_logits(
    call: StatsCall, logits: jax.Array, labels: jax.Array, columns: Columns
) -> tuple[jax.Array, RowMeasures]:
    """The ids and the measures of the rows here, from their aligned labels; differentiable."""
    ids = ids_of(call, labels, columns.vocabulary(logits.shape[-1]))
    view = view_of(call, labels.shape, computed_in(logits))
    form = Form(call.measures.wanted(call.entropy), call.backend, call.readout)
    return ids, row_measures(form, logits, ids, view, columns)


def label_statistics(rows: algebra.Rows, own: Rows, found: RowMeasures) -> algebra.Statistics:
    """What the rows of whole sequences have to know of each other."""
    row_max, logsum, picked = own.whole((found.row_max, found.logsum, found.picked[..., 0]))
    ids, picked = rows.labels[..., None], picked[..., None]
    stats: algebra.Statistics = algebra.measured(jnp, ids, row_max, logsum, picked, None)[0]
    return stats


def named(call: StatsCall, ids: jax.Array, found: RowMeasures) -> dict[str, Any]:
    """The measures under their names in ``TokenStats``, where they are the row's own."""
    asked = call.measures
    _, extra = algebra.measured(jnp, ids, found.row_max, found.logsum, found.picked, None)
    more: dict[str, Any] = {
        name: getattr(found, name) if name in asked.extras else None for name in EXTRAS
    }
    more["extra_logprob"] = None if asked.extra_ids is None else extra
    entropy = found.entropy
    if entropy is not None and not asked.entropy_grad:
        entropy = jax.lax.stop_gradient(entropy)
    return more | {"entropy": entropy}
