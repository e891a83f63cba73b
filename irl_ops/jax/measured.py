"""The row measures as operations that a backend lowers as it can.

An operation takes no arrays that are None: those that are there are named in ``names``, a flag of
its program as ``wanted`` is. What a backend runs is given the arguments of ``row_measures`` or
``row_measures_grad`` below.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from irl_ops.jax.operation import Function, OverColumns, operation, vector_like
from irl_ops.kernels.reference import measures
from irl_ops.kernels.reference.measures import RowMeasures, Slopes

VIEW = ("row_scale", "keep_mask", "keep_above")
SLOPES = ("b", "d", "e")  # those that may be None
OPTIONAL = RowMeasures._fields[3:]


def row_measures(
    logits: jax.Array,
    ids: jax.Array,
    *given: jax.Array,
    names: tuple[str, ...] = (),
    wanted: tuple[str, ...] = (),
    **readout: Any,
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``; ``given`` are those of ``VIEW`` in ``names``."""
    options = readout | dict(zip(names, given, strict=True))
    found = measures.row_measures(logits, ids, wanted, **options)
    return found._replace(top1=None if found.top1 is None else found.top1.astype(jnp.int32))


def row_measures_grad(
    logits: jax.Array,
    ids: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    c: jax.Array,
    *given: jax.Array,
    names: tuple[str, ...] = (),
    **readout: Any,
) -> jax.Array:
    """Likewise; ``given`` are those of ``SLOPES`` and ``VIEW`` in ``names``."""
    slopes, view = slopes_and_view(a, c, dict(zip(names, given, strict=True)))
    options = readout | view
    made: jax.Array = measures.row_measures_grad(logits, ids, row_max, logsum, slopes, **options)
    return made


def slopes_and_view(
    a: jax.Array, c: jax.Array, given: dict[str, jax.Array]
) -> tuple[Slopes, dict[str, jax.Array]]:
    """What comes behind the statistics, as the reference kernel takes it."""
    b, d, e = (given.get(name) for name in SLOPES)
    return Slopes(a, b, c, d, e), {n: x for n, x in given.items() if n in VIEW}


def measures_operation(over_columns: OverColumns | None = None, **chosen: Any) -> Function:
    """The reference's ``row_measures``, which becomes what is ``chosen``; see ``operation``."""
    bound = operation(row_measures, over_columns, beside=((1,), (2,)), **chosen)

    def run(logits: Any, ids: Any, wanted: tuple[str, ...] = (), **options: Any) -> RowMeasures:
        view = {name: options.pop(name) for name in VIEW if options.get(name) is not None}
        readout = {name: x for name, x in options.items() if name not in VIEW}
        found: RowMeasures = bound(
            logits, ids, *view.values(), names=tuple(view), wanted=tuple(wanted), **readout
        )
        # the default integers, as the reference has them
        return found._replace(top1=None if found.top1 is None else found.top1.astype(int))

    return run


def gradient_operation(over_columns: OverColumns | None = None, **chosen: Any) -> Function:
    """The reference's ``row_measures_grad``, likewise."""
    bound = operation(row_measures_grad, over_columns, beside=((1, 5), ()), **chosen)

    def run(
        logits: Any, ids: Any, row_max: Any, logsum: Any, slopes: Slopes, **options: Any
    ) -> jax.Array:
        named = {name: getattr(slopes, name) for name in SLOPES}
        named |= {name: options.pop(name, None) for name in VIEW}
        given = {name: x for name, x in named.items() if x is not None}
        vectors = (row_max, logsum, slopes.a, slopes.c, *given.values())
        made: jax.Array = bound(logits, ids, *vectors, names=tuple(given), **options)
        return made

    return run


def results(logits: jax.Array, ids: jax.Array, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The types of what a kernel returns, by name: ``kept`` belongs to ``mean_logit``."""
    asked = (*wanted, "kept") if "mean_logit" in wanted else wanted
    types = {"row_max": vector_like(logits), "logsum": vector_like(logits)}
    types["picked"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32)  # type: ignore[no-untyped-call]
    for name in OPTIONAL:
        if name in asked:
            types[name] = vector_like(logits)
    if "top1" in asked:
        types["top1"] = jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int32)  # type: ignore[no-untyped-call]
    return types


def named(found: dict[str, jax.Array]) -> RowMeasures:
    """The record of what was computed."""
    return RowMeasures(*(found.get(name) for name in RowMeasures._fields))
