"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from irl_ops.call import read_stats
from irl_ops.options import signature
from irl_ops.torch import native_tokens, ops, traced
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import choose
from irl_ops.torch.forward import contiguous_rows, is_plain
from irl_ops.torch.options import StatsOptions
from irl_ops.torch.parallel import is_parallel
from irl_ops.torch.sharded_dense import stats_of_shards


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
    """

    value: Tensor
    logprob: Tensor
    entropy: Tensor | None
    reward: Tensor
    next_value: Tensor
    kind: Tensor
    correct: Tensor


@signature(StatsOptions)
def token_stats(
    logits: Tensor, labels: Tensor, **options: Unpack[StatsOptions[Tensor]]
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
        logit_scale: factor of the logits; statistics are those of q.
        softcap: bound of the logits, or None.
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
        vocab_group: the processes that hold the other columns.
        vocab_start: the first column here.
        vocab_size: the columns that count.
        sequence_group: the processes that hold the other rows. What is differentiated is the sum
            over ranks of what each computes from the rows that it has.
        sequence_order: the index in the whole sequence of every row here.
        backend: a name of ``available_backends()``, or "auto".

    Returns:
        TokenStats: float32 tensors of the labels' shape; ``kind`` int8, ``correct`` bool.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``iqlearn_loss``.

    Example:
        >>> stats = token_stats(torch.randn(2, 8, 100), torch.randint(100, (2, 8)), gamma=0.99)
        >>> stats.reward.shape
        torch.Size([2, 8])
    """
    given = dict(options)
    if is_parallel(logits, given):
        return TokenStats(
            *stats_of_shards("token_stats", StatsOptions, logits, labels, given)  # type: ignore[arg-type]
        )
    call = read_stats("token_stats", StatsOptions, arguments, logits, labels, given)
    backend = choose(call.backend, logits)
    logits = contiguous_rows(logits)
    if backend == "native" and is_plain(logits) and is_plain(labels):
        return TokenStats(*native_tokens.token_stats(call, logits, labels))  # type: ignore[arg-type]
    rows = ops.align(labels, logits.shape[-1], call.sequence)
    stats = traced.statistics(logits, rows, call.entropy, backend, call.readout)
    step = traced.transition(rows, stats, call.gamma, call.heads)
    return TokenStats(
        step.value,
        stats.logprob,
        stats.entropy,
        step.reward,
        step.next_value,
        rows.kind,
        stats.correct,
    )
