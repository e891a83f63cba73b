"""The original IQ-Learn's objective of values."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.torch as xp
from torch import Tensor

from irl_ops import algebra, terms
from irl_ops.algebra import Weighting
from irl_ops.torch.arguments import arguments
from irl_ops.torch.token_fields import TokenStats


def iq_value_loss(
    stats: TokenStats,
    is_expert: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    lam: float | Tensor = 0.01,
    semi_gradient: bool = False,
    token_weights: Tensor | None = None,
    num_items: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    r"""The value objective of the original IQ-Learn, on the outputs of ``token_stats``.

    .. math:: L = -\mathbb{E}_E[r] + \mathbb{E}_{mix}[V - \gamma V']
              + \lambda\,\mathbb{E}_{mix}[r^2],
              \quad r = Q(s, a) - \gamma V', \quad mix = (1 - \alpha) E + \alpha B

    E are demonstrations, B samples of the policy, and the chi^2-divergence gives r^2 its weight.
    It is not the paper's Eq. 16: samples enter through their values as well, and log pi only
    through Q = V + log pi. With ``semi_gradient=True`` no gradient flows through the V' in r; that
    in V - gamma V' keeps its own. gamma is that of ``token_stats``; V' needs its gradient there
    (``detach_next=False``). Means are over labelled rows, as in ``online_iqlearn_loss``; rows
    without a TD term contribute nothing.

    Args:
        stats: of ``token_stats`` or ``linear_token_stats``; ``entropy=False`` will do.
        is_expert: bool, one per sequence or one per row of ``stats``.
        alpha: share of the samples in the mixture, in [0, 1); a number or a 0-d tensor.
        lam: weight of r^2, 0 or more; a number or a 0-d tensor.
        semi_gradient: no gradient through V' in r.
        token_weights: float ``[..., T]``, w_t; 1 by default.
        num_items: the pair (N_E, N_B): what sums are divided by. By default the sums of w over the
            labelled rows of each group; an empty group contributes 0.

    Returns:
        The loss, a 0-d tensor of the statistics' dtype.

    Raises:
        TypeError, ValueError: as ``online_iqlearn_loss``.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> stats = token_stats(logits, torch.randint(100, (2, 8)), gamma=0.9, entropy=False)
        >>> iq_value_loss(stats, torch.tensor([True, False])).backward()
    """
    arguments.check_flags("is_expert", is_expert, stats.kind)
    arguments.check_switches(semi_gradient=semi_gradient)
    given = {"alpha": alpha, "lam": lam}

    def number(name: str, low: float, high: float, *, open_end: bool = False) -> Any:
        return arguments.number(name, given[name], stats.kind, low, high, open_end=open_end)

    weighting = arguments.weighting(stats.kind, Weighting(token_weights, num_items), pair=True)
    rows: Tensor = algebra.value_objective(
        xp,
        stats.kind,
        stats.value,
        stats.logprob,
        stats.reward,
        terms.value_mixture(number, is_expert),
        number("lam", 0.0, math.inf),
        weighting,
        Tensor.detach if semi_gradient else None,
    )
    return rows.sum()
