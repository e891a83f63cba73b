"""What else a read of a row can tell: the specification of ``row_measures`` and its gradient.

Statistics are those of z, which each row makes of its q, as said in ``irl_ops.kernels.reference``::

    z_j = q_j row_scale    where q_j is kept: keep_mask_j, if given, and not q_j < keep_above
    z_j = -inf             elsewhere

``row_scale`` (the inverse of a temperature) and ``keep_above`` have one number per row; a q that is
NaN is kept by the threshold. Every gradient is exactly 0 where z_j = -inf, a label's too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from irl_ops.kernels import reference

Array = Any


class RowMeasures(NamedTuple):
    """``[...]`` each, or as said; None where it was not asked for."""

    row_max: Array
    logsum: Array  # logsumexp(z) = row_max + logsum
    picked: Array  # [..., K]: z at the ids; 0 where the id is below 0, NaN where it is V or more
    entropy: Array | None
    log_sum_sq: Array | None  # log sum_j p_j^2, within [-log V, 0]
    top1: Array | None  # an integer: the first of the largest z_j; any column in a row with a NaN
    mean_logit: Array | None  # of the z_j above -inf; -inf where there are none
    kept: Array | None  # how many those are; with mean_logit


class Slopes(NamedTuple):
    """The coefficients of ``row_measures_grad``, ``[...]`` or as said; None for 0."""

    a: Array
    b: Array | None
    c: Array  # [..., K]
    d: Array | None
    e: Array | None


def row_measures(
    logits: Array,
    ids: Array,
    wanted: tuple[str, ...] = (),
    *,
    row_scale: Array | None = None,
    keep_mask: Array | None = None,
    keep_above: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> RowMeasures:
    """The statistics of z, and z at the ids.

    Args:
        logits: ``[..., V]``.
        ids: integers ``[..., K]``.
        wanted: names among "entropy", "log_sum_sq", "top1" and "mean_logit".
        row_scale: ``[...]``, or None for 1.
        keep_mask: bool ``[..., V]``, or None for all.
        keep_above: ``[...]``, or None for -inf.
        logit_scale: a number above 0.
        softcap: a number above 0, or None.
    """
    xp = array_namespace(logits)
    q = reference.capped(logits, logit_scale, softcap)
    z = _scaled(q, _kept(q, keep_mask, keep_above), row_scale)
    row_max, logsum = reference.normaliser(z)
    present = xp.astype(z != -xp.inf, z.dtype)
    kept, mean = None, None
    if "mean_logit" in wanted:
        kept = xp.sum(present, axis=-1)
        total = xp.sum(xp.where(present == 0, 0.0, z), axis=-1)
        mean = xp.where(kept == 0, -xp.inf, total / xp.where(kept == 0, 1.0, kept))
    return RowMeasures(
        row_max,
        logsum,
        _picked(z, ids),
        reference.entropy_of(z, row_max, logsum) if "entropy" in wanted else None,
        _log_sum_sq(z, row_max, logsum) if "log_sum_sq" in wanted else None,
        xp.argmax(z, axis=-1) if "top1" in wanted else None,
        mean,
        kept,
    )


def row_measures_grad(
    logits: Array,
    ids: Array,
    row_max: Array,
    logsum: Array,
    slopes: Slopes,
    *,
    row_scale: Array | None = None,
    keep_mask: Array | None = None,
    keep_above: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """``dlogits_j = (p_j (A + B log p_j + D p_j) + E + sum_k C_k 1{j = id_k}) dz/dx``.

    In the logits' dtype, rounded once. An id that is there twice counts twice; one that is out of
    range counts nothing. A row whose A, B, D and E are 0 has the elements at its ids alone.
    """
    xp = array_namespace(logits)
    q = reference.capped(logits, logit_scale, softcap)
    kept = _kept(q, keep_mask, keep_above)
    z = _scaled(q, kept, row_scale)
    logp = (z - row_max[..., None]) - logsum[..., None]
    p = xp.exp(logp)
    b, d, e = (None if x is None else x[..., None] for x in (slopes.b, slopes.d, slopes.e))
    a, c = slopes.a[..., None], slopes.c[..., None]
    inner, live = xp.zeros_like(p) + a, a != 0
    if b is not None:
        inner, live = inner + xp.where(b != 0, b * logp, 0.0), live | (b != 0)
    if d is not None:
        inner, live = inner + xp.where(d != 0, d * p, 0.0), live | (d != 0)
    element = xp.where(live, p * inner, 0.0)
    element = element if e is None else element + e
    column = xp.arange(logits.shape[-1], dtype=ids.dtype, device=device(logits))
    for k in range(ids.shape[-1]):
        element = element + xp.where(column == ids[..., k : k + 1], c[..., k, :], 0.0)
    element = xp.where((z == -xp.inf) | (element == 0), 0.0, element)
    if row_scale is not None:
        element = xp.where(element == 0, 0.0, element * row_scale[..., None])
    return xp.astype(reference.through_cap(element, q, logit_scale, softcap), logits.dtype)


def _kept(q: Array, keep_mask: Array | None, keep_above: Array | None) -> Array | None:
    if keep_above is None:
        return keep_mask
    above = ~(q < keep_above[..., None])
    return above if keep_mask is None else above & keep_mask


def _scaled(q: Array, kept: Array | None, row_scale: Array | None) -> Array:
    xp = array_namespace(q)
    z = q if row_scale is None else q * row_scale[..., None]
    return z if kept is None else xp.where(kept, z, -xp.inf)


def _picked(z: Array, ids: Array) -> Array:
    xp, vocab = array_namespace(z), z.shape[-1]
    picked = xp.take_along_axis(z, xp.clip(ids, 0, vocab - 1), axis=-1)  # never outside the row
    return xp.where(ids >= vocab, xp.nan, xp.where(ids < 0, 0.0, picked))


def _log_sum_sq(z: Array, row_max: Array, logsum: Array) -> Array:
    """``log sum_j e_j^2 - 2 log sum_j e_j``, e_j = exp(z_j - max): no p_j^2 that underflows."""
    xp = array_namespace(z)
    origin = xp.where(row_max == -xp.inf, 0.0, row_max)
    log_squares = reference.normaliser(2 * (z - origin[..., None]))[1]
    # of a confident row both vanish, and their rounding must not make a sum of squares above 1
    return xp.where(logsum == -xp.inf, -xp.inf, xp.clip(log_squares - 2 * logsum, None, 0.0))
