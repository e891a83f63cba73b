"""The losses of hidden states and a last layer's weight, whose logits are never stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp

from irl_ops import algebra, terms
from irl_ops.call import read_loss, read_stats
from irl_ops.jax import linear_measures
from irl_ops.jax.arguments import Array
from irl_ops.jax.chunks import Layer
from irl_ops.jax.forward import Loss
from irl_ops.jax.linear_arguments import arguments
from irl_ops.jax.linear_loss import Form, linear_loss, statistics
from irl_ops.jax.options import (
    LinearIQLearnOptions,
    LinearMLEOptions,
    LinearOnlineOptions,
    LinearStatsOptions,
)
from irl_ops.jax.program import computed_in, heads_of, join, objective, part, whole
from irl_ops.jax.scalar_loss import transition
from irl_ops.jax.tokens import TokenStats, fields, measured_fields
from irl_ops.options import signature


@overload
def linear_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearIQLearnOptions[Array]],
) -> jax.Array: ...


@overload
def linear_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearIQLearnOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def linear_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: bool,
    **options: Unpack[LinearIQLearnOptions[Array]],
) -> Loss: ...


@signature(LinearIQLearnOptions)
def linear_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearIQLearnOptions[Array]],
) -> Loss:
    r"""``iqlearn_loss`` of the logits hidden weight^T + bias, which are never stored.

    .. math:: q = c \tanh(s x / c), \qquad x = h W^T + b

    with s = ``logit_scale`` and c = ``softcap`` (q = s x without it). Chunks of rows go from the
    last to the first: the logits of one are computed, read once, overwritten by their gradient and
    multiplied back. The gradients are computed with the loss, in three matrix products; chunks
    without a row that somebody needs (prompts, padding) are left out on the device. With reduction
    "none" the logits are computed again in the backward pass.

    Works under ``jit``, ``grad``, ``vmap``, ``scan`` and ``checkpoint``. ``inplace`` changes
    nothing: the logits are nobody's.

    Args:
        hidden: float32, bfloat16 or float16 ``[..., T, D]``; float64 as in ``iqlearn_loss``.
            Logits are rounded to this dtype, all other arithmetic is float32.
        weight: ``[V, D]`` in hidden's dtype.
        labels: int32 or int64 ``[..., T]``.
        bias: ``[V]`` in hidden's dtype, or None.
        chunk_size: rows per chunk, at most 1024 by default; what is stored beside inputs and
            gradients is about one chunk of logits.
        accumulate: the dtype in which chunks are added up for the gradient of weight: "float32"
            (the default), which takes 4 V D bytes until the gradient is rounded, or "weight",
            which rounds the sum after every chunk and takes nothing. (PyTorch's tensor is refused.)
        logit_scale: factor of the logits, as in ``iqlearn_loss``.
        softcap: bound of the logits, or None, as in ``iqlearn_loss``.
        temperature: divides q, as in ``iqlearn_loss``.
        drop_rows: None and True leave out chunks of which nobody needs a row, by a condition that
            the device decides; under ``vmap`` it chooses between two results, and leaves out
            nothing. False compiles no condition.
        vocab_axis: axis of a ``shard_map`` along which devices hold the other rows of weight and
            bias; as ``sequence_axis`` in ``iqlearn_loss``, with ``vocab_start``, ``vocab_size`` and
            ``sequence_order``. A part that is the same on all devices of an axis, as ``hidden`` is
            along ``vocab_axis``, gets the sum of its gradients, by one collective. With
            ``sequence_order`` the logits are computed again in the backward pass.
        return_metrics: as all that follow: see ``iqlearn_loss``.

    Returns:
        The loss, or ``(loss, metrics)``. Differentiable by hidden, weight, bias, ``values`` and
        ``next_values``.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``iqlearn_loss``.

    Example:
        >>> hidden = jax.random.normal(jax.random.key(0), (2, 8, 16))
        >>> weight = jax.random.normal(jax.random.key(1), (100, 16))
        >>> labels = jnp.zeros((2, 8), int)
        >>> dhidden, dweight = jax.grad(linear_iqlearn_loss, (0, 1))(hidden, weight, labels)
    """
    return _loss(
        "linear_iqlearn_loss",
        LinearIQLearnOptions,
        terms.iqlearn,
        hidden,
        weight,
        labels,
        dict(options),
        return_metrics,
    )


@overload
def linear_mle_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearMLEOptions[Array]],
) -> jax.Array: ...


@overload
def linear_mle_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearMLEOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def linear_mle_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: bool,
    **options: Unpack[LinearMLEOptions[Array]],
) -> Loss: ...


@signature(LinearMLEOptions)
def linear_mle_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearMLEOptions[Array]],
) -> Loss:
    """``mle_loss`` of logits that are never stored; the layer's arguments are those of
    ``linear_iqlearn_loss``.
    """
    return _loss(
        "linear_mle_loss",
        LinearMLEOptions,
        terms.mle,
        hidden,
        weight,
        labels,
        dict(options),
        return_metrics,
    )


@overload
def linear_online_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOnlineOptions[Array]],
) -> jax.Array: ...


@overload
def linear_online_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearOnlineOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def linear_online_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: bool,
    **options: Unpack[LinearOnlineOptions[Array]],
) -> Loss: ...


@signature(LinearOnlineOptions)
def linear_online_iqlearn_loss(
    hidden: Array,
    weight: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearOnlineOptions[Array]],
) -> Loss:
    """``online_iqlearn_loss`` of logits that are never stored; the layer's arguments are those of
    ``linear_iqlearn_loss``, ``is_expert`` is bool ``[...]`` (one per sequence) or ``[..., T]``.
    """
    return _loss(
        "linear_online_iqlearn_loss",
        LinearOnlineOptions,
        terms.online_iqlearn,
        hidden,
        weight,
        labels,
        dict(options),
        return_metrics,
        is_expert,
    )


@signature(LinearStatsOptions)
def linear_token_stats(
    hidden: Array, weight: Array, labels: Array, **options: Unpack[LinearStatsOptions[Array]]
) -> TokenStats:
    """``token_stats`` of logits that are never stored.

    The layer's arguments are those of ``linear_iqlearn_loss``. Where a gradient is asked for, the
    logits are computed again, chunk by chunk.

    Example:
        >>> hidden = jax.random.normal(jax.random.key(0), (2, 8, 16))
        >>> weight = jax.random.normal(jax.random.key(1), (100, 16))
        >>> stats = linear_token_stats(hidden, weight, jnp.zeros((2, 8), int), chunk_size=4)
    """
    given = dict(options)
    layer, form, logits = arguments.layer(hidden, weight, given)
    checks = arguments.over(given)
    call = read_stats("linear_token_stats", LinearStatsOptions, checks, logits, labels, given)
    static, traced = part(call, checks.parallel, layer.hidden)
    form = form._replace(backend=static.call.backend, readout=call.readout)
    stats: TokenStats = _run_stats(form, static, layer, labels, traced)
    return stats


def _loss(
    caller: str,
    group: Any,
    terms_of: Callable[..., algebra.Terms],
    hidden: Any,
    weight: Any,
    labels: Any,
    given: dict[str, Any],
    return_metrics: bool,
    is_expert: Any = None,
) -> Loss:
    layer, form, logits = arguments.layer(hidden, weight, given)
    drop, checks = arguments.drop_rows(given), arguments.over(given)
    call = read_loss(
        caller, group, checks, terms_of, logits, labels, given, return_metrics, is_expert
    )
    static, traced = part(call, checks.parallel, layer.hidden)
    form = form._replace(
        drop=drop,
        backend=static.call.backend,
        readout=call.readout,
        detach_next=call.heads.detach_next,
        metrics=call.metrics,
    )
    total, metrics = _run(form, static, layer, labels, traced)
    return (total, metrics) if call.metrics else total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    form: Form, static: Any, layer: Layer, labels: jax.Array, traced: Any
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    placed, dtype = join(static, traced), computed_in(layer.hidden)
    layer = layer.alike(labels)
    rows, call, own, columns = whole(labels, layer.weight.shape[0], placed)
    loss, heads = objective(rows, call, dtype), heads_of(call.heads, dtype)
    summed = call.weighting.reduction != "none"
    if summed and own.order is None:  # the next row, where it is not here, is a part's first one
        given = heads.values, heads.next_values
        return linear_loss(form, layer, given, rows, loss, own, columns)

    stats = statistics(form, loss.entropy_coef is not None, layer, rows, own, columns)
    step = transition(rows, stats, loss.gamma, heads)
    per_row = algebra.row_losses(jnp, loss, stats, step)
    result = jnp.sum(per_row) if summed else own.own(per_row)
    if not call.metrics:
        return result, None
    metrics = algebra.metrics(jnp, rows.kind, loss, stats, step)
    return result, jax.lax.stop_gradient(metrics)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_stats(form: Form, static: Any, layer: Layer, labels: jax.Array, traced: Any) -> TokenStats:
    placed, dtype = join(static, traced), computed_in(layer.hidden)
    layer = layer.alike(labels)
    rows, call, own, columns = whole(labels, layer.weight.shape[0], placed)
    if not call.measures.plain:
        mine = own.own(rows.labels)
        ids, found = linear_measures.of_layer(form, call, layer, mine, columns)
        return measured_fields(call, rows, own, ids, found, dtype)
    stats = statistics(form, call.entropy, layer, rows, own, columns)
    here: TokenStats = own.own(fields(call, rows, stats, dtype))
    return here
