"""The row measures of logits that are never stored, chunk by chunk; as ``linear_ops``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.call import StatsCall
from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.torch import measures
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.chunks import Linear, like_gradients, returned
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.measures import View
from irl_ops.torch.ops import row_vector
from irl_ops.torch.refusals import refuse_second_derivative


def statistics(
    call: StatsCall, layer: Layer, rows: algebra.Rows, backend: str
) -> tuple[algebra.Statistics, dict[str, Tensor | None]]:
    """Row statistics and the fields beyond them, differentiable by hidden, weight and bias."""
    shape = rows.labels.shape
    ids = measures.ids_of(call, rows, layer.weight.shape[0])
    view = measures.view_of(call, rows.labels, row_vector(layer.hidden[:0]).dtype).flat()
    wanted = call.measures.wanted(call.entropy)
    found = linear_row_measures(
        layer.hidden.flatten(0, -2), layer.weight, layer.bias, ids.flatten(0, -2), *view,
        layer.total, ",".join(wanted), layer.chunk, layer.sums, *layer[5:], backend,
    )  # fmt: skip
    present = measures.present(wanted)
    shaped = (
        x.view(*shape, *x.shape[1:]) if name in present else x
        for name, x in zip(RowMeasures._fields, found, strict=True)
    )
    return measures.named(call, ids, RowMeasures(*shaped))


@torch.library.custom_op("irl_ops::linear_row_measures", mutates_args=())
def linear_row_measures(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_scale: Tensor | None,
    keep_mask: Tensor | None,
    keep_above: Tensor | None,
    total: Tensor | None,
    wanted: str,
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``RowMeasures``, empty where they are not among the ``wanted``.

    ``total`` is what the backward pass adds the gradient of weight to, instead of returning it.
    """
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    if not hidden.shape[0]:
        return measures.like_measures(hidden, ids, wanted)
    over = Linear(BACKENDS[backend], layer, (False, False, False))
    view = View(row_scale, keep_mask, keep_above)
    return measures.filled(hidden, over.row_measures(ids, measures.names_in(wanted), view))


@linear_row_measures.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_scale: Tensor | None,
    keep_mask: Tensor | None,
    keep_above: Tensor | None,
    total: Tensor | None,
    wanted: str,
    *form: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return measures.like_measures(hidden, ids, wanted)


@torch.library.custom_op("irl_ops::linear_row_measures_grad", mutates_args=())
def linear_row_measures_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    slopes: list[Tensor | None],
    view: list[Tensor | None],
    asked: list[bool],
    chunk: int,
    accumulate: str,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by hidden, weight and bias; empty where nobody asks for them."""
    layer = Layer(hidden, weight, bias, chunk, accumulate, scale, softcap)
    return _gradients(layer, ids, slopes, view, asked, backend, None)


@torch.library.custom_op("irl_ops::linear_row_measures_grad_into", mutates_args=("total",))
def linear_row_measures_grad_into(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    slopes: list[Tensor | None],
    view: list[Tensor | None],
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
    return _gradients(layer, ids, slopes, view, asked, backend, total)


def _gradients(
    layer: Layer,
    ids: Tensor,
    slopes: list[Tensor | None],
    view: list[Tensor | None],
    asked: list[bool],
    backend: str,
    total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    over = Linear(BACKENDS[backend], layer, (asked[0], asked[1], asked[2]), total)
    row_max, logsum, *coefficients = slopes
    over.row_measures_grad(ids, row_max, logsum, Slopes(*coefficients), View(*view))  # type: ignore[arg-type]
    dweight = over.dweight if total is None else None
    return returned(layer.hidden, over.dhidden, dweight, over.dbias)


@linear_row_measures_grad.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like_gradients(given[:3], given[6])


@linear_row_measures_grad_into.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like_gradients(given[:3], [given[6][0], False, given[6][2]])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, ids, *view, ctx.total, ctx.wanted = inputs[:9]
    ctx.form, found = inputs[9:], RowMeasures(*output)
    ctx.save_for_backward(
        hidden, weight, bias, ids, *view,
        found.row_max, found.logsum, found.entropy, found.log_sum_sq, found.kept,
    )  # fmt: skip


def _backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
    """As that of ``irl_ops.torch.measures``, and on through the layer."""
    refuse_second_derivative()
    *given, scale, mask, bound, row_max, logsum, entropy, log_sum_sq, kept = ctx.saved_tensors
    slopes = measures.slopes_of(ctx.wanted, entropy, log_sum_sq, kept, above)
    vectors, view = [row_max, logsum, *slopes], [scale, mask, bound]
    asked = list(ctx.needs_input_grad[:3])
    if ctx.total is None:
        found = linear_row_measures_grad(*given, vectors, view, asked, *ctx.form)
    else:
        found = linear_row_measures_grad_into(*given, vectors, view, asked, *ctx.form, ctx.total)
        asked[1] = False
    gradients = (x if wanted else None for x, wanted in zip(found, asked, strict=True))
    return *gradients, *[None] * 11


linear_row_measures.register_autograd(_backward, setup_context=_save)
