"""The loss of a layer whose columns or rows are on several devices, with its gradient, in one go.

As on one device, chunks go from the last row to the first, in three products each. Of a chunk the
devices exchange its statistics, between the product that makes its logits and those that read them;
a condition that leaves a chunk out stands around the products, never around the exchange. What a
part of a sequence needs of the next one is the value of its first row, which is computed
beforehand, by a product of one row a sequence.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from irl_ops import algebra
from irl_ops.jax import chunks, private
from irl_ops.jax.chunks import Chunk, Layer, Sums
from irl_ops.jax.shards import Columns, Rows
from irl_ops.readout import Readout


class Sharded(NamedTuple):
    """The pass of one device over its part of rows and columns."""

    kernels: ModuleType
    layer: Layer
    columns: Columns
    own: Rows
    readout: Readout
    chunk: Chunk
    accumulate: str
    drop: bool

    def loss_and_grad(
        self, rows: algebra.Rows, loss: algebra.Objective, heads: algebra.Heads
    ) -> algebra.Outcome:
        """Of whole sequences; the gradients of the layer are those of the part here."""
        labels = self.own.own(rows.labels)
        picked = self.own.whole(self._label_logit(labels))
        given = algebra.coefficients(jnp, rows.kind, loss, picked, heads, algebra.NO_EDGE)
        ahead = algebra.given_ahead(jnp, rows.kind, heads)
        edge = self._edge(labels) if ahead is None and loss.td is not None else None
        local = self.own.own((rows, loss.mle, loss.td, given, heads.values, ahead))

        def finish(window: Any, found: Any, behind: jax.Array) -> tuple[Any, Any, Any]:
            (labels, kind), mle, td, seen, values, next_values = jax.tree.map(window, local)
            stats = algebra.statistics(jnp, labels, *found)
            if next_values is None:
                next_values = algebra.following(jnp, stats.value, behind)
                if edge is not None:
                    last, beyond = map(window, edge)
                    next_values = jnp.where(last, beyond, next_values)
            near = heads._replace(values=values, next_values=next_values)
            part = loss._replace(mle=mle, td=td)
            done = algebra.finish(jnp, algebra.Rows(labels, kind), part, seen, stats, near)
            c = -mle if done.slope is None else done.slope - mle
            return stats, algebra.slope_of_value(jnp, seen, stats), c

        gradient, stats = self._pass(labels, self.own.own(given), finish)
        done = algebra.finish(jnp, rows, loss, given, self.own.whole(stats), heads)
        dvalues, dnext_values = algebra.head_gradients(jnp, rows.kind, loss, done.slope, heads)
        summed, metrics = algebra.total(jnp, rows.kind, loss, done)
        return algebra.Outcome(summed, gradient, dvalues, dnext_values, metrics, done)

    def _label_logit(self, labels: jax.Array) -> jax.Array:
        own = self.columns.own(labels, self.layer.weight.shape[0])
        picked = chunks.label_logit(self.layer, own, self.readout, self.chunk)
        return self.columns.summed(labels, picked)

    def _edge(self, labels: jax.Array) -> Any:
        """Where a part ends, and the value of the row behind it; None where nothing is parted."""
        if self.own.axis is None:
            return None
        first = self.layer._replace(hidden=self.layer.hidden[..., :1, :])
        nobody = jnp.full_like(labels[..., :1], algebra.NO_LABEL)
        chunk = Chunk(min(self.chunk.rows, nobody.size))
        found = chunks.row_stats(
            self.kernels, first, nobody, self.columns, self.readout, chunk, False
        )
        row_max, logsum, *_ = self.columns.merged(nobody, found, first.weight.shape[0])
        every = private.gather(row_max + logsum, self.own.axis)
        index, count = lax.axis_index(self.own.axis), every.shape[0]
        beyond = lax.dynamic_index_in_dim(every, (index + 1) % count, keepdims=False)
        last = jnp.arange(labels.shape[-1]) == labels.shape[-1] - 1
        shape = labels.shape
        return jnp.broadcast_to(last, shape), jnp.broadcast_to(beyond, shape)

    def _pass(self, labels: jax.Array, given: algebra.Coefficients, finish: Any) -> Any:
        layer, kernels, readout = self.layer.looped(self.chunk), self.kernels, self.readout.keywords
        entropy = given.entropy_weight is not None

        def body(carry: Any, start: Any, size: int) -> tuple[Any, Any]:
            def window(x: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(x.reshape(-1), start, size)

            sums, behind = carry
            hidden = layer.hidden(start, size)
            label = window(labels)
            own = self.columns.own(label, layer.weight.shape[0])
            needed = jnp.any(window(given.alpha) != algebra.UNREAD)

            def if_needed(work: Any, sums: Any) -> Any:
                """``work(sums)``; without it the sums stay, and all else is 0."""

                def skip(sums: Any) -> Any:
                    out = jax.eval_shape(work, sums)[1]
                    return sums, jax.tree.map(
                        lambda x: private.varying(jnp.zeros(x.shape, x.dtype), hidden), out
                    )

                return lax.cond(needed, work, skip, sums) if self.drop else work(sums)

            def read(_: None) -> Any:
                x = self.columns.masked(chunks.logits_of(hidden, layer))
                return None, (x, tuple(kernels.row_stats(x, own, entropy, **readout)))

            _, (x, found) = if_needed(read, None)
            found = self.columns.merged(label, found, layer.weight.shape[0])
            stats, a, c = finish(window, found, behind)
            weight = given.entropy_weight
            b = jnp.zeros_like(a) if weight is None else window(weight)

            def write(sums: Sums) -> Any:
                row_max, logsum, *_ = found
                dx = kernels.row_grad(x, own, row_max, logsum, a, b, c, **readout)
                return sums.add(dx, hidden, layer)

            sums, dhidden = if_needed(write, sums)
            return (sums, stats.value[:1]), (dhidden, stats)

        nothing = private.varying(jnp.zeros(1, given.beta.dtype), given.alpha)
        carry = (Sums.zeros(layer, self.accumulate), nothing)
        (sums, _), (dhidden, stats) = chunks.backwards(body, carry, labels.size, self.chunk)
        stats = jax.tree.map(lambda x: x.reshape(labels.shape), stats)
        return (dhidden.reshape(self.layer.hidden.shape), sums.whole()), stats
