"""What a program is made for, and what it takes: the records of a call in two halves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.jax.backends import BACKENDS, check_backend
from irl_ops.jax.rows import constant
from irl_ops.measures import Measures

STATIC = {
    "ignore_index", "shift", "eos_token_id", "boundary", "reduction", "detach_next",
    "entropy", "metrics", "inplace", "backend", "readout", "entropy_grad", "extras",
}  # fmt: skip
"""The options that a program is made for; all others are arrays, or numbers that it takes."""

RECORDS = (algebra.Sequence, algebra.Weighting, algebra.Terms, algebra.Heads, Measures)


def part(call: Any, logits: Any) -> tuple[Any, Any]:
    """A call twice: what a program is made for, which is hashable, and what it takes.

    None stands for the fields that are in the other half, and for options that are absent.
    """
    backend = serving(call.backend, logits)
    measures = getattr(call, "measures", None)
    if measures is not None and not measures.plain:
        refuse_measures(backend)
    call = call._replace(backend=backend)
    return _half(call, True), _half(call, False)


def join(static: Any, traced: Any) -> Any:
    """The call that ``part`` took apart."""
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


def rows_of(labels: jax.Array, vocab: int, sequence: algebra.Sequence) -> algebra.Rows:
    """The labels aligned with their logits, int32, and the kind of every row."""
    rows = algebra.align(jnp, labels, vocab, sequence)
    return rows._replace(labels=rows.labels.astype(jnp.int32))


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
