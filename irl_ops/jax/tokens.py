"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from irl_ops.call import read_stats
from irl_ops.jax.arguments import Array, arguments
from irl_ops.jax.options import StatsOptions
from irl_ops.jax.program import computed_in, heads_of, join, part, whole
from irl_ops.jax.scalar_loss import statistics, transition
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
    """

    value: jax.Array
    logprob: jax.Array
    entropy: jax.Array | None
    reward: jax.Array
    next_value: jax.Array
    kind: jax.Array
    correct: jax.Array


@signature(StatsOptions)
def token_stats(logits: Array, labels: Array, **options: Unpack[StatsOptions[Array]]) -> TokenStats:
    r"""Value, log-likelihood, entropy and extracted reward of every row (Sec. 3.4).

    .. math:: r_t = q_t[a_t] - \gamma V'_t

    One read of the logits; one more and one write where a gradient is asked for, whatever is
    computed from the outputs. At gamma = 1 the rewards of an episode that ends in a terminal row
    sum to log pi(episode) + V(first row): they rank the answers to one prompt as likelihood does.

    Args:
        logits: ``[..., T, V]``; see ``iqlearn_loss`` for this and all that follow.
        labels: ``[..., T]``.
        gamma: discount in [0, 1]; a number or a 0-d array.
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
        vocab_axis: axis along which the columns are sharded.
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
    stats = statistics(logits, rows, own, columns, call.entropy, call.backend, call.readout)
    step = transition(rows, stats, jnp.asarray(call.gamma, dtype), heads_of(call.heads, dtype))
    everywhere = TokenStats(
        step.value,
        stats.logprob,
        stats.entropy,
        step.reward,
        step.next_value,
        rows.kind,
        stats.correct,
    )
    mine: TokenStats = own.own(everywhere)
    return mine
