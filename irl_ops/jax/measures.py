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
def row_measures(form: Form, logits: jax.Array, ids: jax.Array, view: View) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``; ``row_max`` counts as a constant."""

    def by(name: str) -> Any:
        def run(logits: jax.Array, ids: jax.Array, view: View) -> RowMeasures:
            measures: RowMeasures = BACKENDS[name].row_measures(
                logits, ids, form.wanted, **view._asdict(), **form.readout.keywords
            )
            return measures

        return run

    found: RowMeasures = dispatch(form.backend, by, logits, ids, view, kernel=KERNEL)
    return found


def _forward(
    form: Form, logits: jax.Array, ids: jax.Array, view: View
) -> tuple[RowMeasures, tuple[Any, ...]]:
    logits = once(logits)
    found = row_measures(form, logits, ids, view)
    return found, (logits, ids, view, found)


def _backward(form: Form, saved: tuple[Any, ...], above: RowMeasures) -> tuple[Any, ...]:
    logits, ids, view, found = saved

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

    slopes = slopes_of(found, above)
    given = (logits, ids, found.row_max, found.logsum, slopes, view)
    return dispatch(form.backend, by, *given, kernel=KERNEL), None, None


row_measures.defvjp(_forward, _backward)


def slopes_of(found: RowMeasures, above: RowMeasures) -> Slopes:
    """The coefficients of the gradient, from the gradients by the measures."""
    given = (above.logsum, above.entropy, above.log_sum_sq, above.mean_logit)
    a, b, d, e = algebra.measure_slopes(jnp, found.entropy, found.log_sum_sq, found.kept, given)
    return Slopes(a, b, above.picked, d, e)


def ids_of(call: StatsCall, rows: algebra.Rows, vocab: int) -> jax.Array:
    """The labels and the extra ids."""
    ids: jax.Array = algebra.aligned_ids(
        jnp, rows.labels, call.measures.extra_ids, vocab, call.sequence.ignore_index
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


def statistics(
    call: StatsCall, logits: jax.Array, rows: algebra.Rows
) -> tuple[algebra.Statistics, dict[str, jax.Array | None]]:
    """Row statistics, and the fields of ``TokenStats`` beyond them; differentiable."""
    ids = ids_of(call, rows, logits.shape[-1])
    view = view_of(call, rows.labels.shape, computed_in(logits))
    form = Form(call.measures.wanted(call.entropy), call.backend, call.readout)
    return named(call, ids, row_measures(form, logits, ids, view))


def named(
    call: StatsCall, ids: jax.Array, found: RowMeasures
) -> tuple[algebra.Statistics, dict[str, jax.Array | None]]:
    """The measures under their names in ``TokenStats``."""
    asked = call.measures
    stats, extra = algebra.measured(
        jnp, ids, found.row_max, found.logsum, found.picked, found.entropy
    )
    more = {name: getattr(found, name) if name in asked.extras else None for name in EXTRAS}
    return stats, more | {"extra_logprob": None if asked.extra_ids is None else extra}
