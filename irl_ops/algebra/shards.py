"""Rows whose columns, or whose neighbours, are on other devices: what is merged, and in what order.

Vocabulary. A device reads its own columns, which gives ``row_max``, ``logsum``, ``label_logit`` and
``entropy`` of these columns alone. One gather of them lets every device compute those of the whole
row, alike to the last bit, since all merge the same numbers in the same order::

    row_max = max_r m_r                         m_r, s_r: row_max and logsum of shard r
    log w_r = m_r - row_max + s_r - logsum      the share of the row's mass that shard r holds
    logsum  = log sum_r exp(m_r - row_max + s_r)
    entropy = sum_r w_r (h_r - log w_r)
    q[a]    = sum_r q_r[a], of which one is not 0
    log_sum_sq = log sum_r exp(2 log w_r + log_sum_sq_r)
    top1       = the first column among those of the shards whose m_r is row_max
    mean_logit = sum_r n_r mean_r / sum_r n_r   n_r: how many columns shard r has kept

The gradient p_j (A + B log p_j) + C 1{j = a} of a column then needs nothing else: with the whole
row's ``row_max`` and ``logsum`` the row kernel writes it for the columns it is given. To all shards
but one the label is NO_LABEL (``labels_here``), so that C is added where the label's column is, and
nowhere else.

Sequence. Every row is known by its index in the whole sequence. What is gathered comes by device;
``in_order`` puts it into the order of the sequence, where the stages of this package see a batch as
if it had never been cut, and ``rows_at`` takes a device's own rows out of the result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from irl_ops.algebra.rows import BAD_LABEL, NO_LABEL

Array = Any
Scalar = Any


NO_COLUMN = 2**31 - 1
"""``top1`` of a shard without columns."""


class RowStatistics(NamedTuple):
    """What the row kernel ``row_stats`` returns: ``[..., T]``, or ``[r, ..., T]`` of r shards."""

    row_max: Array
    logsum: Array
    label_logit: Array
    entropy: Array | None


def labels_here(xp: Any, labels: Array, start: Scalar, columns: Scalar) -> Array:
    """Labels, or ids, as the row kernels of one shard take them, whose first column is ``start``.

    NO_LABEL where another shard has the label's column, or none has. ``labels`` are global, with
    NO_LABEL and BAD_LABEL as ``align`` leaves them.
    """
    inside = (labels >= start) & (labels < start + columns) & (labels != BAD_LABEL)
    return xp.where(inside & (labels != NO_LABEL), labels - start, NO_LABEL)


def no_columns(xp: Any, like: Array, entropy: bool) -> RowStatistics:
    """The statistics of a shard without columns; ``like`` is an array ``[..., T]`` of floats."""
    nothing, zero = xp.full_like(like, -xp.inf), xp.zeros_like(like)
    return RowStatistics(nothing, nothing, zero, zero if entropy else None)


def merge(xp: Any, labels: Array, shards: RowStatistics, columns: Scalar) -> RowStatistics:
    """The statistics of whole rows from those of their shards, which are stacked on axis 0.

    ``columns`` is the size of the vocabulary, whose logarithm no entropy exceeds. ``labels``
    ``[..., T]`` are global; the label's logit is NaN for BAD_LABEL. Rows without mass (all -inf)
    have -inf for ``row_max`` and ``logsum``; a NaN in any shard makes both NaN or the value NaN, as
    in one piece.
    """
    row_max, logsum, share = _normaliser(xp, shards)
    label_logit = _picked(xp, labels, shards.label_logit)
    entropy = None if shards.entropy is None else _entropy(xp, share, shards.entropy, columns)
    return RowStatistics(row_max, logsum, label_logit, entropy)


def merge_measures(xp: Any, ids: Array, shards: Any, columns: Scalar) -> Any:
    """What the row kernel ``row_measures`` returns, of whole rows from their shards' on axis 0.

    ``ids`` ``[..., T, K]`` are global, and so are the columns in ``top1``. As for ``merge``, but
    that of a row without mass ``top1`` is its first column, and ``mean_logit`` -inf.
    """
    row_max, logsum, share = _normaliser(xp, shards)
    entropy = log_sum_sq = top1 = mean = kept = None
    if shards.entropy is not None:
        entropy = _entropy(xp, share, shards.entropy, columns)
    if shards.log_sum_sq is not None:
        squares = xp.where(share == -xp.inf, -xp.inf, 2 * share + shards.log_sum_sq)
        log_sum_sq = xp.clip(_log_sum_exp(xp, squares), None, 0.0)
    if shards.top1 is not None:
        top1 = xp.min(xp.where(shards.row_max == row_max, shards.top1, NO_COLUMN), axis=0)
        top1 = xp.where(top1 == NO_COLUMN, 0, top1)  # a row with a NaN
    if shards.mean_logit is not None:
        kept = xp.sum(shards.kept, axis=0)
        total = xp.sum(xp.where(shards.kept == 0, 0.0, shards.kept * shards.mean_logit), axis=0)
        mean = xp.where(kept == 0, -xp.inf, total / xp.where(kept == 0, 1.0, kept))
    return shards._replace(
        row_max=row_max,
        logsum=logsum,
        picked=_picked(xp, ids, shards.picked),
        entropy=entropy,
        log_sum_sq=log_sum_sq,
        top1=top1,
        mean_logit=mean,
        kept=kept,
    )


def in_order(xp: Any, gathered: Array, order: Array | None) -> Array:
    """Rows ``[..., N]`` as they came, put into the order of the sequence.

    ``order`` ``[..., N]`` is the index in the sequence of every row that came; None: they came in
    the sequence's order.
    """
    if order is None:
        return gathered
    where_from = xp.argsort(order, axis=-1)
    return xp.take_along_axis(gathered, xp.broadcast_to(where_from, gathered.shape), axis=-1)


def rows_at(xp: Any, whole: Array, index: Array) -> Array:
    """A device's own rows ``[..., T]`` of the whole ``[..., N]``; ``index`` is theirs in it."""
    shape = (*whole.shape[:-1], index.shape[-1])
    return xp.take_along_axis(whole, xp.broadcast_to(index, shape), axis=-1)


def _normaliser(xp: Any, shards: Any) -> tuple[Array, Array, Array]:
    """``row_max`` and ``logsum`` of whole rows, and log w of every shard: -inf without mass."""
    row_max = xp.max(shards.row_max, axis=0)
    origin = xp.where(row_max == -xp.inf, 0.0, row_max)
    # an empty shard has no mass: -inf, and not -inf - (-inf)
    mass = xp.where(shards.row_max == -xp.inf, -xp.inf, shards.row_max - origin + shards.logsum)
    logsum = _log_sum_exp(xp, mass)
    return row_max, logsum, mass - xp.where(logsum == -xp.inf, 0.0, logsum)


def _picked(xp: Any, ids: Array, shards: Array) -> Array:
    return xp.where(ids == BAD_LABEL, xp.nan, xp.sum(shards, axis=0))


def _entropy(xp: Any, share: Array, shards: Array, columns: Scalar) -> Array:
    terms = xp.exp(share) * (shards - share)
    h = xp.sum(xp.where(share == -xp.inf, 0.0, terms), axis=0)
    most = xp.log(xp.astype(columns, h.dtype)) if hasattr(columns, "dtype") else math.log(columns)
    h = xp.where(h > most, most, h)  # h may be rounded out of its range; NaN stays
    return xp.where(h < 0.0, 0.0, h)


def _log_sum_exp(xp: Any, x: Array) -> Array:
    """log sum exp over axis 0, -inf where all are.

    The largest terms are 1 and are counted, not summed, so that what a confident row has beside
    them is not lost: log(1 + rest), and not log(1).
    """
    top = xp.max(x, axis=0)
    centred = x - xp.where(top == -xp.inf, 0.0, top)
    at_top = centred == 0
    rest = xp.sum(xp.where(at_top, 0.0, xp.exp(centred)), axis=0)
    ties = xp.sum(xp.astype(at_top, x.dtype), axis=0)
    return top + xp.log1p(rest + (ties - 1.0))
