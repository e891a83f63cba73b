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
from irl_ops.torch import ops, traced
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.chunks import Linear
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.refusals import refuse_second_derivative
from irl_ops.torch.stepwise import in_dtype
from irl_ops.torch.tokens import TokenStats

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def loss(call: Call, layer: Layer, labels: Tensor, backend: str) -> Loss:
    """Any loss of a linear layer, differentiable, from statistics computed chunk by chunk."""
    heads, weighting = in_dtype(call, layer.hidden)
    rows = ops.align(labels, layer.weight.shape[0], call.sequence)
    weights = algebra.weigh(xp, rows.kind, call.terms, weighting)
    stats = statistics(layer, rows, weights.entropy_coef is not None, backend)
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
    stats = statistics(layer, rows, call.entropy, backend)
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


def statistics(layer: Layer, rows: algebra.Rows, entropy: bool, backend: str) -> algebra.Statistics:
    """Row statistics, differentiable by hidden, weight and bias."""
    shape = rows.labels.shape
    hidden, labels = layer.hidden.flatten(0, -2), rows.labels.flatten()
    *vectors, h = linear_row_stats(
        hidden, layer.weight, layer.bias, labels, entropy, *layer[3:], backend
    )
    row_max, logsum, label_logit = (x.view(shape) for x in vectors)
    h = h.view(shape) if entropy else None
    return algebra.statistics(xp, rows.labels, row_max, logsum, label_logit, h)


@torch.library.custom_op("irl_ops::linear_row_stats", mutates_args=())
def linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    entropy: bool,
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, logsum, label_logit, entropy)``; entropy is empty unless asked for."""
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    if not labels.numel():
        nothing = ops.row_vector(hidden)
        return nothing, ops.row_vector(hidden), ops.row_vector(hidden), ops.row_vector(hidden)
    over = Linear(BACKENDS[backend], layer, (False, False, False))
    found = over.row_stats(labels, entropy)
    h = found[3] if entropy else ops.row_vector(hidden[:0])
    return found[0], found[1], found[2], h


@linear_row_stats.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
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
    vectors: list[Tensor],
    wanted: list[bool],
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by hidden, weight and bias; empty where nobody asks for them."""
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    over = Linear(BACKENDS[backend], layer, (wanted[0], wanted[1], wanted[2]))
    over.row_grad(labels, *vectors)
    found = (over.dhidden, over.dweight, over.dbias)
    dhidden, dweight, dbias = (
        hidden.new_empty(0) if x is None else x.to(hidden.dtype) for x in found
    )
    return dhidden, dweight, dbias


@linear_row_grad.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vectors: list[Tensor],
    wanted: list[bool],
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = (
        torch.empty_like(x) if x is not None and asked else hidden.new_empty(0)
        for x, asked in zip((hidden, weight, bias), wanted, strict=True)
    )
    return dhidden, dweight, dbias


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, labels, ctx.entropy, *ctx.form = inputs
    row_max, logsum, _, entropy = output
    ctx.save_for_backward(hidden, weight, bias, labels, row_max, logsum, entropy)


def _backward(ctx: Any, _: Any, dlogsum: Tensor, dlabel: Tensor, dentropy: Tensor) -> Any:
    """As that of ``irl_ops.torch.ops.row_stats``, and on through the layer."""
    refuse_second_derivative()
    hidden, weight, bias, labels, row_max, logsum, entropy = ctx.saved_tensors
    a, b = ops.row_coefficients(entropy if ctx.entropy else None, dlogsum, dentropy)
    wanted = list(ctx.needs_input_grad[:3])
    vectors = [row_max, logsum, a, b, dlabel]
    found = linear_row_grad(hidden, weight, bias, labels, vectors, wanted, *ctx.form)
    gradients = (x if asked else None for x, asked in zip(found, wanted, strict=True))
    return *gradients, *[None] * 7


linear_row_stats.register_autograd(_backward, setup_context=_save)
