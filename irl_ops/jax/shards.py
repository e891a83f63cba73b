"""Rows and columns that are spread over axes of a ``shard_map``, and how the whole is had of them.

Columns: every device reads its own, and the statistics of all are gathered, a few numbers per row.
Rows: labels and statistics, a few numbers per row, are gathered into whole sequences, on which
every device does the same scalar algebra; of the result it takes its own rows back. Nothing as wide
as a row is moved, and all devices of an axis compute the same bits.

Everything is differentiated by JAX's own rules, apart from the row kernels: gradients agree with
those of a loss that is written with the collectives of ``jax.lax``, with ``check_vma`` and without.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from irl_ops import algebra
from irl_ops.algebra import shards
from irl_ops.jax import private
from irl_ops.jax.options import Axis

STATIC = {"static": True}  # what a program is made for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """Which columns of the vocabulary a device has."""

    axis: Axis | None = field(default=None, metadata=STATIC)
    # how many the vocabulary has, where padding follows them
    size: int | None = field(default=None, metadata=STATIC)
    # the first here, a number or 0-d; None where all devices have as many
    start: Any = None

    def vocabulary(self, width: int) -> int:
        """Its size, of which a device has ``width`` columns."""
        if self.size is not None:
            return self.size
        return width if self.axis is None else width * lax.axis_size(self.axis)

    def own(self, labels: jax.Array, width: int) -> jax.Array:
        """Labels as the kernels take them that are given ``width`` columns."""
        if self.axis is None:
            return labels
        here: jax.Array = shards.labels_here(jnp, labels, self._first(width), width)
        return here

    def masked(self, logits: jax.Array) -> jax.Array:
        """The logits, with -inf in columns behind the vocabulary."""
        if self.axis is None or self.size is None:
            return logits
        width, count = logits.shape[-1], lax.axis_size(self.axis)
        spare = count * width - self.size
        if self.start is None and spare == 0:
            return logits
        if self.start is not None or spare > width:
            inside = jnp.arange(width) + self._first(width) < self.size
            return jnp.where(inside, logits, -jnp.inf)
        # the last device has them all; where the logits are not read later, no other column moves
        last = lax.axis_index(self.axis) == count - 1
        tail = jnp.where(last, -jnp.inf, logits[..., width - spare :])
        return lax.dynamic_update_slice_in_dim(logits, tail, width - spare, logits.ndim - 1)

    def merged(self, labels: jax.Array, stats: Any, width: int) -> Any:
        """``(row_max, logsum, label_logit, entropy)`` of whole rows, by one collective."""
        if self.axis is None:
            return stats
        every = private.gather(jnp.stack([x for x in stats if x is not None]), self.axis)
        parts = [*jnp.moveaxis(every, 1, 0), None]
        return tuple(
            shards.merge(jnp, labels, shards.RowStatistics(*parts[:4]), self.vocabulary(width))
        )

    def merged_measures(self, ids: jax.Array, found: Any, width: int) -> Any:
        """The fields of ``RowMeasures``, of whole rows: by one collective, and one for ``top1``."""
        if self.axis is None:
            return found
        apart = ("picked", "top1")
        names = [n for n, x in found._asdict().items() if x is not None and n not in apart]
        vectors = jnp.stack([getattr(found, n) for n in names], -1)
        every = private.gather(jnp.concatenate([vectors, found.picked], -1), self.axis)
        given = {n: every[..., i] for i, n in enumerate(names)}
        if found.top1 is not None:
            given["top1"] = private.gather(found.top1 + self._first(width), self.axis)
        parts = found._replace(picked=every[..., len(names) :], **given)
        return shards.merge_measures(jnp, ids, parts, self.vocabulary(width))

    def summed(self, labels: jax.Array, picked: jax.Array) -> jax.Array:
        """The labels' logits of whole rows, which are 0 where another device has the column."""
        if self.axis is None:
            return picked
        every = jnp.sum(private.gather(picked, self.axis), axis=0)
        return jnp.where(labels == algebra.BAD_LABEL, jnp.nan, every)

    def above(self, *gradients: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """Gradients of merged statistics; without ``check_vma`` each device is given a part."""
        return tuple(None if x is None else _above(x, self.axis) for x in gradients)

    def _first(self, width: int) -> Any:
        return lax.axis_index(self.axis) * width if self.start is None else self.start


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Which rows of the sequences a device has: its own, ``[..., T_local]`` of the whole's T."""

    axis: Axis | None = field(default=None, metadata=STATIC)
    # [T_local] or [..., T_local]: the index of each own row in the whole
    order: jax.Array | None = None
    orders: jax.Array | None = None  # of every row, as they are gathered

    @classmethod
    def over(cls, axis: Axis | None, order: jax.Array | None) -> Rows:
        """From the options."""
        if axis is None or order is None:
            return cls(axis)
        return cls(axis, order, _joined(private.gather(order, axis)))

    def whole(self, tree: Any) -> Any:
        """Own arrays as whole ones, by one collective for integers and one for floats."""
        if self.axis is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        out = list(leaves)
        kinds: Any = ((jnp.integer, "int32"), (jnp.floating, "float32"))
        for kind, least in kinds:
            alike = [
                i
                for i, x in enumerate(leaves)
                if jnp.issubdtype(x.dtype, kind) or (x.dtype == bool and kind is jnp.integer)
            ]
            if alike:
                dtype: Any = functools.reduce(
                    jnp.promote_types, [leaves[i].dtype for i in alike], least
                )
                packed = jnp.stack([leaves[i].astype(dtype) for i in alike])
                for i, x in zip(alike, self._gathered(packed), strict=True):
                    out[i] = x.astype(leaves[i].dtype)
        return jax.tree.unflatten(structure, out)

    def own(self, tree: Any) -> Any:
        """This device's rows of whole arrays."""
        return tree if self.axis is None else jax.tree.map(self._own, tree)

    def above(self, gradient: jax.Array) -> jax.Array:
        """As that of ``Columns``, of what is computed from whole rows."""
        return _above(gradient, self.axis)

    def checked(self, labels: jax.Array) -> jax.Array:
        """Whole labels, bad ones where the order leaves out a row, or has one twice."""
        if self.orders is None:
            return labels
        in_order = jnp.sort(self.orders, axis=-1) == jnp.arange(self.orders.shape[-1])
        bad = (labels != algebra.NO_LABEL) & ~jnp.all(in_order, axis=-1, keepdims=True)
        return jnp.where(bad, algebra.BAD_LABEL, labels)

    def _gathered(self, x: jax.Array) -> jax.Array:
        every = _joined(private.gather(x, self.axis))
        ordered: jax.Array = shards.in_order(jnp, every, self.orders)
        return ordered

    def _own(self, x: jax.Array) -> jax.Array:
        if self.order is not None:
            mine: jax.Array = shards.rows_at(jnp, x, self.order)
            return mine
        size = x.shape[-1] // lax.axis_size(self.axis)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * size, size, x.ndim - 1)


def _above(gradient: jax.Array, axis: Axis | None) -> jax.Array:
    if axis is None or private.checks_varying(axis):
        return gradient
    summed: jax.Array = lax.psum(gradient, axis)  # type: ignore[no-untyped-call]
    return summed


def _joined(every: jax.Array) -> jax.Array:
    """``[n, ..., T_local]`` as ``[..., n T_local]``."""
    every = jnp.moveaxis(every, 0, -2)
    return every.reshape(*every.shape[:-2], -1)
