"""Row statistics that can be differentiated once, in reverse."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops.jax.backends import BACKENDS, dispatch
from irl_ops.jax.shards import Columns
from irl_ops.readout import Readout

RowStats = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def row_stats(
    logits: jax.Array,
    labels: jax.Array,
    columns: Columns,
    entropy: bool,
    backend: str,
    readout: Readout,
) -> RowStats:
    """``(row_max, logsum, label_logit, entropy)`` of every row; see ``irl_ops.kernels.reference``.

    ``row_max`` counts as a constant: whatever is computed from it has to depend on the sum
    ``row_max + logsum`` alone, whose gradient is p. Where the columns are spread over devices,
    labels and statistics are those of whole rows.
    """
    return _statistics(columns.masked(logits), labels, columns, entropy, backend, readout)


def _statistics(
    logits: jax.Array,
    labels: jax.Array,
    columns: Columns,
    entropy: bool,
    backend: str,
    readout: Readout,
) -> RowStats:
    def by(name: str) -> Any:
        return functools.partial(BACKENDS[name].row_stats, entropy=entropy, **readout.keywords)

    own = columns.own(labels, logits.shape[-1])
    stats: RowStats = columns.merged(labels, dispatch(backend, by, logits, own), logits.shape[-1])
    return stats


def _forward(
    logits: jax.Array,
    labels: jax.Array,
    columns: Columns,
    entropy: bool,
    backend: str,
    readout: Readout,
) -> tuple[RowStats, Any]:
    logits = columns.masked(once(logits))
    stats = _statistics(logits, labels, columns, entropy, backend, readout)
    row_max, logsum, _, h = stats
    return stats, (logits, labels, columns, row_max, logsum, h)


def _backward(
    entropy: bool, backend: str, readout: Readout, saved: Any, above: RowStats
) -> tuple[jax.Array | None, None, None]:
    logits, labels, columns, row_max, logsum, h = saved
    labels = columns.own(labels, logits.shape[-1])
    dlogsum, dlabel_logit, dh = columns.above(*above[1:])
    coefficients = row_coefficients(h, dlogsum, dlabel_logit, dh)
    dlogits = row_grad(backend, readout, logits, labels, row_max, logsum, *coefficients)
    return dlogits, None, None


row_stats.defvjp(_forward, _backward)


def row_grad(backend: str, readout: Readout, *arrays: jax.Array | None) -> jax.Array:
    """``p_j (A + B log p_j) + C 1{j = label}`` of (logits, labels, row_max, logsum, a, b, c).

    None for B is 0.
    """
    by = functools.partial(row_grad_of, readout=readout)
    gradient: jax.Array = dispatch(backend, by, *arrays)
    return gradient


def row_grad_of(name: str, readout: Readout) -> Any:
    """``row_grad`` of the backend of that name, which may be given None for B."""
    made = functools.partial(BACKENDS[name].row_grad, **readout.keywords)
    if name == "pallas":  # takes None: a term of zeros makes XLA store dlogits on v7x
        return made

    def run(*arrays: Any) -> Any:
        *others, a, b, c = arrays
        return made(*others, a, jnp.zeros_like(a) if b is None else b, c)

    return run


def row_coefficients(
    entropy: jax.Array | None, dlogsum: jax.Array, dlabel_logit: jax.Array, dh: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """A, B, C of ``row_grad`` from the statistics' gradients: dH/dq_j = -p_j (log p_j + H).

    B is None where it is 0.
    """
    if entropy is None or dh is None:
        return dlogsum, None, dlabel_logit
    return dlogsum - jnp.where(dh != 0, dh * entropy, 0.0), -dh, dlabel_logit


@jax.custom_jvp
def once(x: jax.Array) -> jax.Array:
    """``x``, at the start of a pass that prepares a gradient: a second one would come by here."""
    return x


@once.defjvp
def _refuse_second(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("irl_ops: second derivatives are not implemented")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def constant(name: str, x: jax.Array) -> jax.Array:
    """``x``, an argument that the loss is not differentiated by."""
    return x


@constant.defjvp
def _refuse_derivative(name: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"{name} is differentiated, which this loss does not compute; accepted: "
        f"jax.lax.stop_gradient({name}), or a loss written on the outputs of token_stats"
    )
