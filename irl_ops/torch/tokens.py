"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from irl_ops import algebra
from irl_ops.call import StatsCall, read_stats
from irl_ops.options import signature
from irl_ops.torch import measures, native_tokens, ops, traced
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
    plain = call.measures.plain
    backend = choose(call.backend, logits, not plain)
    logits = contiguous_rows(logits)
    if plain and backend == "native" and is_plain(logits) and is_plain(labels):
        return TokenStats(*native_tokens.token_stats(call, logits, labels))  # type: ignore[arg-type]
    rows = ops.align(labels, logits.shape[-1], call.sequence)
    more: dict[str, Tensor | None] = {}
    if plain:
        stats = traced.statistics(logits, rows, call.entropy, backend, call.readout)
    else:
        stats, more = measures.statistics(call, logits, rows, backend)
    return fields(call, rows, stats, more)


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
