"""Losses of hidden states and a part of the last layer's weight: columns of logits never stored.

Statistics are computed chunk by chunk, and merged as those of stored logits are, in one collective.
The backward pass computes the chunks again; each process has the whole gradient of its part of the
weight, and its columns' part of that of hidden, which is summed over the group once.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops.algebra import RowStatistics, no_columns
from irl_ops.call import Call, Parallel, read_loss, read_parallel, read_stats
from irl_ops.torch import linear_dtensor, linear_ops, ops, sharded, sharded_measures
from irl_ops.torch.backends import choose
from irl_ops.torch.forward import Loss, is_plain
from irl_ops.torch.gradients import asks_for_gradient
from irl_ops.torch.linear_arguments import Layer, arguments
from irl_ops.torch.linear_columns import layer_gradients, without_padding
from irl_ops.torch.linear_loss import LinearAtOnce
from irl_ops.torch.parallel import (
    ParallelArguments,
    Shards,
    Whole,
    is_dtensor,
    outside_of_graphs,
    shards_of,
    whole_columns,
    whole_rows,
)
from irl_ops.torch.refusals import refuse_second_derivative
from irl_ops.torch.shards import Reading, labels_of
from irl_ops.torch.shards import whole_rows as merged
from irl_ops.torch.token_fields import TokenStats


@outside_of_graphs
def loss_of_shards(
    caller: str,
    group: type,
    terms_of: Any,
    hidden: Any,
    weight: Any,
    labels: Any,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Any = None,
) -> Loss:
    """As ``irl_ops.torch.sharded_dense.loss_of_shards``."""
    everything = dict(options)
    hidden, weight, labels, is_expert, shards = _located(hidden, weight, labels, options, is_expert)
    layer, shards, local, whole = _read(hidden, weight, labels, options, shards)
    drop = arguments.drop_rows(layer.hidden, options)
    if everything.get("drop_rows") is None and shards.cuts:
        drop = False  # who needs a row is known after one more collective
    call = read_loss(
        caller, group, local, terms_of, whole, labels, options, return_metrics, is_expert
    )
    layer = layer._replace(scale=call.readout.logit_scale, softcap=call.readout.softcap)
    backend = choose(call.backend, layer.hidden)
    part = sharded.part_of(
        caller, group, shards, layer.hidden, layer.weight.shape[0], labels, everything, is_expert
    )
    entropy = call.terms.entropy_coef is not None
    how = Reading(caller, shards.columns, part.word, entropy, backend, call.readout)
    if _at_once(layer, call, shards):
        box: list[Any] = []
        heads = call.heads
        inputs = (layer.hidden, layer.weight, layer.bias, heads.values, heads.next_values)
        found: Tensor = LinearAtOnce.apply(*inputs, labels, layer, call, drop, backend, how, box)  # type: ignore[no-untyped-call]
        return found if box[0] is None else (found, box[0])
    loss: Loss = sharded.loss(call, part, _reader(layer), how, drop)
    return loss


def _at_once(layer: Layer, call: Call, shards: Shards) -> bool:
    """Whether gradients come with the loss, chunk by chunk: the rows are whole sequences."""
    inputs = (layer.hidden, layer.weight, layer.bias, call.heads.values, call.heads.next_values)
    trained = asks_for_gradient(*inputs)
    plain = is_plain(layer.hidden) and call.weighting.reduction != "none"
    return trained and plain and shards.columns is not None and not shards.cuts


@outside_of_graphs
def stats_of_shards(
    caller: str, group: type, hidden: Any, weight: Any, labels: Any, options: dict[str, Any]
) -> TokenStats:
    """As ``irl_ops.torch.sharded_dense.stats_of_shards``."""
    everything = dict(options)
    hidden, weight, labels, _, shards = _located(hidden, weight, labels, options)
    layer, shards, local, whole = _read(hidden, weight, labels, options, shards)
    call = read_stats(caller, group, local, whole, labels, options)
    layer = layer._replace(scale=call.readout.logit_scale, softcap=call.readout.softcap)
    plain = call.measures.plain
    backend = choose(call.backend, layer.hidden, not plain)
    part = sharded.part_of(
        caller, group, shards, layer.hidden, layer.weight.shape[0], labels, everything
    )
    how = Reading(
        caller, shards.columns, part.word, call.entropy, backend, call.readout,
        wanted=call.measures.wanted(call.entropy),
    )  # fmt: skip
    if plain:
        return sharded.token_stats(call, part, _reader(layer), how)
    return sharded.token_measures(call, part, sharded_measures.of_layer(call, layer), how)


def _located(
    hidden: Any, weight: Any, labels: Any, options: dict[str, Any], is_expert: Any = None
) -> tuple[Any, Any, Any, Any, Shards | None]:
    """The arrays that are here, and where those of DTensors are; ``options`` get those here."""
    if not (is_dtensor(hidden) or is_dtensor(weight)):
        return hidden, weight, labels, is_expert, None
    parallel = read_parallel(options)
    found = linear_dtensor.local_part(hidden, weight, labels, is_expert, options, parallel)
    options.update(found.options)
    return found.hidden, found.weight, found.labels, found.is_expert, found.shards


def _read(
    hidden: Any, weight: Any, labels: Any, options: dict[str, Any], found: Shards | None
) -> tuple[Layer, Shards, ParallelArguments, Whole]:
    parallel = Parallel() if found else read_parallel(options)
    cut = parallel.vocab_group is not None or (found is not None and found.columns is not None)
    layer = arguments.layer(hidden, weight, options, least=0 if cut else 1)
    local, here = ParallelArguments(0), layer.weight.shape[0]
    local.check_logits(Whole(layer.hidden, here), labels)
    shards = shards_of(parallel, here, labels) if found is None else found
    local.rows, local.columns = whole_rows(shards, labels), here
    return layer, shards, local, Whole(layer.hidden, whole_columns(shards, here))


def _reader(layer: Layer) -> sharded.Read:
    def read(labels: Tensor, how: Reading, wanted: Tensor | None) -> sharded.Seen:
        box: list[Any] = []
        found = LinearRows.apply(  # type: ignore[no-untyped-call]
            layer.hidden.flatten(0, -2),
            layer.weight,
            layer.bias,
            labels.flatten(),
            None if wanted is None else wanted.flatten(),
            layer,
            how,
            box,
        )
        row_max, logsum, label_logit = (x.view(labels.shape) for x in found[:3])
        h = found[3].view(labels.shape) if how.entropy else None
        return sharded.Seen(RowStatistics(row_max, logsum, label_logit, h), box[0])

    return read


class LinearRows(torch.autograd.Function):
    """The statistics of whole rows, differentiable by hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        wanted: Tensor | None,
        layer: Layer,
        how: Reading,
        box: list[Any],
    ) -> tuple[Tensor, ...]:
        """As that of ``irl_ops.torch.shards.Dense``; 0 in rows that are not wanted."""
        mine = labels_of(labels, how.columns)
        ctx.form = (layer.chunk, layer.sums, layer.scale, layer.softcap, how.backend)
        found = no_columns(xp, ops.row_vector(hidden), how.entropy)
        own_weight, own_bias = without_padding(weight, bias, how)
        if own_weight.shape[0]:
            row_max, logsum, label_logit, h = linear_ops.linear_row_stats(
                hidden, own_weight, own_bias, mine, wanted, None, how.entropy, *ctx.form
            )
            found = RowStatistics(row_max, logsum, label_logit, h if how.entropy else None)
        whole, columns = merged(found, labels, how)
        box.append(weight.shape[0] if columns is None else columns)
        row_max, logsum, label_logit, h = whole
        entropy = h if h is not None else row_max.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, mine, wanted, row_max, logsum, entropy)
        ctx.how, ctx.total = how, layer.total
        ctx.mark_non_differentiable(row_max)
        return row_max, logsum, label_logit, entropy

    @staticmethod
    def backward(
        ctx: Any, _: Any, dlogsum: Tensor, dlabel: Tensor, dentropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The chunks once more; one collective, of hidden's gradient."""
        refuse_second_derivative()
        hidden, weight, bias, labels, wanted, row_max, logsum, entropy = ctx.saved_tensors
        how: Reading = ctx.how
        a, b = ops.row_coefficients(entropy if how.entropy else None, dlogsum, dentropy)
        vectors, asked = [row_max, logsum, a, b, dlabel], list(ctx.needs_input_grad[:3])

        def compute(weight: Tensor, bias: Tensor | None, total: Tensor | None) -> Any:
            given = (hidden, weight, bias, labels, wanted, vectors, asked, *ctx.form)
            if total is None:
                return linear_ops.linear_row_grad(*given)
            return linear_ops.linear_row_grad_into(*given, total)

        found = layer_gradients(hidden, weight, bias, asked, ctx.total, how, compute)
        return *found, *[None] * 5
