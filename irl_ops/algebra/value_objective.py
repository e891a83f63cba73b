"""The value objective of the original IQ-Learn, on row statistics.

With r = Q - gamma V' and Q = V + log pi, the difference of values is V - gamma V' = r - log pi, so
that gamma need not be known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from irl_ops.algebra.options import Terms, Weighting
from irl_ops.algebra.rows import has_td
from irl_ops.algebra.weights import weigh

Array = Any
Scalar = Any


def value_objective(
    xp: Any,
    kind: Array,
    value: Array,
    logprob: Array,
    reward: Array,
    terms: Terms,
    lam: Scalar,
    weighting: Weighting,
    stop_gradient: Callable[[Array], Array] | None,
) -> Array:
    """The terms of every row, ``[..., T]``; ``terms`` holds the two weights of the mixture.

    Args:
        xp: the namespace of the arrays.
        kind: of the rows, as all arrays ``[..., T]``.
        value: V_t.
        logprob: log pi_t.
        reward: r_t, whose gradient flows through V' as well.
        terms: ``td`` is the weight of the expert's rows in the mixture, ``agent_td`` the agent's.
        lam: weight of r^2.
        weighting: how rows are averaged.
        stop_gradient: where given, r has no gradient through V'.
    """
    given = weighting.token_weights
    weights = xp.ones_like(value) if given is None else xp.astype(given, value.dtype)
    shares = weigh(xp, kind, terms, weighting._replace(token_weights=weights))
    used = has_td(kind)
    drop = reward - logprob  # V - gamma V', always with its whole gradient
    if stop_gradient is not None:
        q = value + logprob
        reward = stop_gradient(reward) + (q - stop_gradient(q))
    expert = xp.where(used & (shares.mle != 0), -shares.mle * reward, 0.0)
    mixed = xp.where(shares.td != 0, shares.td * (drop + lam * reward * reward), 0.0)
    return expert + mixed
