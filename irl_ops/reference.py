"""The losses in float64 NumPy: the specification that runs.

The functions of ``irl_ops.torch`` under the same names and with the same arguments, from the same
algebra and the row kernels of ``irl_ops.kernels.reference``. They return the gradients beside the
loss, since NumPy has no autograd. Every backend is tested against these numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from irl_ops import algebra
from irl_ops.kernels import reference as kernels

Float = NDArray[np.float64]


class Result(NamedTuple):
    """A loss and its gradients; float64 but for ``kind``."""

    loss: Float  # 0-d, or [..., T] for reduction="none"
    dlogits: Float  # [..., T, V]: gradient of the loss, or of sum(grad_output * loss)
    dvalues: Float | None
    dnext_values: Float | None
    metrics: dict[str, Float]


class TokenStats(NamedTuple):
    """Statistics of every row, ``[..., T]``."""

    value: Float
    logprob: Float
    entropy: Float
    reward: Float
    next_value: Float
    kind: NDArray[np.int8]


def iqlearn_loss(
    logits: ArrayLike, labels: ArrayLike, *, lam: float = 0.1, gamma: float = 1.0, **options: Any
) -> Result:
    """Offline IQLearn (Eq. 14); see ``irl_ops.torch.iqlearn_loss``.

    Args:
        logits: ``[..., T, V]``.
        labels: integers ``[..., T]``.
        lam: weight of the TD term.
        gamma: discount.
        **options: every other option of the torch function except ``return_metrics`` (always),
            ``inplace`` and ``backend``; and ``grad_output``, the gradient that comes from above, a
            number, or ``[..., T]`` for reduction="none".
    """
    return _loss(algebra.iqlearn_objective, logits, labels, dict(lam=lam, gamma=gamma), **options)


def mle_loss(logits: ArrayLike, labels: ArrayLike, **options: Any) -> Result:
    """MLE, and entropy-regularised MLE (Eq. 18); see ``irl_ops.torch.mle_loss``."""
    return _loss(algebra.mle_objective, logits, labels, {}, **options)


def online_iqlearn_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    is_expert: ArrayLike,
    *,
    alpha: float = 0.1,
    lam: float = 0.1,
    gamma: float = 1.0,
    **options: Any,
) -> Result:
    """Online IQLearn (Eqs. 15-17); see ``irl_ops.torch.online_iqlearn_loss``."""
    terms = dict(is_expert=np.asarray(is_expert), alpha=alpha, lam=lam, gamma=gamma)
    return _loss(algebra.online_iqlearn_objective, logits, labels, terms, **options)


def token_stats(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 1.0,
    next_values: ArrayLike | None = None,
    values: ArrayLike | None = None,
    **sequence: Any,
) -> TokenStats:
    """Row statistics, the extracted reward and the kind of every row."""
    logits = _float(logits)
    rows = algebra.rows_of(xp, np.asarray(labels), logits.shape[-1], **_arrays(sequence))
    stats = algebra.statistics(xp, rows.labels, *kernels.row_stats(logits, rows.labels, True))
    step = algebra.transition(
        xp, rows.kind, stats, gamma, next_values=_optional(next_values), values=_optional(values)
    )
    return TokenStats(
        step.value, stats.logprob, stats.entropy, step.reward, step.next_value, rows.kind
    )


def _loss(
    objective: Any,
    logits: ArrayLike,
    labels: ArrayLike,
    terms: dict[str, Any],
    *,
    entropy_coef: float = 0.0,
    token_weights: ArrayLike | None = None,
    num_items: Any = None,
    reduction: str = "mean",
    detach_next: bool = False,
    next_values: ArrayLike | None = None,
    values: ArrayLike | None = None,
    grad_output: ArrayLike = 1.0,
    **sequence: Any,
) -> Result:
    logits, labels = _float(logits), np.asarray(labels)
    rows = algebra.rows_of(xp, labels, logits.shape[-1], **_arrays(sequence))
    weights = np.ones(labels.shape) if token_weights is None else _float(token_weights)
    loss = objective(
        xp,
        rows.kind,
        weights,
        reduction=reduction,
        num_items=num_items,
        entropy_coef=entropy_coef,
        **terms,
    )
    heads = dict(next_values=_optional(next_values), values=_optional(values))
    # the loss is linear in its weights, so a gradient from above is a factor on them
    above = _float(grad_output)
    scaled = loss._replace(mle=above * loss.mle, td=None if loss.td is None else above * loss.td)
    out = algebra.single_pass(xp, kernels, logits, rows, scaled, detach_next=detach_next, **heads)
    per_row = algebra.row_losses(xp, loss, out.stats, out.step.reward)
    return Result(
        per_row if reduction == "none" else np.sum(per_row),
        out.dlogits,
        out.dvalues,
        out.dnext_values,
        algebra.metrics(xp, rows.kind, loss, out.stats, out.step),
    )


def _float(x: ArrayLike) -> Float:
    return np.asarray(x, dtype=np.float64)


def _arrays(sequence: dict[str, Any]) -> dict[str, Any]:
    arrays = {"where", "segment_ids", "position_ids", "cu_seqlens", "truncated"}
    return {
        name: np.asarray(option) if name in arrays and option is not None else option
        for name, option in sequence.items()
    }


def _optional(x: ArrayLike | None) -> Float | None:
    return None if x is None else _float(x)
