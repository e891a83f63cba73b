"""Every loss, as the weights of its terms: nothing else tells one loss from another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from irl_ops.algebra.options import Terms

Number = Callable[..., Any]
"""``number(name, low, high)``: that option, checked, or its default."""


def mle(number: Number) -> Terms:
    """MLE; with ``entropy_coef`` > 0 the entropy-regularised MLE of Eq. 18. m = w/N, d = 0."""
    return Terms()


def iqlearn(number: Number) -> Terms:
    """Offline IQLearn, Eq. 14: m = w/N, d = lam w/N."""
    return Terms(td=number("lam", 0.0, math.inf), gamma=number("gamma", 0.0, 1.0))


def online_iqlearn(number: Number, is_expert: Any) -> Terms:
    """Online IQLearn, Eqs. 15-17.

    Expert rows have m = w/N_E and d = lam/(1 - alpha) w/N_E; agent rows have m = 0 and
    d = lam alpha/(1 - alpha)^2 w/N_B.
    """
    alpha = number("alpha", 0.0, 1.0, open_end=True)
    lam = number("lam", 0.0, math.inf)
    rest = 1 - alpha
    return Terms(
        td=lam / rest,
        agent_td=lam * alpha / (rest * rest),
        is_expert=is_expert,
        gamma=number("gamma", 0.0, 1.0),
    )


def value_mixture(number: Number, is_expert: Any) -> Terms:
    """The mixture (1 - alpha) expert + alpha agent, of the original IQ-Learn's value objective."""
    alpha = number("alpha", 0.0, 1.0, open_end=True)
    return Terms(td=1 - alpha, agent_td=alpha, is_expert=is_expert)
