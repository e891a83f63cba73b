"""Before the pass: the weights m, d, kappa and zeta, which make one loss different from another."""

from __future__ import annotations

from typing import Any, NamedTuple

from irl_ops.algebra.options import Terms, Weighting
from irl_ops.algebra.rows import IGNORED, has_td, per_row

Array = Any
Scalar = Any


class Objective(NamedTuple):
    """The weights of a loss's terms; None stands for a term that is absent."""

    mle: Array  # m_t, [..., T]
    td: Array | None  # d_t, [..., T]
    gamma: Scalar = 1.0
    entropy_coef: Scalar | None = None  # kappa
    z_loss: Scalar | None = None  # zeta


def weigh(
    xp: Any, kind: Array, terms: Terms, weighting: Weighting, above: Array | Scalar | None = None
) -> Objective:
    """m_t and d_t: each row's share w/N times the weight of the term.

    ``above`` is the gradient of the loss, a number or one per row: the loss is linear in its
    weights, so a factor on them is a factor on its gradient.
    """
    weights = weighting.token_weights
    if weights is None:
        weights = xp.ones_like(kind, dtype=xp.float32)
    labelled = kind != IGNORED
    items = weighting.num_items or (None, None)
    if terms.is_expert is None:
        expert, agent = _share(xp, weights, labelled, weighting.reduction, items[0]), None
    else:
        is_expert = per_row(terms.is_expert, kind)
        expert = _share(xp, weights, labelled & is_expert, weighting.reduction, items[0])
        agent = _share(xp, weights, labelled & ~is_expert, weighting.reduction, items[1])
    if above is not None:
        expert = xp.where(expert != 0, above * expert, 0.0)
        agent = None if agent is None else xp.where(agent != 0, above * agent, 0.0)
    td = None
    if terms.td is not None:
        td = terms.td * expert if agent is None else terms.td * expert + terms.agent_td * agent
        td = xp.where(has_td(kind), td, 0.0)
    mle = expert if isinstance(terms.mle, float) and terms.mle == 1.0 else terms.mle * expert
    return Objective(mle, td, terms.gamma, terms.entropy_coef, terms.z_loss)


def _share(xp: Any, weights: Array, rows: Array, reduction: str, num_items: Scalar | None) -> Array:
    """w_t / N on the given rows, 0 elsewhere; all 0 where N = 0."""
    weights = xp.where(rows, weights, 0.0)
    if reduction != "mean":
        return weights
    total = xp.sum(weights) if num_items is None else num_items * xp.ones_like(weights[..., :1])
    return xp.where(total != 0, weights / xp.where(total != 0, total, 1.0), 0.0)
