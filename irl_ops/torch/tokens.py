"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from irl_ops.arguments import Boundary
from irl_ops.torch import ops
from irl_ops.torch.arguments import arguments
from irl_ops.torch.forward import prepare, statistics, transition


class TokenStats(NamedTuple):
    """Statistics of every row; float32 tensors of the labels' shape, differentiable.

    Attributes:
        value: V_t = logsumexp(q_t), or the given ``values``. For every row.
        logprob: log pi_t, at most 0; 0 in IGNORED rows.
        entropy: H_t, within [0, log V]. For every row; None with ``entropy=False``.
        reward: delta_t = q_t[a_t] - gamma V'_t; 0 in NO_TD and IGNORED rows.
        next_value: V'_t; 0 unless the row bootstraps.
        kind: int8, one of IGNORED, TERMINAL, BOOTSTRAP, NO_TD of ``irl_ops.algebra``.
    """

    value: Tensor
    logprob: Tensor
    entropy: Tensor | None
    reward: Tensor
    next_value: Tensor
    kind: Tensor


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    ignore_index: int = -100,
    where: Tensor | None = None,
    shift: bool = False,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: Boundary = "terminal",
    truncated: Tensor | None = None,
    detach_next: bool = False,
    next_values: Tensor | None = None,
    values: Tensor | None = None,
    entropy: bool = True,
    backend: str = "auto",
) -> TokenStats:
    r"""Value, log-likelihood, entropy and extracted reward of every row (Sec. 3.4).

    .. math:: r_t = q_t[a_t] - \gamma V'_t

    One read of the logits; one more and one write where a gradient is asked for, whatever is
    computed from the outputs. At gamma = 1 the rewards of an episode that ends in a terminal row
    sum to log pi(episode) + V(first row): they rank the answers to one prompt as likelihood does.

    Args:
        logits: ``[..., T, V]``; see ``iqlearn_loss`` for this and all that follow.
        labels: ``[..., T]``.
        gamma: discount in [0, 1]; a number or a 0-d tensor.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``.
        shift: logits[t] scores labels[t + 1].
        segment_ids: ``[..., T]``.
        position_ids: ``[..., T]``.
        cu_seqlens: ``[S + 1]``.
        eos_token_id: tokens that end an episode.
        boundary: "terminal", "bootstrap" or "drop".
        truncated: bool ``[...]`` or ``[..., T]``.
        detach_next: no gradient flows through V'.
        next_values: ``[..., T]``.
        values: ``[..., T]``.
        entropy: whether the entropy is computed.
        backend: a name of ``available_backends()``, or "auto".

    Returns:
        TokenStats: float32 tensors of the labels' shape; ``kind`` int8.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``iqlearn_loss``.

    Example:
        >>> stats = token_stats(torch.randn(2, 8, 100), torch.randint(100, (2, 8)), gamma=0.99)
        >>> stats.reward.shape
        torch.Size([2, 8])
    """
    arguments.check_scalar("gamma", gamma, logits, 0.0, 1.0)
    arguments.check_switches(detach_next=detach_next, entropy=entropy)
    sequence = dict(
        ignore_index=ignore_index,
        where=where,
        shift=shift,
        segment_ids=segment_ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        eos_token_id=eos_token_id,
        boundary=boundary,
        truncated=truncated,
    )
    logits, backend = prepare(logits, labels, sequence, backend)
    arguments.check_values(labels, next_values=next_values, values=values)
    rows = ops.rows_of(labels, logits.shape[-1], sequence)
    stats = statistics(logits, rows, entropy, backend)
    step = transition(rows, stats, gamma, detach_next, next_values, values)
    return TokenStats(
        step.value, stats.logprob, stats.entropy, step.reward, step.next_value, rows.kind
    )
