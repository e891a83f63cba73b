"""What follows from the row measures, and the slopes that their gradient is made of.

With z the logits that a row's statistics are of, S = sum_j p_j^2 and n columns above -inf::

    logprob_k  = z[id_k] - V                 d/dz_j = 1{j = id_k} - p_j
    H          = -sum_j p_j log p_j          d/dz_j = -p_j (log p_j + H)
    log_sum_sq = log S                       d/dz_j = 2 p_j (p_j / S - 1)
    mean_logit = sum_j z_j / n               d/dz_j = 1 / n
"""

from __future__ import annotations

from typing import Any

from irl_ops.algebra.finish import Statistics
from irl_ops.algebra.rows import BAD_LABEL, NO_LABEL

Array = Any


def aligned_ids(
    xp: Any, labels: Array, extra_ids: Array | None, vocab: int | Array, ignore: int
) -> Array:
    """The aligned labels, then the extra ids, ``[..., T, 1 + K]``.

    An extra id outside the vocabulary is none where it is ``ignore``, and bad elsewhere.
    """
    ids = labels[..., None]
    if extra_ids is None:
        return ids
    extra = xp.astype(extra_ids, ids.dtype)
    good = (extra >= 0) & (extra < vocab)
    extra = xp.where(good, extra, xp.where(extra == ignore, NO_LABEL, BAD_LABEL))
    return xp.concat([ids, extra], axis=-1)


def measured(
    xp: Any, ids: Array, row_max: Array, logsum: Array, picked: Array, entropy: Array | None
) -> tuple[Statistics, Array]:
    """Row statistics, and the log-likelihoods of the extra ids ``[..., T, K]``.

    What is not kept has the log-likelihood -inf, and so has everything in a row of which nothing
    is kept.
    """
    present = ids != NO_LABEL
    nothing = (row_max == -xp.inf)[..., None] & (picked == -xp.inf)
    logprob = xp.where(nothing, -xp.inf, (picked - row_max[..., None]) - logsum[..., None])
    logprob = xp.where(present, logprob, 0.0)
    label_logit = picked[..., 0]
    correct = present[..., 0] & (label_logit >= row_max) & (label_logit != -xp.inf)
    stats = Statistics(row_max + logsum, label_logit, logprob[..., 0], entropy, correct)
    return stats, logprob[..., 1:]


def measure_slopes(
    xp: Any,
    entropy: Array | None,
    log_sum_sq: Array | None,
    kept: Array | None,
    above: tuple[Array, Array | None, Array | None, Array | None],
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """A, B, D and E of ``row_measures_grad``.

    ``above``: the gradients by logsum, entropy, log_sum_sq and mean_logit; None for 0. A gradient
    of 0 silences what it is multiplied by, NaN or not.
    """
    a, dentropy, dlog_sum_sq, dmean = above
    b = d = e = None
    if entropy is not None and dentropy is not None:
        a = a - xp.where(dentropy != 0, dentropy * entropy, 0.0)
        b = -dentropy
    if log_sum_sq is not None and dlog_sum_sq is not None:
        a = a - 2 * dlog_sum_sq
        d = xp.where(dlog_sum_sq != 0, 2 * dlog_sum_sq * xp.exp(-log_sum_sq), 0.0)
    if kept is not None and dmean is not None:
        e = xp.where(dmean != 0, dmean / xp.where(kept > 0, kept, 1.0), 0.0)
    return a, b, d, e
