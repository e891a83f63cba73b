"""From what users give to a loss of logits of which this process has a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from irl_ops.algebra import RowStatistics
from irl_ops.call import read_loss, read_parallel, read_stats
from irl_ops.torch import dtensor, sharded, sharded_measures
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import choose
from irl_ops.torch.forward import Loss, contiguous_rows, poison
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
from irl_ops.torch.shards import Dense, Reading
from irl_ops.torch.token_fields import TokenStats


class Given(NamedTuple):
    """What a parallel call was given, checked as far as it is about this process alone."""

    logits: Tensor
    labels: Tensor
    is_expert: Tensor | None
    shards: Shards
    arguments: ParallelArguments
    whole: Whole  # in the place of logits, where options are read
    options: dict[str, Any]  # all of them, to compare with those of other ranks


@outside_of_graphs
def loss_of_shards(
    caller: str,
    group: type,
    terms_of: Any,
    logits: Any,
    labels: Any,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Any = None,
) -> Loss:
    """A loss of the whole batch, for calls that are parallel.

    Arguments as for ``irl_ops.call.read_loss``.
    """
    given = _read(logits, labels, options, is_expert)
    logits, labels = given.logits, given.labels
    call = read_loss(
        caller, group, given.arguments, terms_of, given.whole, labels, options, return_metrics,
        given.is_expert,
    )  # fmt: skip
    backend = choose(call.backend, logits)
    inplace = call.inplace and torch.is_grad_enabled() and logits.requires_grad
    if inplace:
        arguments.check_inplace(logits)
    part = sharded.part_of(
        caller, group, given.shards, logits, logits.shape[-1], labels, given.options,
        given.is_expert,
    )  # fmt: skip
    entropy = call.terms.entropy_coef is not None
    how = Reading(caller, given.shards.columns, part.word, entropy, backend, call.readout, inplace)
    found: Loss = sharded.loss(call, part, _reader(contiguous_rows(logits)), how)
    if inplace:
        poison(logits)
    return found


@outside_of_graphs
def stats_of_shards(
    caller: str, group: type, logits: Any, labels: Any, options: dict[str, Any]
) -> TokenStats:
    """``token_stats`` of the rows that are here."""
    given = _read(logits, labels, options)
    logits, labels = given.logits, given.labels
    call = read_stats(caller, group, given.arguments, given.whole, labels, options)
    plain = call.measures.plain
    backend = choose(call.backend, logits, not plain)
    part = sharded.part_of(
        caller, group, given.shards, logits, logits.shape[-1], labels, given.options
    )
    how = Reading(
        caller, given.shards.columns, part.word, call.entropy, backend, call.readout,
        wanted=call.measures.wanted(call.entropy),
    )  # fmt: skip
    logits = contiguous_rows(logits)
    if plain:
        return sharded.token_stats(call, part, _reader(logits), how)
    return sharded.token_measures(call, part, sharded_measures.of_logits(call, logits), how)


def _read(logits: Any, labels: Any, options: dict[str, Any], is_expert: Any = None) -> Given:
    everything = dict(options)
    parallel = read_parallel(options)
    local = ParallelArguments(0)
    if is_dtensor(logits):
        part = dtensor.local_part(logits, labels, is_expert, options, parallel)
        logits, labels, is_expert, shards = part.logits, part.labels, part.is_expert, part.shards
        options.update(part.options)
        local.check_local(logits, labels)
    else:
        local.check_local(logits, labels)
        shards = shards_of(parallel, logits.shape[-1], labels)
    local.rows, local.columns = whole_rows(shards, labels), logits.shape[-1]
    columns = whole_columns(shards, logits.shape[-1])
    if not columns:
        arguments.check_logits(logits, labels)  # which raises
    whole = Whole(logits, columns)
    return Given(logits, labels, is_expert, shards, local, whole, everything)


def _reader(logits: Tensor) -> sharded.Read:
    def read(labels: Tensor, how: Reading, wanted: Tensor | None) -> sharded.Seen:
        box: list[Any] = []
        row_max, logsum, picked, h = Dense.apply(logits, labels, how, box)  # type: ignore[no-untyped-call]
        found = RowStatistics(row_max, logsum, picked, h if how.entropy else None)
        return sharded.Seen(found, box[0])

    return read
