"""The pass over logits that are never stored: chunks of rows, from the last to the first.

A chunk's logits are computed, read once and overwritten by their gradient, which goes into two
matrix products; the value of its first row is all that the chunk before it needs to know. Weights
are ``[V, D]``: as [D, V] they would be transposed once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from irl_ops import algebra
from irl_ops.jax import private, tiles
from irl_ops.jax.shards import Columns
from irl_ops.jax.tiles import in_rows, in_tiles
from irl_ops.kernels import reference
from irl_ops.readout import Readout

Carry = Any
Body = Callable[[Carry, Any, int], tuple[Carry, Any]]


class Chunk(NamedTuple):
    """What a pass takes at a time."""

    rows: int
    tiled: bool = False  # the loop holds matrices in tiles


class Layer(NamedTuple):
    """What the logits are made of; differentiable."""

    hidden: jax.Array  # [..., T, D]
    weight: jax.Array  # [V, D]
    bias: jax.Array | None  # [V]

    def looped(self, chunk: Chunk) -> Looped:
        """As the body of a loop over chunks reads it."""
        hidden, weight = in_rows(self.hidden), self.weight
        if chunk.tiled:
            weight = in_tiles(weight)
            hidden = hidden if chunk.rows % tiles.ROWS else in_tiles(hidden)
        return Looped(hidden, weight, self.bias)

    def alike(self, *others: Any) -> Layer:
        """With types that vary over the axes of a ``shard_map`` that any of these vary over.

        Where a part is the same on all devices of an axis, its gradient is summed over them, once.
        """
        hidden, weight, bias = self
        for other in jax.tree.leaves((self, others)):
            hidden = private.varying(hidden, other)
        return Layer(
            hidden,
            private.varying(weight, hidden),
            None if bias is None else private.varying(bias, hidden),
        )


class Looped(NamedTuple):
    """A layer as a loop holds it, and as the loop's body asks for it."""

    held_hidden: jax.Array  # [N, D] or [N / 8, 8, D]
    held_weight: jax.Array  # [V, D] or [V / 8, 8, D]
    bias: jax.Array | None  # [V]

    def hidden(self, start: Any, size: int) -> jax.Array:
        """``[size, D]``, of the rows of a chunk."""
        held = self.held_hidden
        per_tile = 1 if held.ndim == 2 else tiles.ROWS
        return in_rows(lax.dynamic_slice_in_dim(held, start // per_tile, size // per_tile))

    @property
    def weight(self) -> jax.Array:
        """``[V, D]``."""
        return in_rows(self.held_weight)


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def logits_of(hidden: jax.Array, layer: Looped) -> jax.Array:
    """The logits of some rows, rounded as those of a dense layer are; neither scaled nor capped."""
    over = (((1,), (1,)), ((), ()))
    x = lax.dot_general(hidden, layer.weight, over, preferred_element_type=hidden.dtype)
    return x if layer.bias is None else x + layer.bias


def label_logit(layer: Layer, labels: jax.Array, readout: Readout, chunk: Chunk) -> jax.Array:
    """``q[label]`` by gathered rows of the weight, unrounded; 0 without a label, NaN for a bad one.

    Of a chunk at a time too, for the gathered rows are as large as the hidden states.
    """
    looped, flat, vocab = layer.looped(chunk), labels.reshape(-1), layer.weight.shape[0]

    def body(carry: None, start: Any, size: int) -> tuple[None, jax.Array]:
        hidden, label = looped.hidden(start, size), lax.dynamic_slice_in_dim(flat, start, size)
        column = jnp.clip(label, 0, vocab - 1)
        x = jnp.sum(_wide(hidden) * _wide(looped.weight[column]), -1)
        x = x if looped.bias is None else x + _wide(looped.bias[column])
        q = reference.capped(x, *readout)
        return None, jnp.where(label < 0, 0.0, jnp.where(label >= vocab, jnp.nan, q))

    picked: jax.Array = backwards(body, None, flat.shape[0], chunk)[1]
    return picked.reshape(labels.shape)


def backwards(body: Body, carry: Carry, rows: int, chunk: Chunk) -> tuple[Carry, Any]:
    """``body(carry, start, size)`` on chunk after chunk, the last first; outputs ``[rows, ...]``.

    Rows that fill no chunk are the last ones, and come first.
    """
    size = chunk.rows
    whole, rest = divmod(rows, size)
    if rest:
        carry, tail = body(carry, whole * size, rest)
        if not whole:
            return carry, tail
    carry, outputs = lax.scan(
        lambda carry, i: body(carry, i * size, size), carry, jnp.arange(whole), reverse=True
    )
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    if rest:
        outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, tail)
    return carry, outputs


class Sums(NamedTuple):
    """The sums that every chunk adds its part of the gradients to."""

    weight: jax.Array  # [V, D], or as the loop holds the layer's
    bias: jax.Array | None  # [V]

    def whole(self) -> Sums:
        """With the weight's ``[V, D]``."""
        return self._replace(weight=in_rows(self.weight))

    @classmethod
    def zeros(cls, layer: Looped, accumulate: str) -> Sums:
        """In the weight's dtype for ``accumulate="weight"``, otherwise in float32."""

        def like(x: jax.Array) -> jax.Array:
            return jnp.zeros_like(x if accumulate == "weight" else _wide(x))

        bias = None if layer.bias is None else jnp.zeros_like(_wide(layer.bias))
        zeros: Sums = jax.tree.map(
            lambda x: private.varying(x, layer.held_hidden), cls(like(layer.held_weight), bias)
        )
        return zeros

    def add(self, dx: jax.Array, hidden: jax.Array, layer: Looped) -> tuple[Sums, jax.Array]:
        """With a chunk's, and the gradient of its hidden states."""
        dhidden = lax.dot_general(
            dx, layer.weight, (((1,), (0,)), ((), ())), preferred_element_type=hidden.dtype
        )
        rows, bias = (((0,), (0,)), ((), ())), self.bias
        weight = in_rows(self.weight) + lax.dot_general(
            dx, hidden, rows, preferred_element_type=self.weight.dtype
        )
        if bias is not None:  # a product with ones: XLA sums columns slowly
            ones = jnp.ones(dx.shape[:1], dx.dtype)
            bias = bias + lax.dot_general(dx, ones, rows, preferred_element_type=bias.dtype)
        return Sums(weight.reshape(self.weight.shape), bias), dhidden


class Linear:
    """The pass with its gradients, for ``algebra.loss_and_grad``."""

    def __init__(
        self,
        kernels: ModuleType,
        layer: Layer,
        readout: Readout,
        chunk: Chunk,
        accumulate: str,
        drop: bool,
    ) -> None:
        self.kernels, self.layer, self.readout = kernels, layer, readout
        self.chunk, self.accumulate, self.drop = chunk, accumulate, drop

    def label_logit(self, labels: jax.Array) -> jax.Array:
        """``q[label]``, for the neighbour's coefficients alone."""
        return label_logit(self.layer, labels, self.readout, self.chunk)

    def stats_grad(
        self, labels: jax.Array, given: algebra.Coefficients, finish: algebra.Finish
    ) -> tuple[tuple[jax.Array, Sums], algebra.Finished]:
        """The gradients of the layer, and what was finished."""
        layer, kernels, readout = self.layer.looped(self.chunk), self.kernels, self.readout.keywords

        def like(x: jax.Array) -> jax.Array:
            return private.varying(x, layer.held_hidden)

        def body(carry: Carry, start: Any, size: int) -> tuple[Carry, Any]:
            def window(x: Any) -> Any:
                if x is None:
                    return None
                return lax.dynamic_slice_in_dim(x.reshape(-1), start, size)

            alpha, beta, entropy_weight = (window(x) for x in given)

            def work(carry: Carry) -> tuple[Carry, Any]:
                sums, behind = carry
                hidden = layer.hidden(start, size)
                x, label = logits_of(hidden, layer), window(labels)
                picked = kernels.label_logit(x, label, **readout)
                # looked at before they are overwritten; see ``scalar_loss.Dense``
                zeros = 0.0 * jnp.where(jnp.isfinite(picked), picked, 0.0)
                row_max, logsum, entropy, dx = kernels.row_stats_grad(
                    x, alpha + zeros, beta, entropy_weight, **readout
                )
                done = finish(window, row_max, logsum, picked, entropy, behind)
                seen = picked if readout else None
                dx = kernels.set_label(dx, label, done.element, seen, **readout)
                sums, dhidden = sums.add(dx, hidden, layer)
                return (sums, done.stats.value[:1]), (dhidden, done)

            def skip(carry: Carry) -> tuple[Carry, Any]:
                out = jax.eval_shape(work, carry)[1]
                zeros = jax.tree.map(lambda x: like(jnp.zeros(x.shape, x.dtype)), out)
                return (carry[0], nothing), zeros

            if not self.drop:
                return work(carry)
            # rows that nobody needs cost no product; the device decides
            needed = jnp.any(alpha != algebra.UNREAD)
            made: tuple[Carry, Any] = lax.cond(needed, work, skip, carry)
            return made

        nothing = like(jnp.zeros(1, given.beta.dtype))
        carry = (Sums.zeros(layer, self.accumulate), nothing)
        (sums, _), (dhidden, done) = backwards(body, carry, labels.size, self.chunk)
        done = jax.tree.map(lambda x: x.reshape(labels.shape), done)
        return (dhidden.reshape(self.layer.hidden.shape), sums.whole()), done


def row_stats(
    kernels: ModuleType,
    layer: Layer,
    labels: jax.Array,
    columns: Columns,
    readout: Readout,
    chunk: Chunk,
    entropy: bool,
) -> Any:
    """``(row_max, logsum, label_logit, entropy)`` of every row, over the columns that are here."""
    looped, flat = layer.looped(chunk), labels.reshape(-1)

    def body(carry: None, start: Any, size: int) -> tuple[None, Any]:
        hidden, label = looped.hidden(start, size), lax.dynamic_slice_in_dim(flat, start, size)
        x = columns.masked(logits_of(hidden, looped))
        return None, kernels.row_stats(x, label, entropy, **readout.keywords)

    _, stats = backwards(body, None, flat.shape[0], chunk)
    return jax.tree.map(lambda x: x.reshape(labels.shape), stats)


def row_grad(
    kernels: ModuleType,
    layer: Layer,
    readout: Readout,
    chunk: Chunk,
    accumulate: str,
    drop: bool,
    columns: Columns,
    *vectors: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """The gradients of the layer, from (labels, row_max, logsum, a, b, c), by logits made again.

    The labels are those of the columns that are here. None for b is 0.
    """
    looped, flat = layer.looped(chunk), [jnp.ravel(x) for x in vectors if x is not None]
    if len(flat) < len(vectors):
        flat.insert(4, jnp.zeros_like(flat[3]))

    def body(sums: Sums, start: Any, size: int) -> tuple[Sums, jax.Array]:
        hidden = looped.hidden(start, size)
        seen = [lax.dynamic_slice_in_dim(x, start, size) for x in flat]

        def work(sums: Sums) -> tuple[Sums, jax.Array]:
            x = columns.masked(logits_of(hidden, looped))
            dx = kernels.row_grad(x, *seen, **readout.keywords)
            return sums.add(dx, hidden, looped)

        if not drop:
            return work(sums)
        wanted = jnp.any((seen[3] != 0) | (seen[4] != 0) | (seen[5] != 0))
        made: tuple[Sums, jax.Array] = lax.cond(
            wanted,
            work,
            lambda sums: (sums, private.varying(jnp.zeros_like(hidden), hidden)),
            sums,
        )
        return made

    sums = Sums.zeros(looped, accumulate)
    sums, dhidden = backwards(body, sums, flat[0].shape[0], chunk)
    return dhidden.reshape(layer.hidden.shape), sums.whole()
