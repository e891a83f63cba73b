"""The loss summed over rows, with its gradient at once or in the backward pass.

Triton and the C++ kernels write the gradient in the forward pass, in one read and one write of the
logits, into their storage where nobody reads them later. With Pallas and with plain operations the
backward pass computes it from the row statistics: on a TPU the logits come from a matmul, and XLA
computes an elementwise gradient inside the two matmuls that read it. ``inplace=True`` asks for the
gradient at once there too.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.jax import rows as differentiable
from irl_ops.jax.backends import BACKENDS, dispatch
from irl_ops.jax.shards import Columns, Rows
from irl_ops.readout import Readout

AT_ONCE = ("triton", "native")


class Static(NamedTuple):
    """What a program is made for; ``metrics``: whether they are wanted."""

    detach_next: bool
    metrics: bool
    inplace: bool
    backend: str
    readout: Readout

    def at_once(self, name: str, dtype: Any) -> bool:
        """Whether the backend of that name computes the gradient in the forward pass.

        A float16 gradient waits, so that the factor of a loss scale reaches it before it is
        rounded: 1/N alone underflows.
        """
        return self.inplace or (name in AT_ONCE and dtype != jnp.float16)

    def heads(self, given: Given) -> algebra.Heads:
        """The record, whose arrays are differentiated by apart from its switch."""
        return algebra.Heads(*given, self.detach_next)


class Kept(NamedTuple):
    """From the forward pass to the backward pass."""

    dlogits: jax.Array  # or the logits, where the gradient is not computed at once
    labels: jax.Array
    row_max: jax.Array
    logsum: jax.Array
    coefficients: tuple[jax.Array, jax.Array | None, jax.Array]  # A, B, C of row_grad
    dvalues: jax.Array | None
    dnext_values: jax.Array | None


Given = tuple[jax.Array | None, jax.Array | None]  # values and next_values
Metrics = dict[str, jax.Array] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scalar_loss(
    static: Static,
    logits: jax.Array,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
) -> tuple[jax.Array, Metrics]:
    """The loss, differentiable by logits and values, and the metrics, which are constants."""
    with_entropy = loss.entropy_coef is not None
    stats = statistics(
        logits, rows, Rows(), Columns(), with_entropy, static.backend, static.readout
    )
    step = transition(rows, stats, loss.gamma, static.heads(given))
    total = jnp.sum(algebra.row_losses(jnp, loss, stats, step))
    return total, _metrics(static, rows, loss, stats, step)


def _forward(
    static: Static,
    logits: jax.Array,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
) -> tuple[tuple[jax.Array, Metrics], Kept]:
    def by(name: str) -> Any:
        run = _at_once if static.at_once(name, logits.dtype) else _in_two_steps
        return functools.partial(run, static, name)

    logits = differentiable.once(logits)
    total, metrics, kept = dispatch(static.backend, by, logits, given, rows, loss)
    return (total, metrics), kept


def _at_once(
    static: Static,
    name: str,
    logits: jax.Array,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
) -> tuple[jax.Array, Metrics, Kept]:
    over = Dense(BACKENDS[name], logits, static.readout)
    out = algebra.loss_and_grad(jnp, over, rows, loss, static.heads(given))
    nothing = jnp.zeros_like(out.done.stats.value)
    unused = (nothing, None if loss.entropy_coef is None else nothing, nothing)
    kept = Kept(out.gradient, rows.labels, nothing, nothing, unused, out.dvalues, out.dnext_values)
    return out.loss, out.metrics if static.metrics else None, kept


class Dense:
    """The pass over whole logits; the label logits are read before the gradient overwrites them.

    The gradient of MLE does not depend on the label logits, so XLA could read them after the
    kernel that overwrites the logits, and would copy all logits for that. Adding zeros made of the
    label logits, which XLA cannot fold, makes the gradient depend on them and fixes the order. An
    optimization barrier would not: XLA removes barriers before it orders the steps.
    """

    def __init__(self, kernels: ModuleType, logits: jax.Array, readout: Readout) -> None:
        self.kernels, self.logits, self.readout = kernels, logits, readout.keywords

    def label_logit(self, labels: jax.Array) -> jax.Array:
        """``q[label]``, also kept for ``stats_grad``."""
        picked: jax.Array = self.kernels.label_logit(self.logits, labels, **self.readout)
        self.picked = picked
        return picked

    def stats_grad(
        self, labels: jax.Array, given: algebra.Coefficients, finish: algebra.Finish
    ) -> tuple[jax.Array, algebra.Finished]:
        """The gradient and the finished rows; all rows are one window."""
        zeros = 0.0 * jnp.where(jnp.isfinite(self.picked), self.picked, 0.0)
        given = given._replace(alpha=given.alpha + zeros)
        row_max, logsum, entropy, dlogits = self.kernels.row_stats_grad(
            self.logits, *given, **self.readout
        )
        done = finish(lambda x: x, row_max, logsum, self.picked, entropy, 0.0)
        seen = self.picked if self.readout else None
        return self.kernels.set_label(dlogits, labels, done.element, seen, **self.readout), done


def _in_two_steps(
    static: Static,
    name: str,
    logits: jax.Array,
    given: Given,
    rows: algebra.Rows,
    loss: algebra.Objective,
) -> tuple[jax.Array, Metrics, Kept]:
    with_entropy = loss.entropy_coef is not None
    row_max, logsum, label_logit, h = BACKENDS[name].row_stats(
        logits, rows.labels, with_entropy, **static.readout.keywords
    )

    def of_statistics(
        logsum: jax.Array, label_logit: jax.Array, h: jax.Array | None, given: Given
    ) -> tuple[jax.Array, tuple[algebra.Statistics, algebra.Transition]]:
        stats = algebra.statistics(jnp, rows.labels, row_max, logsum, label_logit, h)
        step = transition(rows, stats, loss.gamma, static.heads(given))
        return jnp.sum(algebra.row_losses(jnp, loss, stats, step)), (stats, step)

    gradient = jax.value_and_grad(of_statistics, argnums=(0, 1, 2, 3), has_aux=True)
    (total, (stats, step)), above = gradient(logsum, label_logit, h, given)
    dlogsum, dlabel_logit, dh, (dvalues, dnext_values) = above
    coefficients = differentiable.row_coefficients(h, dlogsum, dlabel_logit, dh)
    kept = Kept(logits, rows.labels, row_max, logsum, coefficients, dvalues, dnext_values)
    return total, _metrics(static, rows, loss, stats, step), kept


def _backward(static: Static, kept: Kept, above: tuple[jax.Array, Metrics]) -> tuple[Any, ...]:
    factor = above[0]

    def by(name: str) -> Any:
        if static.at_once(name, kept.dlogits.dtype):
            return lambda kept: (kept.dlogits * factor).astype(kept.dlogits.dtype)
        return functools.partial(_row_grad, static, name, factor)

    dlogits = dispatch(static.backend, by, kept)
    dvalues, dnext_values = (
        None if x is None else factor * x for x in (kept.dvalues, kept.dnext_values)
    )
    return dlogits, (dvalues, dnext_values), None, None


def _row_grad(static: Static, name: str, factor: jax.Array, kept: Kept) -> jax.Array:
    scaled = [None if x is None else factor * x for x in kept.coefficients]
    gradient: jax.Array = differentiable.row_grad_of(name, static.readout)(
        kept.dlogits, kept.labels, kept.row_max, kept.logsum, *scaled
    )
    return gradient


scalar_loss.defvjp(_forward, _backward)


def statistics(
    logits: jax.Array,
    rows: algebra.Rows,
    own: Rows,
    columns: Columns,
    entropy: bool,
    backend: str,
    readout: Readout,
) -> algebra.Statistics:
    """Row statistics of whole sequences from one read of the logits here, differentiable."""
    found = differentiable.row_stats(
        logits, own.own(rows.labels), columns, entropy, backend, readout
    )
    return algebra.statistics(jnp, rows.labels, *own.whole(found))


def transition(
    rows: algebra.Rows, stats: algebra.Statistics, gamma: jax.Array, heads: algebra.Heads
) -> algebra.Transition:
    """The TD residual and what it is made of, differentiable."""
    stop = jax.lax.stop_gradient if heads.detach_next else None
    return algebra.transition(jnp, rows.kind, stats, gamma, heads, stop_gradient=stop)


def _metrics(
    static: Static,
    rows: algebra.Rows,
    loss: algebra.Objective,
    stats: algebra.Statistics,
    step: algebra.Transition,
) -> Metrics:
    return algebra.metrics(jnp, rows.kind, loss, stats, step) if static.metrics else None
