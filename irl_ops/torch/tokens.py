"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from irl_ops.call import read_stats
from irl_ops.options import signature
from irl_ops.torch import measures, native_tokens, ops, traced
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import choose
from irl_ops.torch.forward import contiguous_rows, is_plain
from irl_ops.torch.options import StatsOptions
from irl_ops.torch.parallel import is_parallel
from irl_ops.torch.sharded_dense import stats_of_shards
from irl_ops.torch.token_fields import TokenStats, fields

__all__ = ["TokenStats", "token_stats"]


@signature(StatsOptions)
def token_stats(
    logits: Tensor, labels: Tensor, **options: Unpack[StatsOptions[Tensor]]
) -> TokenStats:
    r"""Value, log-likelihood, entropy and extracted reward of every row (Sec. 3.4).

    .. math:: r_t = q_t[a_t] - \gamma V'_t

    With a temperature tau and a set K of columns that are kept, q stands for what a sampler draws
    from, everywhere in the result: q_j / tau for j in K, and -inf for all others.

    One read of the logits; one more and one write where a gradient is asked for, whatever is
    computed from the outputs. At gamma = 1 the rewards of an episode that ends in a terminal row
    sum to log pi(episode) + V(first row): they rank the answers to one prompt as likelihood does.

    Args:
        logits: ``[..., T, V]``; see ``iqlearn_loss`` for this and all that follow.
        labels: ``[..., T]``.
        gamma: discount in [0, 1]; a number or a 0-d tensor.
        logit_scale: factor of the logits; statistics are those of q.
        softcap: bound of the logits, or None.
        temperature: number above 0, 0-d tensor, or float ``[..., T]``: one for each row, without a
            gradient. It divides q, after the soft cap. On a CPU one of 0 or less raises, elsewhere
            the row is NaN.
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
        entropy_grad: whether the entropy is differentiable; False for one that is only reported.
        extra_ids: integers ``[..., T, K]``, more tokens of the row's distribution, whose
            log-likelihoods are ``extra_logprob``. They belong to the rows of the logits: ``shift``
            does not move them. An id that is there twice adds its gradients up; ``ignore_index``
            stands for none; others outside [0, V) are refused as such labels are.
        keep_mask: bool ``[..., T, V]``, False for columns that count as -inf.
        keep_above: float ``[..., T]``, without a gradient: columns of q < keep_above count as -inf,
            q being the float32 value after ``logit_scale`` and ``softcap`` and before
            ``temperature``. A column is kept where both options keep it. A label that is not kept
            has the log-likelihood -inf; a row of which nothing is kept has the value -inf, the
            entropy 0, and gradient 0.
        extras: names among "log_sum_sq", "top1" and "mean_logit", fields of the result.
        vocab_group: the processes that hold the other columns. Labels and ids are those of the
            whole vocabulary, ``keep_mask`` is that of the columns here.
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
        return stats_of_shards("token_stats", StatsOptions, logits, labels, given)
    call = read_stats("token_stats", StatsOptions, arguments, logits, labels, given)
    plain = call.measures.plain
    backend = choose(call.backend, logits, not plain)
    logits = contiguous_rows(logits)
    if plain and backend == "native" and is_plain(logits, labels):
        return TokenStats(*native_tokens.token_stats(call, logits, labels))  # type: ignore[arg-type]
    rows = ops.align(labels, logits.shape[-1], call.sequence)
    more: dict[str, Tensor | None] = {}
    if plain:
        stats = traced.statistics(logits, rows, call.entropy, backend, call.readout)
    else:
        stats, more = measures.statistics(call, logits, rows, backend)
    return fields(call, rows, stats, more)
