"""The row measures of rows whose columns are on several processes, differentiable by those here.

As ``irl_ops.torch.shards`` and ``irl_ops.torch.sharded_linear``: one collective in the forward pass
carries a few numbers per row, all merge the same ones, and each process writes the gradient of its
columns with the slopes of the whole row's measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops.algebra import (
    BAD_LABEL,
    NO_COLUMN,
    NO_LABEL,
    aligned_ids,
    labels_here,
    merge_measures,
)
from irl_ops.call import StatsCall
from irl_ops.kernels.reference.measures import RowMeasures
from irl_ops.torch import linear_measures, measures, pool, sharded
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.linear_arguments import Layer
from irl_ops.torch.linear_columns import layer_gradients, without_padding
from irl_ops.torch.measures import View
from irl_ops.torch.ops import row_vector
from irl_ops.torch.parallel import ANY_LABEL
from irl_ops.torch.refusals import refuse_second_derivative
from irl_ops.torch.shards import Reading, columns_here, gathered

Measured = tuple[RowMeasures, Tensor, int | Tensor]  # with the ids, and the vocabulary's columns


class Given(NamedTuple):
    """What the rows here are read with; labels and ids are those of the whole vocabulary."""

    labels: Tensor  # [...], aligned
    extra_ids: Tensor | None  # [..., K], as they came
    ignore: int
    view: View  # of the columns here, padding included

    def ids(self, vocab: int | Tensor) -> Tensor:
        """The labels and the extra ids of a vocabulary of so many columns."""
        found: Tensor = aligned_ids(xp, self.labels, self.extra_ids, vocab, self.ignore)
        return found

    def ids_here(self, how: Reading, width: int) -> Tensor:
        """The same for the row kernels of this process."""
        if how.columns is None:
            return self.ids(width)
        found: Tensor = labels_here(xp, self.ids(ANY_LABEL), how.columns.start, width)
        return found

    def flat(self) -> Given:
        """Of rows along one axis."""
        extra = None if self.extra_ids is None else self.extra_ids.flatten(0, -2)
        return Given(self.labels.flatten(), extra, self.ignore, self.view.flat())


def given_of(call: StatsCall, labels: Tensor, dtype: torch.dtype) -> Given:
    """From the options of a call, whose arrays are those of the rows here."""
    view = measures.view_of(call, labels, dtype)
    return Given(labels, call.measures.extra_ids, call.sequence.ignore_index, view)


def whole_measures(found: RowMeasures, given: Given, how: Reading, width: int) -> Measured:
    """The measures of whole rows, from those of the ``width`` columns here."""
    if how.columns is None:
        return found, given.ids(width), width
    if found.top1 is not None:
        found = found._replace(top1=found.top1.int())  # half the bytes
    names = [name for name, x in found._asdict().items() if x is not None]
    stacked, count, agreed = gathered([x for x in found if x is not None], how)
    bad = (given.labels != NO_LABEL) & (given.labels >= count)
    ids = given._replace(labels=torch.where(bad, BAD_LABEL, given.labels)).ids(count)
    shards = found._replace(**dict(zip(names, stacked, strict=True)))
    whole: RowMeasures = merge_measures(xp, ids, shards, count)
    if whole.top1 is not None:
        whole = whole._replace(top1=whole.top1.long())
    if agreed is not None:
        whole = whole._replace(row_max=whole.row_max.where(agreed, torch.nan))
    return whole, ids, count


def in_vocabulary(found: RowMeasures, how: Reading) -> RowMeasures:
    """With the columns' places in the whole vocabulary."""
    if found.top1 is None or how.columns is None:
        return found
    return found._replace(top1=found.top1 + how.columns.start)


def no_columns(like: Tensor, ids: Tensor, wanted: tuple[str, ...]) -> RowMeasures:
    """The measures of a shard without columns; ``like`` is a tensor ``[...]`` of floats."""
    nothing, zero = torch.full_like(like, -torch.inf), torch.zeros_like(like)
    mean = "mean_logit" in wanted
    return RowMeasures(
        nothing,
        nothing,
        torch.zeros_like(ids, dtype=like.dtype),
        zero if "entropy" in wanted else None,
        nothing if "log_sum_sq" in wanted else None,
        torch.full_like(ids[..., 0], NO_COLUMN) if "top1" in wanted else None,
        nothing if mean else None,
        zero if mean else None,
    )


def of_logits(call: StatsCall, logits: Tensor) -> sharded.Measure:
    """How a call measures the rows of the logits that are here."""

    def measure(labels: Tensor, how: Reading) -> Measured:
        given = given_of(call, labels, row_vector(logits[:0]).dtype)
        box: list[Any] = []
        found = DenseMeasures.apply(logits, given, how, box)  # type: ignore[no-untyped-call]
        return RowMeasures(*found), *box

    return measure


def of_layer(call: StatsCall, layer: Layer) -> sharded.Measure:
    """How a call measures the rows of a layer, chunk by chunk."""

    def measure(labels: Tensor, how: Reading) -> Measured:
        given = given_of(call, labels, row_vector(layer.hidden[:0]).dtype)
        box: list[Any] = []
        found = LinearMeasures.apply(  # type: ignore[no-untyped-call]
            layer.hidden.flatten(0, -2), layer.weight, layer.bias, given.flat(), layer, how, box
        )
        present = measures.present(how.wanted)
        shaped = (
            x.view(*labels.shape, *x.shape[1:]) if name in present else x
            for name, x in zip(RowMeasures._fields, found, strict=True)
        )
        ids, columns = box
        return RowMeasures(*shaped), ids.view(*labels.shape, ids.shape[-1]), columns

    return measure


class DenseMeasures(torch.autograd.Function):
    """One read of the logits that are here; one more, and one write, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, given: Given, how: Reading, box: list[Any]
    ) -> tuple[Tensor, ...]:
        """The fields of ``RowMeasures``, empty where they are not wanted.

        ``box`` gets the ids, and the number of columns of the whole vocabulary.
        """
        here = columns_here(logits.detach(), how.columns)
        ids, view = given.ids_here(how, here.shape[-1]), given.view.columns(here.shape[-1])
        if here.shape[-1]:
            found = BACKENDS[how.backend].row_measures(
                here, ids, how.wanted, **view._asdict(), **how.readout.keywords
            )
            found = in_vocabulary(found, how)
        else:
            found = no_columns(row_vector(here), ids, how.wanted)
        whole, *about = whole_measures(found, given, how, here.shape[-1])
        box.extend(about)
        return _saved(ctx, how, (logits, ids, *view), whole)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """No collective."""
        refuse_second_derivative()
        logits, ids, *view, row_max, logsum, entropy, log_sum_sq, kept = ctx.saved_tensors
        how: Reading = ctx.how
        slopes = measures.slopes_of(",".join(how.wanted), entropy, log_sum_sq, kept, above)
        logits = logits.detach()
        dlogits = pool.empty_like(logits)
        here, into = columns_here(logits, how.columns), columns_here(dlogits, how.columns)
        dlogits[..., here.shape[-1] :] = 0.0  # padding
        if here.shape[-1]:
            BACKENDS[how.backend].row_measures_grad(
                here, ids, row_max, logsum, slopes, into,
                **View(*view)._asdict(), **how.readout.keywords,
            )  # fmt: skip
        return dlogits, None, None, None


class LinearMeasures(torch.autograd.Function):
    """The same of a layer, differentiable by hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: Given,
        layer: Layer,
        how: Reading,
        box: list[Any],
    ) -> tuple[Tensor, ...]:
        """As that of ``DenseMeasures``; rows are along one axis."""
        own_weight, own_bias = without_padding(weight, bias, how)
        width = own_weight.shape[0]
        ids, view = given.ids_here(how, width), given.view.columns(width)
        ctx.form = (layer.chunk, layer.sums, layer.scale, layer.softcap, how.backend)
        ctx.total = layer.total
        found = no_columns(row_vector(hidden), ids, how.wanted)
        if width:
            some = linear_measures.linear_row_measures(
                hidden, own_weight, own_bias, ids, *view, None, ",".join(how.wanted), *ctx.form
            )
            present = measures.present(how.wanted)
            named = zip(RowMeasures._fields, some, strict=True)
            found = RowMeasures(*(x if name in present else None for name, x in named))
            found = in_vocabulary(found, how)
        whole, *about = whole_measures(found, given, how, width)
        box.extend(about)
        return _saved(ctx, how, (hidden, weight, bias, ids, *view), whole)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """The chunks once more; one collective, of hidden's gradient."""
        refuse_second_derivative()
        hidden, weight, bias, ids, scale, mask, bound, *rest = ctx.saved_tensors
        row_max, logsum, entropy, log_sum_sq, kept = rest
        how: Reading = ctx.how
        slopes = measures.slopes_of(",".join(how.wanted), entropy, log_sum_sq, kept, above)
        asked = list(ctx.needs_input_grad[:3])
        rows = ids, [row_max, logsum, *slopes], [scale, mask, bound]

        def compute(weight: Tensor, bias: Tensor | None, total: Tensor | None) -> Any:
            given = (hidden, weight, bias, *rows, asked, *ctx.form)
            if total is None:
                return linear_measures.linear_row_measures_grad(*given)
            return linear_measures.linear_row_measures_grad_into(*given, total)

        found = layer_gradients(hidden, weight, bias, asked, ctx.total, how, compute)
        return *found, *[None] * 4


def _saved(
    ctx: Any, how: Reading, inputs: tuple[Tensor | None, ...], whole: RowMeasures
) -> tuple[Tensor, ...]:
    """What the forward pass returns, kept for the backward pass."""
    ctx.save_for_backward(
        *inputs, whole.row_max, whole.logsum, whole.entropy, whole.log_sum_sq, whole.kept
    )
    ctx.how = how
    filled = measures.filled(whole.row_max, whole)
    names = zip(RowMeasures._fields, filled, strict=True)
    constant = ("row_max", "top1", "kept")
    ctx.mark_non_differentiable(*(x for name, x in names if name in constant))
    return filled
