"""The row kernels in plain array code: the specification, and the backend that runs anywhere.

NumPy, torch or JAX arrays come in and go out. float64 logits are computed in float64, all others in
float32. Traffic is not the aim here: every step is a pass of its own over ``[..., T, V]``.

A label below 0 means "no label"; one of V or more is bad, its logit is NaN and nothing is written.

All of it is about q = softcap tanh(logit_scale x / softcap), x being the logits that are given, or
q = logit_scale x without a soft cap: statistics are those of q, and gradients are multiplied by
dq/dx = logit_scale (1 - (q / softcap)^2). A logit of -inf stays -inf under a cap, which gives no
mass to what is masked, and has the slope 0. Both are plain numbers.
"""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace, device

Array = Any


def row_stats(
    logits: Array,
    labels: Array,
    entropy: bool = False,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """``(row_max, logsum, label_logit, entropy)`` of every row.

    ``logsumexp(q) = row_max + logsum``; entropy = logsum - sum_j p_j (q_j - row_max).

    Args:
        logits: ``[..., V]``.
        labels: integers ``[...]``.
        entropy: whether the entropy is computed; it is None otherwise.
        logit_scale: a number above 0.
        softcap: a number above 0, or None.
    """
    q = capped(logits, logit_scale, softcap)
    row_max, logsum = normaliser(q)
    return (
        row_max,
        logsum,
        label_logit(logits, labels, logit_scale=logit_scale, softcap=softcap),
        entropy_of(q, row_max, logsum) if entropy else None,
    )


def row_grad(
    logits: Array,
    labels: Array,
    row_max: Array,
    logsum: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """``dlogits_j = (p_j (A + B log p_j) + C 1{j = label}) dq/dx``, in the logits' dtype."""
    xp = array_namespace(logits)
    q = capped(logits, logit_scale, softcap)
    element = _softmax_terms(q, row_max, logsum, a, b) + xp.where(
        _is_label(logits, labels), c[..., None], 0.0
    )
    return xp.astype(through_cap(element, q, logit_scale, softcap), logits.dtype)


def row_stats_grad(
    logits: Array,
    alpha: Array,
    beta: Array,
    entropy_weight: Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Array, Array, Array | None, Array]:
    """``(row_max, logsum, entropy, dlogits)`` in one go.

    ``dlogits_j = p_j (A + B log p_j) dq/dx`` with A = alpha + beta (row_max + logsum) + B entropy
    and B = ``entropy_weight``; None stands for 0, and the entropy is None then. A coefficient of 0
    silences its factor, NaN or not. Where alpha = -inf everything is 0: a row that nobody needs,
    and that other kernels do not read.
    """
    xp = array_namespace(logits)
    unread = alpha == -xp.inf
    q = xp.where(unread[..., None], 0.0, capped(logits, logit_scale, softcap))
    alpha, beta = xp.where(unread, 0.0, alpha), xp.where(unread, 0.0, beta)
    row_max, logsum = normaliser(q)
    a, b, entropy = (
        alpha + xp.where(beta != 0, beta * (row_max + logsum), 0.0),
        xp.zeros_like(alpha),
        None,
    )
    if entropy_weight is not None:
        b = xp.where(unread, 0.0, entropy_weight)
        entropy = xp.where(unread, 0.0, entropy_of(q, row_max, logsum))
        a = a + xp.where(b != 0, b * entropy, 0.0)
    terms = through_cap(_softmax_terms(q, row_max, logsum, a, b), q, logit_scale, softcap)
    return row_max, xp.where(unread, 0.0, logsum), entropy, xp.astype(terms, logits.dtype)


def label_logit(
    logits: Array, labels: Array, *, logit_scale: float = 1.0, softcap: float | None = None
) -> Array:
    """``q[label]``; 0 without a label, NaN for a bad one.

    Selected, not gathered: no address is ever computed from a label.
    """
    xp = array_namespace(logits)
    q = capped(logits, logit_scale, softcap)
    picked = xp.sum(xp.where(_is_label(logits, labels), q, 0.0), axis=-1)
    return xp.where(labels >= logits.shape[-1], xp.nan, picked)


def set_label(
    dlogits: Array,
    labels: Array,
    elements: Array,
    label_logit: Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """The gradient with the elements at the labels replaced, rounded once.

    Args:
        dlogits: ``[..., V]``.
        labels: integers ``[...]``.
        elements: ``[...]``, gradients in q; what is written is multiplied by dq/dx.
        label_logit: ``[...]``, q at the labels, from which dq/dx is found under a soft cap.
        logit_scale: a number above 0.
        softcap: a number above 0, or None.
    """
    xp = array_namespace(dlogits)
    if softcap is not None and label_logit is None:
        raise ValueError("softcap needs label_logit, q at the labels, for the slope of the cap")
    elements = through_cap(elements, label_logit, logit_scale, softcap)
    elements = xp.astype(elements, dlogits.dtype)
    return xp.where(_is_label(dlogits, labels), elements[..., None], dlogits)


def capped(logits: Array, logit_scale: float, softcap: float | None) -> Array:
    """q in the dtype of the computation."""
    xp = array_namespace(logits)
    x = _upcast(logits)
    if softcap is None:
        return x if logit_scale == 1.0 else logit_scale * x
    return xp.where(x == -xp.inf, -xp.inf, softcap * xp.tanh(x * (logit_scale / softcap)))


def through_cap(g: Array, q: Array, logit_scale: float, softcap: float | None) -> Array:
    """A gradient in q as one in the logits. A zero stays one, where q is NaN too."""
    if softcap is None:
        return g if logit_scale == 1.0 else logit_scale * g
    xp = array_namespace(g)
    slope = logit_scale * (1 - (q / softcap) ** 2)
    return xp.where((g == 0) | (q == -xp.inf), 0.0, g * slope)


def _upcast(logits: Array) -> Array:
    xp = array_namespace(logits)
    return logits if logits.dtype == xp.float64 else xp.astype(logits, xp.float32)


def _is_label(logits: Array, labels: Array) -> Array:
    xp = array_namespace(logits)
    column = xp.arange(logits.shape[-1], dtype=labels.dtype, device=device(logits))
    return column == labels[..., None]


def normaliser(q: Array) -> tuple[Array, Array]:
    """``row_max`` and ``log sum_j exp(q_j - row_max)``.

    The terms of the maximum itself are 1 and are counted, not summed, so that a confident row keeps
    the others, which vanish beside 1: log(1 + rest) and not log(1).
    """
    xp = array_namespace(q)
    row_max = xp.max(q, axis=-1)
    # all -inf: no mass, so that logsum and the value are -inf, as those of an empty shard are
    origin = xp.where(row_max == -xp.inf, 0.0, row_max)
    centred = q - origin[..., None]
    at_max = centred == 0
    rest = xp.sum(xp.where(at_max, 0.0, xp.exp(centred)), axis=-1)
    ties = xp.sum(xp.astype(at_max, q.dtype), axis=-1)
    return row_max, xp.log1p(rest + (ties - 1.0))


def entropy_of(q: Array, row_max: Array, logsum: Array) -> Array:
    """``logsum - sum_j p_j (q_j - row_max)``, held within [0, log V], which rounding may leave."""
    xp = array_namespace(q)
    centred = q - row_max[..., None]
    p = xp.exp(centred - logsum[..., None])
    # q_j = -inf has p_j = 0 and contributes nothing; neither does a row without mass
    terms = xp.where(q == -xp.inf, 0.0, p * centred)
    entropy = xp.clip(logsum - xp.sum(terms, axis=-1), 0.0, math.log(q.shape[-1]))
    return xp.where(logsum == -xp.inf, 0.0, entropy)


def _softmax_terms(q: Array, row_max: Array, logsum: Array, a: Array, b: Array) -> Array:
    """``p_j (A + B log p_j)``; 0 where q_j = -inf, and whole rows of 0 where A = B = 0."""
    xp = array_namespace(q)
    logp = (q - row_max[..., None]) - logsum[..., None]
    a, b = a[..., None], b[..., None]
    terms = xp.exp(logp) * (a + xp.where(b != 0, b * logp, 0.0))
    return xp.where(((a == 0) & (b == 0)) | (q == -xp.inf), 0.0, terms)
