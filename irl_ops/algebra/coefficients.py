"""Before the pass: what the row kernel is told of each row, and so of its neighbour."""

from __future__ import annotations

from typing import Any, NamedTuple

from irl_ops.algebra.neighbours import Edge, following, preceding
from irl_ops.algebra.options import Heads
from irl_ops.algebra.rows import BOOTSTRAP, IGNORED
from irl_ops.algebra.weights import Objective

Array = Any

UNREAD = float("-inf")  # as alpha: nobody needs the row, the kernels answer 0 and read nothing


class Coefficients(NamedTuple):
    """A_t = alpha_t + beta_t V_t + B_t H_t with B_t = ``entropy_weight``; ``[..., T]``."""

    alpha: Array  # UNREAD in rows that are neither labelled nor bootstrapped from
    beta: Array
    entropy_weight: Array | None  # kappa m_t; None without an entropy term


def coefficients(
    xp: Any, kind: Array, loss: Objective, label_logit: Array, heads: Heads, edge: Edge
) -> Coefficients:
    """The coefficients of every row, before any row is read.

    Of the row before they hold its label's logit, where it bootstraps from this one and
    differentiates through its value.
    """
    alpha, beta = loss.mle, xp.zeros_like(loss.mle)
    onto = preceding(xp, kind == BOOTSTRAP, edge.onto)
    if loss.z_loss is not None:
        beta = beta + 2 * loss.z_loss * loss.mle
    if loss.td is not None and heads.values is not None:
        # delta_t holds log pi_t, and so V_t of the row itself: A_t = m_t (...) - u_t
        q = heads.values - loss.gamma * given_ahead(xp, kind, heads) + label_logit
        alpha = alpha - 2 * loss.td * xp.where(loss.td != 0, q, 0.0)
        beta = beta + 2 * loss.td
    elif loss.td is not None and heads.next_values is None and not heads.detach_next:
        td = xp.where(onto, preceding(xp, loss.td, edge.td), 0.0)
        q = xp.where(td != 0, preceding(xp, label_logit, edge.label_logit), 0.0)
        alpha = alpha - 2 * loss.gamma * td * q
        beta = beta + 2 * loss.gamma**2 * td
    entropy_weight = None if loss.entropy_coef is None else loss.entropy_coef * loss.mle
    return Coefficients(xp.where((kind != IGNORED) | onto, alpha, UNREAD), beta, entropy_weight)


def given_ahead(xp: Any, kind: Array, heads: Heads) -> Array | None:
    """V'_t where it does not come from the logits: ``next_values``, or the next row's ``values``.

    The last row of a window has no ``values`` ahead of it: a window's edge needs ``next_values``.
    """
    if heads.next_values is not None:
        return xp.where(kind == BOOTSTRAP, heads.next_values, 0.0)
    if heads.values is not None:
        return xp.where(kind == BOOTSTRAP, following(xp, heads.values, 0.0), 0.0)
    return None
