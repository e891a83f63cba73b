"""After the pass: residuals, the gradient at the labels, and the gradients of value heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from irl_ops.algebra.coefficients import UNREAD, Coefficients, given_ahead
from irl_ops.algebra.neighbours import following, preceding
from irl_ops.algebra.options import Heads
from irl_ops.algebra.rows import BOOTSTRAP, NO_LABEL, Rows, has_td
from irl_ops.algebra.weights import Objective

Array = Any
Scalar = Any


class Statistics(NamedTuple):
    """Row statistics, ``[..., T]``."""

    value: Array  # V_t = logsumexp(q_t)
    label_logit: Array  # q_t[a_t]; 0 without a label
    logprob: Array  # log pi_t; 0 without a label
    entropy: Array | None  # H_t; None where it was not computed
    correct: Array  # bool: no logit is larger than the label's; False without a label


class Transition(NamedTuple):
    """What the TD term sees of each row, ``[..., T]``."""

    value: Array  # V_t, or v_t of a separate value head
    next_value: Array  # V'_t; 0 unless the row bootstraps
    reward: Array  # delta_t; 0 without a TD term


class Finished(NamedTuple):
    """What is known of each row behind the pass, ``[..., T]``."""

    stats: Statistics
    step: Transition
    slope: Array | None  # u_t = 2 d_t delta_t; None without a TD term
    element: Array  # of the gradient, at the label


def statistics(
    xp: Any, labels: Array, row_max: Array, logsum: Array, label_logit: Array, entropy: Array | None
) -> Statistics:
    """Statistics from what the kernels return.

    They keep V as the unevaluated sum ``row_max + logsum``: log pi = (q_a - max) - logsum loses
    nothing where the logits have a large common offset, q_a - V would.
    """
    labelled = labels != NO_LABEL
    logprob = xp.where(labelled, (label_logit - row_max) - logsum, 0.0)
    correct = labelled & (label_logit >= row_max)
    return Statistics(row_max + logsum, label_logit, logprob, entropy, correct)


def transition(
    xp: Any,
    kind: Array,
    stats: Statistics,
    gamma: Scalar,
    heads: Heads,
    *,
    behind: Array | Scalar = 0.0,
    stop_gradient: Callable[[Array], Array] | None = None,
) -> Transition:
    """The TD residual delta_t = Q_t(a_t) - gamma V'_t.

    With ``values`` v (A.1.1) the Q-value is v_t + log pi_t and the value v_t; otherwise they are
    q_t[a_t] and logsumexp(q_t). ``behind`` is the value of the row behind the last one;
    ``stop_gradient``, where given, is applied to V'.
    """
    value = stats.value if heads.values is None else heads.values
    q = stats.label_logit if heads.values is None else heads.values + stats.logprob
    ahead = given_ahead(xp, kind, heads)
    if ahead is None:
        ahead = xp.where(kind == BOOTSTRAP, following(xp, value, behind), 0.0)
    if stop_gradient is not None:
        ahead = stop_gradient(ahead)
    return Transition(value, ahead, xp.where(has_td(kind), q - gamma * ahead, 0.0))


def finish(
    xp: Any,
    rows: Rows,
    loss: Objective,
    given: Coefficients,
    stats: Statistics,
    heads: Heads,
    behind: Array | Scalar = 0.0,
) -> Finished:
    """Everything that the logits' statistics decide, for a window of rows.

    ``behind`` is the value of the row behind the window's last.
    """
    step = transition(xp, rows.kind, stats, loss.gamma, heads, behind=behind)
    slope, c = None, -loss.mle
    if loss.td is not None:
        slope = 2 * loss.td * xp.where(loss.td != 0, step.reward, 0.0)
        c = c + slope
    a = slope_of_value(xp, given, stats)
    element = label_gradient(xp, a, given.entropy_weight, c, stats.logprob)
    return Finished(stats, step, slope, element)


def slope_of_value(xp: Any, given: Coefficients, stats: Statistics) -> Array:
    """A_t, from what was known before the pass and what the pass found."""
    a = xp.where(given.alpha == UNREAD, 0.0, given.alpha)
    return _plus(xp, _plus(xp, a, given.beta, stats.value), given.entropy_weight, stats.entropy)


def head_gradients(
    xp: Any, kind: Array, loss: Objective, slope: Array | None, heads: Heads
) -> tuple[Array | None, Array | None]:
    """The gradients of ``values`` and ``next_values``: u_t - gamma u_{t-1}, and -gamma u_t."""
    if heads.values is None and heads.next_values is None:
        return None, None
    u = xp.zeros_like(loss.mle) if slope is None else slope
    flowing = xp.zeros_like(u) if heads.detach_next else xp.where(kind == BOOTSTRAP, u, 0.0)
    back = -loss.gamma * flowing
    if heads.values is None:
        return None, back
    if heads.next_values is not None:
        return u, back
    return u + preceding(xp, back, 0.0), None


def label_gradient(xp: Any, a: Array, b: Array | None, c: Array, logprob: Array) -> Array:
    """p_a (A + B log p_a) + C with p_a = exp(logprob), and C alone where A = B = 0.

    Written with expm1, so that the A - A of a confident row cancels exactly; an infinite A, which
    a label of logit -inf in the row before sends here, stays what it is.
    """
    live = a != 0 if b is None else (a != 0) | (b != 0)
    logprob = xp.where(live, logprob, 0.0)
    endless = xp.abs(a) == xp.inf
    finite_a = xp.where(endless, 0.0, a)
    element = finite_a * xp.expm1(logprob) + (finite_a + c)
    if b is not None:
        finite = xp.where(logprob > -xp.inf, logprob, 0.0)
        element = element + b * xp.exp(logprob) * finite
    return xp.where(live, xp.where(endless, a, element), c)


def _plus(xp: Any, base: Array, weight: Array | None, x: Array | None) -> Array:
    """``base + weight * x`` where a weight of 0 silences x, NaN or not."""
    if weight is None or x is None:
        return base
    return base + weight * xp.where(weight != 0, x, 0.0)
