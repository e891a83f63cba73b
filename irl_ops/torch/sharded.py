"""Losses and statistics of logits that are nowhere whole.

Every process reads its own columns and rows, once. What the algebra needs of the others is scalars:
they are gathered, and each process then does the algebra of the whole batch, in the same order, as
one device would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import (
    BAD_LABEL,
    NO_LABEL,
    Heads,
    Rows,
    RowStatistics,
    Sequence,
    Terms,
    Weighting,
)
from irl_ops.call import Call, StatsCall
from irl_ops.kernels.reference.measures import RowMeasures
from irl_ops.options import DEFAULTS, names_in
from irl_ops.torch import collectives, measures, traced
from irl_ops.torch.arguments import arguments
from irl_ops.torch.needed import needed
from irl_ops.torch.parallel import ANY_LABEL, Cut, Shards, whole_rows
from irl_ops.torch.rows import Gather, is_contiguous, is_order, next_labels, own
from irl_ops.torch.shards import Reading, refuse_other_options
from irl_ops.torch.stepwise import in_dtype
from irl_ops.torch.token_fields import TokenStats, fields

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]
NUMBERS = ("lam", "gamma", "alpha", "entropy_coef", "z_loss", "num_items")
APART = (  # what ranks may have different, or have compared elsewhere
    "vocab_group", "vocab_start", "sequence_group", "backend", "inplace", "return_metrics",
    "accumulate",
)  # fmt: skip

TOLD = (  # what is wrong on one rank alone, and what the others say of it
    (IndexError, "extra_ids", "are outside of the vocabulary; accepted: its columns, ignore_index"),
    (ValueError, "temperature", "has an element that is not above 0; accepted: numbers above 0"),
)
SPARE = 61  # bits of a word; those above say which of them, counted from 1


class Seen(NamedTuple):
    """What was read of the rows here."""

    statistics: RowStatistics
    columns: int | Tensor  # of the vocabulary
    wrong: Exception | None = None  # for what the labels don't show; raised once all ranks know


Read = Callable[[Tensor, Reading, Tensor | None], Seen]
"""``read(labels, how, wanted)``: the labels and which rows are wanted are those here."""

Measure = Callable[[Tensor, Reading], tuple[RowMeasures, Tensor, int | Tensor]]
"""``measure(labels, how)``: measures of the rows here, their ids, the columns of the vocabulary."""


class Part(NamedTuple):
    """A call as far as this process has it."""

    caller: str
    shards: Shards
    labels: Tensor
    word: int  # of all options: those that differ in a number as well
    columns: int | None  # of the vocabulary, where the rows are whole
    wrong: int = 0  # which of TOLD


def part_of(
    caller: str,
    group: Any,
    shards: Shards,
    here: Tensor,
    columns: int,
    labels: Tensor,
    options: dict[str, Any],
    is_expert: Tensor | None = None,
) -> Part:
    """Compares the call with those of the other ranks; ``options`` are still all there.

    ``here`` are the logits or hidden states, ``columns`` those of the vocabulary that are here.

    Raises:
        ValueError: the ranks differ in an option, or in the shape of their rows.
    """
    names = names_in(group)
    given = {name: options.get(name, x) for name, x in DEFAULTS.items() if name in names}
    facts: dict[str, Any] = {
        "the function": caller,
        "labels": _shape(shards, labels),
        "is_expert": _form(is_expert),
        "dtype": str(here.dtype),
    }
    if given.get("extra_ids") is not None:
        facts["the number of extra_ids"] = tuple(given["extra_ids"].shape[-1:])
    for name, x in given.items():
        if name in NUMBERS:
            facts[name] = _form(x, lambda number: number != 0)
        elif name not in APART:
            facts[name] = _form(x)
    for name, ranks in shards.groups:
        collectives.agree(ranks, name, caller, facts, labels.device)
    numbers = [_form(x, float) for name, x in given.items() if name in NUMBERS]
    whole = columns if shards.columns is None else None
    word = collectives.word((facts, numbers)) % 2**SPARE
    return Part(caller, shards, labels, word, whole)


def _shape(shards: Shards, labels: Tensor) -> tuple[int, ...]:
    ragged = any(cut.sizes for cut in shards.cuts)
    return (whole_rows(shards, labels),) if ragged else tuple(labels.shape)


def _form(x: Any, of_number: Callable[[Any], Any] | None = None) -> Any:
    """What ranks have to have alike: of a tensor its form, whose values no host looks at."""
    if isinstance(x, Tensor):
        return ("tensor", str(x.dtype), x.ndim)
    if isinstance(x, tuple | list):
        return tuple(_form(item, of_number) for item in x)
    return of_number(x) if of_number is not None and isinstance(x, int | float) else x


def loss(call: Call, part: Part, read: Read, reading: Reading, drop: bool = False) -> Loss:
    """Any loss of the whole batch, or of the rows here for reduction "none"; differentiable."""
    per_row = call.weighting.reduction == "none"
    call, rows, found = _whole(call, part, read, reading, per_row, drop)
    heads, weighting = in_dtype(call, found.row_max[..., None])
    weights = algebra.weigh(xp, rows.kind, call.terms, weighting)
    stats = algebra.statistics(xp, rows.labels, *found)
    step = traced.transition(rows, stats, weights.gamma, heads)
    total: Tensor = algebra.row_losses(xp, weights, stats, step)
    total = _own(part, total) if per_row else total.sum()
    if not call.metrics:
        return total
    with torch.no_grad():
        return total, algebra.metrics(xp, rows.kind, weights, stats, step)


def token_stats(call: StatsCall, part: Part, read: Read, reading: Reading) -> TokenStats:
    """Those of the rows that are here; differentiable."""
    call, rows, found = _whole(call, part, read, reading, True, False)
    whole = fields(call, rows, algebra.statistics(xp, rows.labels, *found), {})
    return _own_fields(part, whole)


def token_measures(call: StatsCall, part: Part, measure: Measure, reading: Reading) -> TokenStats:
    """The same, with all that a call can ask for; no process needs that of the others' rows."""
    box: list[Any] = []

    def read(labels: Tensor, how: Reading, wanted: Tensor | None) -> Seen:
        measured, ids, columns = measure(labels, how)
        box.extend(measures.named(call, ids, measured))
        found = RowStatistics(measured.row_max, measured.logsum, measured.picked[..., 0], None)
        return Seen(found, columns, _wrong(call, ids, columns))

    whole_call, rows, (row_max, logsum, label_logit, _) = _whole(
        call, part, read, reading, True, False
    )
    ids, picked = rows.labels[..., None], label_logit[..., None]
    stats, _ = algebra.measured(xp, ids, row_max, logsum, picked, None)
    mine, more = box
    found = _own_fields(part, fields(whole_call, rows, stats, {}))
    grad = mine.entropy is None or call.measures.entropy_grad
    return found._replace(entropy=mine.entropy if grad else mine.entropy.detach(), **more)


def _wrong(call: StatsCall, ids: Tensor, columns: int | Tensor) -> Exception | None:
    """The error for what is wrong with the extra ids or temperatures of the rows here."""
    extra, heat = call.measures.extra_ids, call.measures.temperature
    found: Exception | None = None
    if extra is not None and extra.device.type == "cpu":
        found = measures.wrong_id(ids, extra, int(columns), call.sequence.ignore_index)
    if found is None and isinstance(heat, Tensor):
        try:
            arguments.check_elements(heat)
        except ValueError as error:
            return error
    return found


def _own_fields(part: Part, whole: TokenStats) -> TokenStats:
    return TokenStats(*(None if x is None else _own(part, x) for x in whole))  # type: ignore[arg-type]


def _whole(
    call: Any, part: Part, read: Read, reading: Reading, own_losses: bool, drop: bool
) -> tuple[Any, Rows, RowStatistics]:
    """The call, its rows and their statistics, as one device with all rows has them."""
    call = call._replace(heads=_wide(call.heads))
    places, inputs = _row_arrays(call, part.labels)
    mine, wanted, shift = None, None, call.sequence.shift
    near = all(is_contiguous(cut) for cut in part.shards.cuts if cut.axis == -1)
    early = drop or (shift and not near)
    agreed: list[Tensor] = []
    if early:  # a label, or whether somebody needs a row, is known where the next or last row is
        inputs = _gather(part, inputs, own_losses, agreed)
        call = _with(call, places, inputs)
        kinds = algebra.align(xp, inputs[0].long(), part.columns or ANY_LABEL, call.sequence)
        mine = _own(part, kinds.labels)
        wanted = _own(part, needed(kinds.kind)) if drop else None
    else:
        sequence = Sequence(call.sequence.ignore_index, where=call.sequence.where)
        bound, labels = part.columns or ANY_LABEL, part.labels
        if shift:  # one label crosses each edge; those of another segment are taken back below
            labels = next_labels(part.shards.cuts, labels, sequence.ignore_index)
        mine = algebra.align(xp, labels.long(), bound, sequence).labels
    found, columns, wrong = read(mine, reading, wanted)
    if wrong is not None:
        errors: list[type] = [error for error, *_ in TOLD]
        part = part._replace(wrong=1 + errors.index(type(wrong)))
    arrays = [x for x in found if x is not None]
    if early:
        arrays = _gather(part, arrays, own_losses, agreed)
    else:
        both = _gather(part, inputs + arrays, own_losses, agreed)
        inputs, arrays = both[: len(inputs)], both[len(inputs) :]
        call = _with(call, places, inputs)
    row_max = arrays[0].detach()
    for fits in agreed:
        row_max = row_max.where(fits, torch.nan)
    found = RowStatistics(row_max, *arrays[1:], *([None] if found.entropy is None else []))
    rows: Rows = algebra.align(xp, inputs[0].long(), columns, call.sequence)  # type: ignore[arg-type]
    if shift and not early:
        scored = rows.labels != NO_LABEL
        found = found._replace(label_logit=torch.where(scored, found.label_logit, 0.0))
    if wrong is not None:
        raise wrong
    if row_max.device.type == "cpu" and (rows.labels == BAD_LABEL).any():
        arguments.refuse_label(rows.labels, inputs[0], int(columns), call.sequence)
    return call, rows, found


def _wide(heads: Heads) -> Heads:
    """Values whose gradients are rounded once, and not on every rank before they are summed."""
    values, next_values = (
        None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))
        for x in (heads.values, heads.next_values)
    )
    return heads._replace(values=values, next_values=next_values)


def _row_arrays(call: Any, labels: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Labels and the arrays of a call with a number for each row or sequence; where they stand."""
    found = [
        ((name, field), x)
        for name, record in call._asdict().items()
        if isinstance(record, Sequence | Weighting | Heads | Terms)
        for field, x in record._asdict().items()
        if isinstance(x, Tensor) and x.ndim and field != "cu_seqlens"
    ]
    return [place for place, _ in found], [labels, *(x for _, x in found)]


def _with(call: Any, places: list[tuple[str, str]], inputs: list[Tensor]) -> Any:
    """The call with these arrays, of which the first are labels and no part of it."""
    for (name, field), x in zip(places, inputs[1:], strict=True):
        call = call._replace(**{name: getattr(call, name)._replace(**{field: x})})
    return call


def _gather(
    part: Part, arrays: list[Tensor], own_losses: bool, agreed: list[Tensor]
) -> list[Tensor]:
    """Arrays of all rows, from those of the rows here; one collective for each axis that is cut.

    On a device ``agreed`` gets whether the ranks called alike and their order is one.
    """
    ndim = part.labels.ndim
    told, whose = part.wrong, ""
    for cut in part.shards.cuts:
        axes = [_axis(cut, x, ndim) for x in arrays]
        cut_ones = [i for i, axis in enumerate(axes) if axis is not None]
        words, order, *whole = Gather.apply(  # type: ignore[no-untyped-call]
            cut,
            part.word + (told << SPARE),
            own_losses,
            tuple(axes[i] for i in cut_ones),
            *(arrays[i] for i in cut_ones),
        )
        arrays = list(arrays)
        for i, x in zip(cut_ones, whole, strict=True):
            arrays[i] = x
        if words.device.type != "cpu":
            agreed.append((words == words[0]).all())
            if cut.order is not None:
                agreed.append(is_order(order))
            continue
        refuse_other_options(words % 2**SPARE, cut.name, part.caller)
        theirs = int(words.max()) >> SPARE
        if theirs > told:
            told, whose = theirs, cut.name
        if cut.order is not None and not is_order(order):
            raise ValueError(
                f"{part.caller}: the sequence_order of all ranks of {cut.name} is no order of "
                f"{order.shape[-1]} rows; accepted: every index from 0 to {order.shape[-1] - 1}, "
                "each once"
            )
    if told and not part.wrong:
        error, name, what = TOLD[told - 1]
        raise error(f"{part.caller}: {name} of another rank of {whose} {what}")
    return arrays


def _axis(cut: Cut, x: Tensor, ndim: int) -> int | None:
    """The axis of an array that is cut; None where one flag per sequence knows nothing of T."""
    if x.ndim == ndim:
        return cut.axis
    return cut.axis + 1 if cut.axis != -1 else None


def _own(part: Part, whole: Tensor) -> Tensor:
    """The rows that are here, of an array of all rows."""
    for cut in reversed(part.shards.cuts):
        whole = own(cut, whole, cut.axis)
    return whole
