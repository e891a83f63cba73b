"""After the pass: the loss, and what is reported beside it."""

from __future__ import annotations

from typing import Any

from irl_ops.algebra.finish import Finished, Statistics, Transition
from irl_ops.algebra.rows import IGNORED, has_td
from irl_ops.algebra.weights import Objective

Array = Any


def total(xp: Any, kind: Array, loss: Objective, done: Finished) -> tuple[Array, dict[str, Array]]:
    """The loss summed over rows, and the metrics."""
    per_row = row_losses(xp, loss, done.stats, done.step)
    return xp.sum(per_row), metrics(xp, kind, loss, done.stats, done.step)


def row_losses(xp: Any, loss: Objective, stats: Statistics, step: Transition) -> Array:
    """m_t (-log pi_t - kappa H_t + zeta V_t^2) + d_t delta_t^2, ``[..., T]``.

    A term of weight 0 is 0, and so is its derivative, even where it is NaN: it is masked before it
    is used, not after.
    """
    weighted = loss.mle != 0
    nll = -xp.where(weighted, stats.logprob, 0.0)
    if loss.entropy_coef is not None:
        nll = nll - loss.entropy_coef * xp.where(weighted, stats.entropy, 0.0)
    if loss.z_loss is not None:
        nll = nll + loss.z_loss * xp.where(weighted, stats.value, 0.0) ** 2
    per_row = loss.mle * nll
    if loss.td is not None:
        per_row = per_row + loss.td * xp.where(loss.td != 0, step.reward, 0.0) ** 2
    return per_row


def metrics(
    xp: Any, kind: Array, loss: Objective, stats: Statistics, step: Transition
) -> dict[str, Array]:
    """Means over the labelled rows ("td", "reward": over the rows with a TD term), 0-d arrays."""
    labelled, dtype = kind != IGNORED, stats.value.dtype
    out = {"nll": _mean(xp, -stats.logprob, labelled), "value": _mean(xp, step.value, labelled)}
    if loss.entropy_coef is not None:
        out["entropy"] = _mean(xp, stats.entropy, labelled)
    if loss.td is not None:
        out["td"] = _mean(xp, step.reward**2, has_td(kind))
        out["reward"] = _mean(xp, step.reward, has_td(kind))
    out["accuracy"] = _mean(xp, xp.astype(stats.correct, dtype), labelled)
    if loss.z_loss is not None:
        out["z"] = _mean(xp, stats.value**2, labelled)
    out["tokens"] = xp.sum(xp.astype(labelled, dtype))
    return out


def _mean(xp: Any, x: Array, rows: Array) -> Array:
    count = xp.sum(xp.astype(rows, x.dtype))
    return xp.sum(xp.where(rows, x, 0.0)) / xp.where(count > 0, count, 1.0)
