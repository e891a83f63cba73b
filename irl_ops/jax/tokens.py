"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from irl_ops import algebra
from irl_ops.call import StatsCall, read_stats
from irl_ops.jax import measures
from irl_ops.jax.arguments import Array, arguments
from irl_ops.jax.options import StatsOptions
from irl_ops.jax.program import computed_in, heads_of, join, part, whole
from irl_ops.jax.scalar_loss import statistics, transition
from irl_ops.jax.shards import Rows
from irl_ops.kernels.reference.measures import RowMeasures
from irl_ops.options import signature


class TokenStats(NamedTuple):
    """Statistics of every row; float32 arrays of the labels' shape, differentiable.

    Those of float64 logits are float64.

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
        top1: integers, the first column with the largest logit; not differentiable.
        mean_logit: the mean of the kept q_j that are above -inf, divided by the temperature.
    """

    value: jax.Array
    logprob: jax.Array
    entropy: jax.Array | None
    reward: jax.Array
    next_value: jax.Array
    kind: jax.Array
    correct: jax.Array
    extra_logprob: jax.Array | None = None
    log_sum_sq: jax.Array | None = None
    top1: jax.Array | None = None
    mean_logit: jax.Array | None = None


@signature(StatsOptions)
def token_stats(logits: Array, labels: Array, **options: Unpack[StatsOptions[Array]]) -> TokenStats:
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
        gamma: discount in [0, 1]; a number or a 0-d array.
        logit_scale: factor of the logits; statistics are those of q.
        softcap: bound of the logits, or None.
        temperature: number above 0, 0-d array, or float ``[..., T]``: one for each row, without a
            gradient. It divides q, after the soft cap. Rows whose temperature is 0 or less are
            NaN where it cannot be seen beforehand.
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
        vocab_axis: axis along which the columns are sharded. Labels and ids are those of the
            whole vocabulary, ``keep_mask`` is that of the columns here.
        vocab_start: the first column here.
        vocab_size: columns without padding.
        sequence_axis: axis along which the rows are sharded; the results are those of the rows
            here, which see their next rows on other devices.
        sequence_order: index in the whole of each row here.
        backend: a name of ``available_backends()``, or "auto".

    Returns:
        TokenStats: float32 arrays of the labels' shape; ``kind`` int8.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``iqlearn_loss``.

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 8, 100))
        >>> stats = token_stats(logits, jnp.zeros((2, 8), int), gamma=0.99)
        >>> stats.reward.shape
        (2, 8)
    """
    given = dict(options)
    checks = arguments.over(given)
    call = read_stats("token_stats", StatsOptions, checks, logits, labels, given)
    static, traced = part(call, checks.parallel, logits)
    stats: TokenStats = _run(static, logits, labels, traced)
    return stats


@functools.partial(jax.jit, static_argnums=0)
def _run(static: Any, logits: jax.Array, labels: jax.Array, traced: Any) -> TokenStats:
    placed, dtype = join(static, traced), computed_in(logits)
    rows, call, own, columns = whole(labels, logits.shape[-1], placed)
    if not call.measures.plain:
        labels = own.own(rows.labels)
        ids, found = measures.of_logits(call, logits, labels, columns)
        return measured_fields(call, rows, own, ids, found, dtype)
    stats = statistics(logits, rows, own, columns, call.entropy, call.backend, call.readout)
    mine: TokenStats = own.own(fields(call, rows, stats, dtype))
    return mine


def fields(
    call: StatsCall, rows: algebra.Rows, stats: algebra.Statistics, dtype: Any
) -> TokenStats:
    """The result of whole sequences, from the statistics of their rows."""
    step = transition(rows, stats, jnp.asarray(call.gamma, dtype), heads_of(call.heads, dtype))
    entropy = stats.entropy
    if entropy is not None and not call.measures.entropy_grad:
        entropy = jax.lax.stop_gradient(entropy)
    return TokenStats(
        step.value,
        stats.logprob,
        entropy,
        step.reward,
        step.next_value,
        rows.kind,
        stats.correct,
    )


def measured_fields(
    call: StatsCall,
    rows: algebra.Rows,
    own: Rows,
    ids: jax.Array,
    found: RowMeasures,
    dtype: Any,
) -> TokenStats:
    """The result of the rows here, from their measures; no device needs all of those of others."""
    stats = measures.label_statistics(rows, own, found)
    mine: TokenStats = own.own(fields(call, rows, stats, dtype))
    return mine._replace(**measures.named(call, ids, found))
