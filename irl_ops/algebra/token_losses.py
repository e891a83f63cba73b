"""Losses of one token that are a function of its log-probability, and how they are averaged.

What comes in are statistics of rows, ``[..., T]``, that can be differentiated; what flows back
through them is the business of the framework. ``fixed`` stops a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from irl_ops.algebra.options import Terms, Weighting
from irl_ops.algebra.weights import weigh

Array = Any
Scalar = Any
Fixed = Callable[[Array], Array]


class Scored(NamedTuple):
    """The rows that count, ``[..., T]``; statistics of the others are 0."""

    share: Array  # w_t / N
    logprob: Array
    entropy: Array | None
    per_row: bool  # reduction="none"


def scored(
    xp: Any, kind: Array, logprob: Array, entropy: Array | None, weighting: Weighting
) -> Scored:
    """Leaves out rows of weight 0, whose statistics may be NaN, before a formula sees them."""
    share = weigh(xp, kind, Terms(), weighting).mle
    logprob, entropy = (
        None if x is None else xp.where(share != 0, x, 0.0) for x in (logprob, entropy)
    )
    return Scored(share, logprob, entropy, weighting.reduction == "none")


def averaged(xp: Any, rows: Scored, per_token: Array) -> Array:
    """sum_t w_t x_t / N, or w_t x_t of every row."""
    weighted = rows.share * xp.where(rows.share != 0, per_token, 0.0)
    return weighted if rows.per_row else xp.sum(weighted)


def dft(xp: Any, logprob: Array, fixed: Fixed) -> Array:
    """-sg(p) log p; 0 at p = 0, its limit."""
    finite = xp.where(logprob == -xp.inf, 0.0, logprob)
    return -fixed(xp.exp(logprob)) * finite


def eaft(xp: Any, logprob: Array, entropy: Array, vocab: int, alpha: Scalar, fixed: Fixed) -> Array:
    """-sg((H / log V)^alpha) log p; a weight of 0 silences log p = -inf."""
    gate = fixed(entropy / (math.log(vocab) if vocab > 1 else 1.0)) ** alpha
    return -gate * xp.where(gate != 0, logprob, 0.0)


def k3(xp: Any, logprob: Array, reference: Array) -> Array:
    """exp(d) - d - 1 with d = log ref - log p: at least 0, and 0 where the two agree."""
    ahead = reference - logprob
    return xp.expm1(ahead) - ahead


def asft(xp: Any, logprob: Array, reference: Array, lam: Scalar, fixed: Fixed) -> Array:
    """-sg(p) log p + lam k3; without the second term where lam is the number 0."""
    rectified = dft(xp, logprob, fixed)
    if isinstance(lam, int | float) and lam == 0:
        return rectified
    return rectified + lam * k3(xp, logprob, reference)


def psft(xp: Any, logprob: Array, old: Array, epsilon: Scalar) -> Array:
    """-min(r, clip(r, 1 - epsilon, 1 + epsilon)) with r = p / p_old, which is -min(r, 1 + epsilon).

    The ratio is compared in logarithms: one that overflows would have the gradient inf * 0.
    """
    ahead = logprob - old
    beyond = ahead >= xp.log1p(xp.zeros_like(ahead) + epsilon)
    return -xp.where(beyond, 1.0 + epsilon, xp.exp(xp.where(beyond, 0.0, ahead)))


def power(xp: Any, logprob: Array, q: Scalar) -> Array:
    """(1 - p^q) / q; -log p at q = 0, its limit."""
    q = xp.zeros_like(logprob) + q
    flat = q == 0
    curved = -xp.expm1(xp.where(flat, 0.0, q * logprob)) / xp.where(flat, 1.0, q)
    return xp.where(flat, -logprob, curved)
