"""Statistics of rows whose columns are on several processes, differentiable by those that are here.

Every process reads its own columns, one collective carries 12 bytes per row and rank (16 with
entropy), and all merge the same numbers in the same order. The backward pass needs no collective:
each process writes the gradient of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops.algebra import (
    BAD_LABEL,
    NO_LABEL,
    RowStatistics,
    label_gradient,
    labels_here,
    merge,
    no_columns,
)
from irl_ops.readout import Readout
from irl_ops.torch import collectives, ops, pool
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.parallel import Columns
from irl_ops.torch.refusals import refuse_second_derivative, refuse_second_pass


class Reading(NamedTuple):
    """How a process reads its columns, and what it tells the others of it."""

    caller: str
    columns: Columns | None  # None: the rows are whole
    word: int  # of the call's options, the same on every rank
    entropy: bool
    backend: str
    readout: Readout
    inplace: bool = False
    wanted: tuple[str, ...] = ()  # of the row measures, where those are read


class Dense(torch.autograd.Function):
    """One read of the logits that are here; one more, and one write, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, how: Reading, box: list[Any]
    ) -> tuple[Tensor, ...]:
        """``(row_max, logsum, label_logit, entropy)``; entropy is empty unless asked for.

        ``box`` gets the number of columns of the whole vocabulary.
        """
        kept = logits.detach()
        here, mine = columns_here(kept, how.columns), labels_of(labels, how.columns)
        if here.shape[-1]:
            kernels, readout = BACKENDS[how.backend], how.readout.keywords
            found = RowStatistics(*kernels.row_stats(here, mine, how.entropy, **readout))
        else:
            found = no_columns(xp, ops.row_vector(kept), how.entropy)
        whole, count = whole_rows(found, labels, how)
        box.append(logits.shape[-1] if count is None else count)
        row_max, logsum, label_logit, h = whole
        entropy = h if h is not None else row_max.new_empty(0)
        # an alias, since the caller's own tensor is poisoned where the gradient takes its storage
        saved = kept if how.inplace else logits
        ctx.save_for_backward(saved, mine, row_max, logsum, label_logit, entropy)
        ctx.how, ctx.handed_over = how, False
        ctx.mark_non_differentiable(row_max)
        return row_max, logsum, label_logit, entropy

    @staticmethod
    def backward(
        ctx: Any, _: Any, dlogsum: Tensor, dlabel: Tensor, dentropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """p_j (A + B log p_j) + C 1{j = label}, with the element at the label written exactly."""
        refuse_second_derivative()
        if ctx.handed_over:
            refuse_second_pass()
        logits, labels, row_max, logsum, label_logit, entropy = ctx.saved_tensors
        how: Reading = ctx.how
        a, b = ops.row_coefficients(entropy if how.entropy else None, dlogsum, dentropy)
        kept = logits.detach()
        dlogits = kept if how.inplace else pool.empty_like(kept)
        here, into = columns_here(kept, how.columns), columns_here(dlogits, how.columns)
        dlogits[..., here.shape[-1] :] = 0.0  # padding
        if here.shape[-1]:
            kernels, readout = BACKENDS[how.backend], how.readout.keywords
            kernels.row_grad(here, labels, row_max, logsum, a, b, dlabel, into, **readout)
            # in float32 p A + C loses what is left of it in a confident row, where A = -C
            logprob = torch.where(labels != NO_LABEL, (label_logit - row_max) - logsum, 0.0)
            element = label_gradient(xp, a, b if how.entropy else None, dlabel, logprob)
            kernels.set_label_(into, labels, element, label_logit, **readout)
        if how.inplace:
            ctx.handed_over = True
            torch.autograd.graph.increment_version(kept)
        return dlogits, None, None, None


def columns_here(x: Tensor, columns: Columns | None) -> Tensor:
    """What is no padding of ``[..., V]``; a view."""
    return x if columns is None else x[..., : columns.width]


def labels_of(labels: Tensor, columns: Columns | None) -> Tensor:
    """Labels for the row kernels of this process."""
    if columns is None:
        return labels
    mine: Tensor = labels_here(xp, labels, columns.start, columns.width)
    return mine


def whole_rows(
    found: RowStatistics, labels: Tensor, how: Reading
) -> tuple[RowStatistics, int | Tensor | None]:
    """The statistics of whole rows, and how many columns these have."""
    if how.columns is None:
        return found, None
    stacked, count, agreed = gathered([x for x in found if x is not None], how)
    shards = RowStatistics(*stacked, *([None] if found.entropy is None else []))
    bad = (labels != NO_LABEL) & (labels >= count)
    whole: RowStatistics = merge(xp, torch.where(bad, BAD_LABEL, labels), shards, count)
    if agreed is not None:
        whole = whole._replace(row_max=whole.row_max.where(agreed, torch.nan))
    return whole, count


def gathered(
    arrays: ListOf[Tensor], how: Reading
) -> tuple[tuple[Tensor, ...], int | Tensor, Tensor | None]:
    """Arrays of all shards, stacked, by one collective; what ``_spans`` says of these."""
    columns = how.columns
    assert columns is not None
    head = (how.word, columns.start, columns.start + columns.width)
    words, stacked = collectives.gather(columns.group, head, arrays)
    return stacked, *_spans(words, how)


def _spans(words: Tensor, how: Reading) -> tuple[int | Tensor, Tensor | None]:
    """How many columns the shards have together, and on a device whether they fit.

    Raises:
        ValueError: on a CPU, where they do not, or where options differ between ranks.
    """
    assert how.columns is not None
    size = how.columns.size
    if words.device.type != "cpu":
        return fits(words, size)
    refuse_other_options(words[:, 0], "vocab_group", how.caller)
    spans = sorted((start, end) for _, start, end in words.tolist() if end > start)
    starts, ends = [start for start, _ in spans], [0, *(end for _, end in spans)]
    if not spans or starts != ends[:-1] or (size is not None and ends[-1] != size):
        wanted = "all columns from 0 on" if size is None else f"the {size} columns of vocab_size"
        raise ValueError(
            f"{how.caller}: the ranks of vocab_group have the columns "
            f"{', '.join(f'{start} to {end - 1}' for start, end in spans) or 'none'}; accepted: "
            f"{wanted}, each once (vocab_start says where a shard begins)"
        )
    return ends[-1], None


def fits(words: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """How many columns the shards have together, and whether they fit and were called alike.

    ``words`` ``[r, 3]``: of each rank a word for its options, its first column and the one behind
    its last. No host looks at them.
    """
    word, start, end = words.unbind(-1)
    some = end > start  # shards without columns go behind the others
    last = torch.where(some, end, 0).amax()
    by_start = torch.where(some, start, last).argsort()
    start, end = (torch.where(some, x, last)[by_start] for x in (start, end))
    right = (start[0] == 0) & (start[1:] == end[:-1]).all() & (word == word[0]).all()
    return last, right if size is None else right & (last == size)


def refuse_other_options(words: Tensor, name: str, caller: str) -> None:
    """Raises, on a CPU, where the ranks were called with other numbers."""
    if (words != words[0]).any():
        raise ValueError(
            f"{caller}: the ranks of {name} differ in the numbers among their options (lam, gamma, "
            "alpha, entropy_coef, z_loss, num_items); accepted: the same on every rank"
        )
