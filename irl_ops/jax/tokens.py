"""Statistics of every token, for rewards and for losses of one's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from irl_ops.arguments import Boundary
from irl_ops.jax.arguments import arguments
from irl_ops.jax.backends import check_backend
from irl_ops.jax.forward import Array, Scalar, Sequences, prepare, rows_of, transition
from irl_ops.jax.rows import constant
from irl_ops.jax.scalar_loss import statistics


class TokenStats(NamedTuple):
    """Statistics of every row; float32 arrays of the labels' shape, differentiable.

    Attributes:
        value: V_t = logsumexp(q_t), or the given ``values``. For every row.
        logprob: log pi_t, at most 0; 0 in IGNORED rows.
        entropy: H_t, within [0, log V]. For every row; None with ``entropy=False``.
        reward: delta_t = q_t[a_t] - gamma V'_t; 0 in NO_TD and IGNORED rows.
        next_value: V'_t; 0 unless the row bootstraps.
        kind: int8, one of IGNORED, TERMINAL, BOOTSTRAP, NO_TD of ``irl_ops.algebra``.
    """

    value: jax.Array
    logprob: jax.Array
    entropy: jax.Array | None
    reward: jax.Array
    next_value: jax.Array
    kind: jax.Array


def token_stats(
    logits: Array,
    labels: Array,
    *,
    gamma: Scalar = 1.0,
    ignore_index: int = -100,
    where: Array | None = None,
    shift: bool = False,
    segment_ids: Array | None = None,
    position_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: Boundary = "terminal",
    truncated: Array | None = None,
    detach_next: bool = False,
    next_values: Array | None = None,
    values: Array | None = None,
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
        gamma: discount in [0, 1]; a number or a 0-d array.
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
        TokenStats: float32 arrays of the labels' shape; ``kind`` int8.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``iqlearn_loss``.

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 8, 100))
        >>> stats = token_stats(logits, jnp.zeros((2, 8), int), gamma=0.99)
        >>> stats.reward.shape
        (2, 8)
    """
    arguments.check_scalar("gamma", gamma, logits, 0.0, 1.0)
    arguments.check_switches(detach_next=detach_next, entropy=entropy)
    sequences, markers = prepare(
        logits,
        labels,
        dict(
            ignore_index=ignore_index,
            where=where,
            shift=shift,
            segment_ids=segment_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            eos_token_id=eos_token_id,
            boundary=boundary,
            truncated=truncated,
        ),
    )
    arguments.check_values(labels, next_values=next_values, values=values)
    backend = check_backend(backend, logits)
    heads = values, next_values
    stats: TokenStats = _run(
        sequences, detach_next, entropy, backend, logits, labels, markers, heads, gamma
    )
    return stats


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    sequences: Sequences,
    detach_next: bool,
    entropy: bool,
    backend: str,
    logits: jax.Array,
    labels: jax.Array,
    markers: dict[str, Any],
    heads: tuple[jax.Array | None, jax.Array | None],
    gamma: jax.Array,
) -> TokenStats:
    rows = rows_of(labels, logits.shape[-1], sequences, markers)
    stats = statistics(logits, rows, entropy, backend)
    gamma = constant("gamma", jnp.asarray(gamma, jnp.float32))
    values, next_values = (None if x is None else x.astype(jnp.float32) for x in heads)
    step = transition(rows, stats, gamma, detach_next, values, next_values)
    return TokenStats(
        step.value, stats.logprob, stats.entropy, step.reward, step.next_value, rows.kind
    )
