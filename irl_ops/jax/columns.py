"""The row kernels on a part of the columns, in a program that ``jit`` partitions over devices.

Every function is what the kernel of its name becomes on a device that has some columns of its rows,
the others being along mesh axes: statistics are merged over the axes, gradients are written where
their columns are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from irl_ops.algebra import BAD_LABEL, NO_LABEL, UNREAD
from irl_ops.jax import measured
from irl_ops.jax.operation import Function, operation
from irl_ops.jax.shards import Columns
from irl_ops.kernels import reference
from irl_ops.kernels.reference.measures import RowMeasures

Kernels = dict[str, Any]


def operations(
    kernels: Callable[[Any], Kernels], **chosen: Callable[[str], Any]
) -> tuple[Function, ...]:
    """The row kernels and the measures of a backend, which serves columns that are spread.

    Args:
        kernels: gives those that run on one device, by name, for the context of a lowering.
        **chosen: by platform, gives what ``operation`` takes for the kernel of a name.

    Returns:
        row_stats, row_grad, row_stats_grad, label_logit, set_label, row_measures,
        row_measures_grad.
    """

    def lowered(name: str) -> dict[str, Any]:
        def over_columns(ctx: Any) -> Any:
            run = kernels(ctx)
            return lambda columns: getattr(OverColumns(run, columns), name)

        return {"over_columns": over_columns, **{p: of(name) for p, of in chosen.items()}}

    return (
        operation(reference.row_stats, **lowered("row_stats")),
        operation(reference.row_grad, **lowered("row_grad")),
        operation(reference.row_stats_grad, **lowered("row_stats_grad")),
        operation(reference.label_logit, **lowered("label_logit")),
        operation(reference.set_label, **lowered("set_label")),
        measured.measures_operation(**lowered("row_measures")),
        measured.gradient_operation(**lowered("row_measures_grad")),
    )


class OverColumns:
    """The kernels of a backend, by the functions that run them on one device."""

    def __init__(self, run: Kernels, columns: Columns) -> None:
        self.run, self.columns = run, columns

    def row_stats(
        self, logits: jax.Array, labels: jax.Array, entropy: bool = False, **readout: Any
    ) -> Any:
        """Of whole rows, by one collective."""
        own = self.columns.own(labels, logits.shape[-1])
        found = self.run["row_stats"](logits, own, entropy=entropy, **readout)
        merged = self.columns.merged(labels, found, logits.shape[-1])
        return merged if entropy else merged[:3]

    def row_grad(
        self, logits: jax.Array, labels: jax.Array, *vectors: jax.Array, **readout: Any
    ) -> Any:
        """Of the columns here."""
        own = self.columns.own(labels, logits.shape[-1])
        return self.run["row_grad"](logits, own, *vectors, **readout)

    def row_stats_grad(
        self,
        logits: jax.Array,
        alpha: jax.Array,
        beta: jax.Array,
        entropy_weight: jax.Array | None = None,
        **readout: Any,
    ) -> Any:
        """In two passes, for the gradient needs the statistics of whole rows."""
        nobody = jnp.full(alpha.shape, NO_LABEL, jnp.int32)
        entropy, unread = entropy_weight is not None, alpha == UNREAD
        found = self.row_stats(logits, nobody, entropy, **readout)
        row_max, logsum, _, *h = (jnp.where(unread, 0.0, x) for x in found)
        a, beta = jnp.where(unread, 0.0, alpha), jnp.where(unread, 0.0, beta)
        a = a + jnp.where(beta != 0, beta * (row_max + logsum), 0.0)
        b = zeros = jnp.zeros_like(a)
        if entropy_weight is not None:
            b = jnp.where(unread, 0.0, entropy_weight)
            a = a + jnp.where(b != 0, b * h[0], 0.0)
        dlogits = self.run["row_grad"](logits, nobody, row_max, logsum, a, b, zeros, **readout)
        return row_max, logsum, *h, dlogits

    def row_measures(
        self, logits: jax.Array, ids: jax.Array, *given: jax.Array, **how: Any
    ) -> RowMeasures:
        """Of whole rows, by one collective, and one more for ``top1``."""
        own = self.columns.own(ids, logits.shape[-1])
        found = self.run["row_measures"](logits, own, *given, **how)
        merged: RowMeasures = self.columns.merged_measures(ids, found, logits.shape[-1])
        return merged

    def row_measures_grad(
        self, logits: jax.Array, ids: jax.Array, *given: jax.Array, **how: Any
    ) -> Any:
        """Of the columns here."""
        own = self.columns.own(ids, logits.shape[-1])
        return self.run["row_measures_grad"](logits, own, *given, **how)

    def label_logit(self, logits: jax.Array, labels: jax.Array, **readout: Any) -> Any:
        """That of the device that has the label's column, on all of them."""
        own = self.columns.own(labels, logits.shape[-1])
        picked = self.run["label_logit"](logits, own, **readout)
        picked = lax.psum(picked, self.columns.axis)  # type: ignore[no-untyped-call]
        return jnp.where(labels == BAD_LABEL, jnp.nan, picked)

    def set_label(
        self, dlogits: jax.Array, labels: jax.Array, *vectors: jax.Array, **readout: Any
    ) -> Any:
        """Where the label's column is."""
        own = self.columns.own(labels, dlogits.shape[-1])
        return self.run["set_label"](dlogits, own, *vectors, **readout)
