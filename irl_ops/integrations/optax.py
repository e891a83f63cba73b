"""IQLearn where a program calls ``optax.softmax_cross_entropy_with_integer_labels``."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops.integrations.jax_batches import integers
from irl_ops.jax import iqlearn_loss


def softmax_cross_entropy_with_integer_labels(
    logits: Any,
    labels: Any,
    axis: int | tuple[int, ...] = -1,
    where: Any = None,
    **options: Any,
) -> jax.Array:
    """Offline IQLearn for each token, with the name, arguments and shapes of optax's function.

    The change is the import. ``lam=0`` gives what optax gives. As there, logits[t] scores
    labels[t], and what comes back is summed and divided by the caller; unlike there, the last axis
    of the labels is a sequence, whose rows read the next one: labels of one axis are refused unless
    something says where sequences end, and rows that nobody scores belong into ``where`` (or have
    the label -100), not only into a product with the result.

    Args:
        logits: float ``[..., T, V]``, with the vocabulary in ``axis``.
        labels: integers ``[..., T]``.
        axis: the vocabulary's axis, or several that are one, in the order of their flat index.
        where: bool ``[..., T]``: False in rows that carry no label, whose result is 0; or of the
            logits' shape: False for columns that have no probability.
        **options: of ``irl_ops.jax.iqlearn_loss``, such as ``lam``, ``gamma``, ``segment_ids``,
            ``eos_token_id``; ``reduction`` is "none".

    Returns:
        float32 ``[..., T]``.

    Raises:
        TypeError: labels that are no integers; ``reduction`` or ``shift`` among the options.
        ValueError: an axis that the logits do not have, a shape, or an option's value.
    """
    for name in ("reduction", "shift", "num_items"):
        if name in options:
            raise TypeError(
                f"softmax_cross_entropy_with_integer_labels has no option {name!r}: it returns "
                "losses of tokens for labels that are aligned; accepted: irl_ops.jax.iqlearn_loss"
            )
    logits, labels = jnp.asarray(logits), integers(labels)
    ends = ("segment_ids", "position_ids", "cu_seqlens")
    if labels.ndim < 2 and all(options.get(name) is None for name in ends):
        raise ValueError(
            f"labels have shape {list(labels.shape)}: is this axis a batch, or a sequence whose "
            f"rows read the next? accepted: [..., T] with a batch before it, or {', '.join(ends)}"
        )
    logits, columns = _classes_last(logits, axis, where)
    if columns is None and where is not None:
        options["where"] = jnp.asarray(where, bool)
    elif columns is not None:
        logits = jnp.where(columns, logits, -jnp.inf)
        options["where"] = columns.any(-1)
    losses: jax.Array = iqlearn_loss(logits, labels, reduction="none", **options)
    return losses


def _classes_last(
    logits: jax.Array, axis: int | tuple[int, ...], where: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Logits, and a mask of their columns, with one axis of classes behind the others."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for one in axes:
        if not -logits.ndim <= one < logits.ndim:
            raise ValueError(f"axis is {axis}; accepted: axes of logits {list(logits.shape)}")
    axes = tuple(one % logits.ndim for one in axes)
    rows = [one for one in range(logits.ndim) if one not in axes]

    def last(x: jax.Array) -> jax.Array:
        moved = x.transpose(*rows, *axes)
        return moved.reshape(*moved.shape[: len(rows)], math.prod(moved.shape[len(rows) :]))

    masks = where is not None and jnp.ndim(where) == logits.ndim
    columns = last(jnp.broadcast_to(jnp.asarray(where, bool), logits.shape)) if masks else None
    return last(logits), columns
