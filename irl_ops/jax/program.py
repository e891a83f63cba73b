"""What a program is made for, and what it takes: the records of a call in two halves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.call import Call, Parallel, StatsCall
from irl_ops.jax.backends import BACKENDS, check_backend
from irl_ops.jax.rows import constant
from irl_ops.jax.shards import Columns, Rows
from irl_ops.measures import Measures

STATIC = {
    "ignore_index", "shift", "eos_token_id", "boundary", "reduction", "detach_next",
    "entropy", "metrics", "inplace", "backend", "readout", "entropy_grad", "extras",
    "vocab_group", "vocab_size", "sequence_group",
}  # fmt: skip
"""The options that a program is made for; all others are arrays, or numbers that it takes."""

RECORDS = (
    algebra.Sequence, algebra.Weighting, algebra.Terms, algebra.Heads, Measures,
    Call, StatsCall, Parallel,
)  # fmt: skip


class Placed(NamedTuple):
    """A call, and which part of its rows and columns is on this device."""

    call: Any
    parallel: Parallel


def part(call: Any, parallel: Parallel, logits: Any) -> tuple[Any, Any]:
    """A call twice: what a program is made for, which is hashable, and what it takes.

    None stands for the fields that are in the other half, and for options that are absent.
    """
    backend = serving(call.backend, logits)
    measures = getattr(call, "measures", None)
    if measures is not None and not measures.plain:
        refuse_measures(backend)
    placed = Placed(call._replace(backend=backend), parallel)
    return _half(placed, True), _half(placed, False)


def join(static: Any, traced: Any) -> Any:
    """What ``part`` took apart."""
    return static._make(
        join(a, b) if isinstance(a, RECORDS) else (b if a is None else a)
        for a, b in zip(static, traced, strict=True)
    )


def _half(record: Any, static: bool) -> Any:
    return record._make(
        _half(x, static) if isinstance(x, RECORDS) else (x if (name in STATIC) == static else None)
        for name, x in zip(record._fields, record, strict=True)
    )


def serving(backend: str, logits: Any) -> str:
    """The backend by name, "auto" where it is chosen when the program is lowered.

    Raises:
        ValueError: it cannot serve the logits; says why.
    """
    name = check_backend(backend, logits)
    if logits.dtype != jnp.float64 or name == "reference":
        return name
    if name != "auto":
        raise ValueError(
            f"backend {name!r} cannot serve float64 logits; accepted: 'reference', 'auto'"
        )
    return "reference"


def refuse_measures(backend: str) -> None:
    """Raises where a backend that was named has plain row kernels alone."""
    if backend != "auto" and not hasattr(BACKENDS[backend], "row_measures"):
        raise ValueError(
            f"backend {backend!r} has no kernels for a temperature by row, extra_ids, keep_mask, "
            "keep_above and extras; accepted: 'auto', 'reference'"
        )


def computed_in(logits: Any) -> Any:
    """The dtype of statistics, weights and loss."""
    return jnp.float64 if logits.dtype == jnp.float64 else jnp.float32


class Whole(NamedTuple):
    """A call with whole sequences, whatever of them is on this device."""

    rows: algebra.Rows  # the labels int32
    call: Any
    own: Rows
    columns: Columns


def whole(labels: jax.Array, width: int, placed: Placed) -> Whole:
    """The labels aligned with their logits, and the kind of every row.

    Where sequences are spread over devices, all that is known of each row is gathered first.
    """
    call, given = placed
    columns = Columns(given.vocab_group, given.vocab_size, given.vocab_start)
    own = Rows.over(given.sequence_group, given.sequence_order)
    labels, call = _gathered(own, labels, call)
    rows = algebra.align(jnp, labels, columns.vocabulary(width), call.sequence)
    rows = rows._replace(labels=own.checked(rows.labels.astype(jnp.int32)))
    return Whole(rows, call, own, columns)


PER_ROW = {
    "sequence": ("where", "segment_ids", "position_ids", "truncated"),
    "heads": ("values", "next_values"),
    "weighting": ("token_weights",),
    "terms": ("is_expert",),
}
"""The arrays ``[..., T]`` of a call; two of them may have one flag per sequence instead."""


def _gathered(own: Rows, labels: jax.Array, call: Any) -> tuple[jax.Array, Any]:
    found = {
        (record, name): getattr(getattr(call, record), name)
        for record, names in PER_ROW.items()
        if hasattr(call, record)
        for name in names
    }
    found = {key: x for key, x in found.items() if x is not None and x.ndim == labels.ndim}
    heads = {key: found.pop(key) for key in list(found) if key[0] == "heads"}
    labels, found = own.whole((labels, found))
    found |= own.whole(heads)  # apart: these alone are differentiated by
    for (record, name), x in found.items():
        call = call._replace(**{record: getattr(call, record)._replace(**{name: x})})
    return labels, call


def objective(rows: algebra.Rows, call: Any, dtype: Any) -> algebra.Objective:
    """The weights of the loss's terms."""
    terms = jax.tree.map(
        lambda x: x if x is call.terms.is_expert else jnp.asarray(x, dtype), call.terms
    )
    given, items = call.weighting.token_weights, call.weighting.num_items
    if given is None:
        given = jnp.ones(rows.kind.shape, dtype)
    else:
        given = constant("token_weights", given.astype(dtype))
    weighting = call.weighting._replace(
        token_weights=given,
        num_items=items and tuple(jnp.asarray(x, dtype) for x in items),
    )
    loss = algebra.weigh(jnp, rows.kind, terms, weighting)
    return loss._replace(gamma=jnp.asarray(loss.gamma, dtype))


def heads_of(heads: algebra.Heads, dtype: Any) -> algebra.Heads:
    """The values in the dtype that is computed in."""
    values, next_values = (
        None if x is None else x.astype(dtype) for x in (heads.values, heads.next_values)
    )
    return heads._replace(values=values, next_values=next_values)
