"""Statistics of logits that are never stored, as operators that compute them twice.

Once in the forward pass, and chunk by chunk once more in the backward pass. Whatever is computed
from the statistics is differentiable: ``token_stats``, reduction "none", and losses in a compiled
graph.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.call import Call, StatsCall
from irl_ops.torch import linear_measures, ops, traced
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.chunks import Linear, like_gradients, returned
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.needed import Selection, needed
from irl_ops.torch.refusals import refuse_second_derivative
from irl_ops.torch.stepwise import in_dtype
from irl_ops.torch.token_fields import TokenStats, fields

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def loss(call: Call, layer: Layer, labels: Tensor, drop: bool, backend: str) -> Loss:
    """Any loss of a linear layer, differentiable, from statistics computed chunk by chunk.

    With ``drop`` the statistics of rows that nobody needs are 0, and no part of the loss.
    """
    heads, weighting = in_dtype(call, layer.hidden)
    rows = ops.align(labels, layer.weight.shape[0], call.sequence)
    weights = algebra.weigh(xp, rows.kind, call.terms, weighting)
    wanted = needed(rows.kind) if drop else None
    stats = statistics(layer, rows, weights.entropy_coef is not None, backend, wanted)
    step = traced.transition(rows, stats, weights.gamma, heads)
    total: Tensor = algebra.row_losses(xp, weights, stats, step)
    total = total if call.weighting.reduction == "none" else total.sum()
    if not call.metrics:
        return total
    with torch.no_grad():
        return total, algebra.metrics(xp, rows.kind, weights, stats, step)


def token_stats(call: StatsCall, layer: Layer, labels: Tensor, backend: str) -> TokenStats:
    """The fields of ``token_stats``, differentiable."""
    rows = ops.align(labels, layer.weight.shape[0], call.sequence)
    if call.measures.plain:
        return fields(call, rows, statistics(layer, rows, call.entropy, backend), {})
    return fields(call, rows, *linear_measures.statistics(call, layer, rows, backend))


def statistics(
    layer: Layer, rows: algebra.Rows, entropy: bool, backend: str, wanted: Tensor | None = None
) -> algebra.Statistics:
    """Row statistics, differentiable by hidden, weight and bias; 0 in rows that are not wanted."""
    shape = rows.labels.shape
    hidden, labels = layer.hidden.flatten(0, -2), rows.labels.flatten()
    wanted = None if wanted is None else wanted.flatten()
    *vectors, h = linear_row_stats(
        hidden, layer.weight, layer.bias, labels, wanted, layer.total, entropy, layer.chunk,
        layer.sums, *layer[5:], backend,
    )  # fmt: skip
    row_max, logsum, label_logit = (x.view(shape) for x in vectors)
    h = h.view(shape) if entropy else None
    return algebra.statistics(xp, rows.labels, row_max, logsum, label_logit, h)


@torch.library.custom_op("irl_ops::linear_row_stats", mutates_args=())
def linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    wanted: Tensor | None,
    total: Tensor | None,
    entropy: bool,
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, logsum, label_logit, entropy)``; entropy is empty unless asked for.

    ``total`` is what the backward pass adds the gradient of weight to, instead of returning it.
    """
    chosen = Selection(wanted)
    labels = chosen.take(labels)
    layer = Layer(chosen.take(hidden), weight, bias, chunk, accumulate, scale, softcap)
    if labels.numel():
        over = Linear(BACKENDS[backend], layer, (False, False, False))
        *found, h = over.row_stats(labels, entropy)
    else:
        found, h = [ops.row_vector(layer.hidden) for _ in range(3)], ops.row_vector(layer.hidden)
    row_max, logsum, label_logit = (chosen.spread(x) for x in found)
    entropies = chosen.spread(h) if entropy and h is not None else ops.row_vector(hidden[:0])
    return row_max, logsum, label_logit, entropies


@linear_row_stats.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    wanted: Tensor | None,
    total: Tensor | None,
    entropy: bool,
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = ops.row_vector(hidden) if entropy else ops.row_vector(hidden[:0])
    return ops.row_vector(hidden), ops.row_vector(hidden), ops.row_vector(hidden), h


@torch.library.custom_op("irl_ops::linear_row_grad", mutates_args=())
def linear_row_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    wanted: Tensor | None,
    vectors: list[Tensor],
    asked: list[bool],
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by hidden, weight and bias; empty where nobody asks for them."""
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    return _row_grad(layer, labels, wanted, vectors, asked, backend, None)


@torch.library.custom_op("irl_ops::linear_row_grad_into", mutates_args=("total",))
def linear_row_grad_into(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    wanted: Tensor | None,
    vectors: list[Tensor],
    asked: list[bool],
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; that of weight is added to ``total``, and an empty one returned."""
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    return _row_grad(layer, labels, wanted, vectors, asked, backend, total)


def _row_grad(
    layer: Layer,
    labels: Tensor,
    wanted: Tensor | None,
    vectors: list[Tensor],
    asked: list[bool],
    backend: str,
    total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, chosen = layer.hidden, Selection(wanted)
    layer = layer._replace(hidden=chosen.take(hidden))
    over = Linear(BACKENDS[backend], layer, (asked[0], asked[1], asked[2]), total)
    over.row_grad(chosen.take(labels), *(chosen.take(x) for x in vectors))
    dhidden = None if over.dhidden is None else chosen.spread(over.dhidden)
    dweight = over.dweight if total is None else None
    return returned(hidden, dhidden, dweight, over.dbias)


@linear_row_grad.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like_gradients(given[:3], given[6])


@linear_row_grad_into.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like_gradients(given[:3], [given[6][0], False, given[6][2]])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, labels, wanted, ctx.total, ctx.entropy, *ctx.form = inputs
    row_max, logsum, _, entropy = output
    ctx.save_for_backward(hidden, weight, bias, labels, wanted, row_max, logsum, entropy)


def _backward(ctx: Any, _: Any, dlogsum: Tensor, dlabel: Tensor, dentropy: Tensor) -> Any:
    """As that of ``irl_ops.torch.ops.row_stats``, and on through the layer."""
    refuse_second_derivative()
    *given, row_max, logsum, entropy = ctx.saved_tensors
    a, b = ops.row_coefficients(entropy if ctx.entropy else None, dlogsum, dentropy)
    asked = list(ctx.needs_input_grad[:3])
    vectors = [row_max, logsum, a, b, dlabel]
    if ctx.total is None:
        found = linear_row_grad(*given, vectors, asked, *ctx.form)
    else:
        found = linear_row_grad_into(*given, vectors, asked, *ctx.form, ctx.total)
        asked[1] = False
    gradients = (x if wanted else None for x, wanted in zip(found, asked, strict=True))
    return *gradients, *[None] * 9


linear_row_stats.register_autograd(_backward, setup_context=_save)
