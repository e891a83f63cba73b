"""Before -> pass -> after: a loss with its gradient, whatever pass goes over the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from irl_ops.algebra.coefficients import Coefficients, coefficients, given_ahead
from irl_ops.algebra.finish import Finished, finish, head_gradients, statistics
from irl_ops.algebra.neighbours import NO_EDGE, Edge
from irl_ops.algebra.options import Heads
from irl_ops.algebra.rows import Rows
from irl_ops.algebra.total import total
from irl_ops.algebra.weights import Objective

Array = Any
Scalar = Any
Window = Callable[[Any], Any]
"""Takes the window's rows out of an array ``[..., T]``; None stays None."""

Finish = Callable[..., Finished]
"""``finish(window, row_max, logsum, label_logit, entropy, behind)``."""


class Pass(Protocol):
    """A way over the logits. It knows row kernels and no loss."""

    def label_logit(self, labels: Array) -> Array:
        """q[a] of every row, before anything is overwritten; 0 without a label, NaN for a bad one.

        It serves the neighbour's coefficients alone, so a rounding of the logits may be missing.
        """

    def stats_grad(
        self, labels: Array, given: Coefficients, finish: Finish
    ) -> tuple[Any, Finished]:
        """The gradients, labels' elements included, and what ``finish`` returned for all rows.

        ``finish`` is called for one window of rows after another, from the last to the first, each
        time with the value of the row behind the window.
        """


class Outcome(NamedTuple):
    """A loss with its gradients."""

    loss: Array  # 0-d
    gradient: Any  # what the pass returned
    dvalues: Array | None
    dnext_values: Array | None
    metrics: dict[str, Array]
    done: Finished


def loss_and_grad(
    xp: Any, over: Pass, rows: Rows, loss: Objective, heads: Heads, edge: Edge = NO_EDGE
) -> Outcome:
    """The summed loss and its gradients, in one pass over the logits."""
    label_logit = over.label_logit(rows.labels)
    given = coefficients(xp, rows.kind, loss, label_logit, heads, edge)
    ahead = given_ahead(xp, rows.kind, heads)

    def finish_window(
        window: Window,
        row_max: Array,
        logsum: Array,
        label_logit: Array,
        entropy: Array | None,
        behind: Array | Scalar,
    ) -> Finished:
        labels, kind = (window(x) for x in rows)
        stats = statistics(xp, labels, row_max, logsum, label_logit, entropy)
        part = loss._replace(mle=window(loss.mle), td=window(loss.td))
        seen = Coefficients(*(window(x) for x in given))
        near = heads._replace(values=window(heads.values), next_values=window(ahead))
        return finish(xp, Rows(labels, kind), part, seen, stats, near, behind)

    gradient, done = over.stats_grad(rows.labels, given, finish_window)
    dvalues, dnext_values = head_gradients(xp, rows.kind, loss, done.slope, heads)
    summed, metrics = total(xp, rows.kind, loss, done)
    return Outcome(summed, gradient, dvalues, dnext_values, metrics, done)
