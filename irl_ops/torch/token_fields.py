"""What is known of every token, under its names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from irl_ops import algebra
from irl_ops.call import StatsCall
from irl_ops.torch import traced


class TokenStats(NamedTuple):
    """Statistics of every row; float32 tensors of the labels' shape, differentiable.

    Attributes:
        value: V_t = logsumexp(q_t), or the given ``values``. For every row.
        logprob: log pi_t, at most 0; 0 in IGNORED rows.
        entropy: H_t, within [0, log V]. For every row; None with ``entropy=False``.
        reward: delta_t = q_t[a_t] - gamma V'_t; 0 in NO_TD and IGNORED rows.
        next_value: V'_t; 0 unless the row bootstraps.
        kind: int8, one of IGNORED, TERMINAL, BOOTSTRAP, NO_TD of ``irl_ops.algebra``.
        correct: bool, whether no logit is larger than the label's; False in IGNORED rows.
        extra_logprob: log pi of ``extra_ids``, ``[..., T, K]``, for every row; 0 where the id is
            ``ignore_index``. None, as all that follow, where it is not asked for.
        log_sum_sq: log sum_j p_j^2, within [-log V, 0]: minus the Renyi entropy of order 2.
        top1: int64, the first column with the largest logit; not differentiable.
        mean_logit: the mean of the kept q_j that are above -inf, divided by the temperature.
    """

    value: Tensor
    logprob: Tensor
    entropy: Tensor | None
    reward: Tensor
    next_value: Tensor
    kind: Tensor
    correct: Tensor
    extra_logprob: Tensor | None = None
    log_sum_sq: Tensor | None = None
    top1: Tensor | None = None
    mean_logit: Tensor | None = None


def fields(
    call: StatsCall,
    rows: algebra.Rows,
    stats: algebra.Statistics,
    more: dict[str, Tensor | None],
) -> TokenStats:
    """The result, from the statistics of the rows."""
    step = traced.transition(rows, stats, call.gamma, call.heads)
    entropy = stats.entropy
    if entropy is not None and not call.measures.entropy_grad:
        entropy = entropy.detach()
    return TokenStats(
        step.value,
        stats.logprob,
        entropy,
        step.reward,
        step.next_value,
        rows.kind,
        stats.correct,
        **more,
    )
