"""The mathematics of the losses: scalar algebra on ``[..., T]`` arrays, written once.

Row t of a sequence has logits ``q_t`` in R^V, read as Q-values, and a label ``a_t``::

    V_t      = logsumexp(q_t)                      value
    log pi_t = q_t[a_t] - V_t                      logprob
    H_t      = -sum_j p_j log p_j                  entropy, p = softmax(q_t)
    delta_t  = q_t[a_t] - gamma V'_t               TD residual = extracted reward
    L        = sum_t m_t (-log pi_t - kappa H_t) + d_t delta_t^2

Every loss is a choice of the weights m (``mle``), d (``td``) and kappa (``entropy_coef``); V'
follows from the kind of the row. The gradient is p_j (A_t + B_t log p_j) + C_t 1{j = a_t} with::

    u_t = 2 d_t delta_t
    A_t = m_t (1 + kappa H_t) - gamma u_{t-1} [row t-1 bootstraps]
        = alpha_t + beta_t V_t + kappa m_t H_t
    B_t = kappa m_t
    C_t = -m_t + u_t

so that a row kernel needs of its neighbour only the scalars alpha and beta, known beforehand.

Everything here runs on NumPy, torch and JAX arrays alike, ``xp`` being their array_api_compat
namespace. The row kernels come in as the argument ``kernels``; this module imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Array = Any
Scalar = Any  # a Python number or a 0-d array

IGNORED, TERMINAL, BOOTSTRAP, NO_TD = 0, 1, 2, 3
"""Kinds of row: no label; V' = 0; V' = V_{t+1}; labelled, but without a TD term."""

NO_LABEL = -1
BAD_LABEL = 2**31 - 1  # outside every vocabulary: the kernels answer NaN and read nothing
UNREAD = float("-inf")  # as alpha: nobody needs the row, the kernels answer 0 and read nothing


# --- Sequences: which row follows which, and what kind each is ---


class Rows(NamedTuple):
    """What the labels alone decide; arrays of shape ``[..., T]``."""

    labels: Array  # NO_LABEL in ignored rows, BAD_LABEL where out of range
    kind: Array  # int8


def following(xp: Any, x: Array, fill: Scalar) -> Array:
    """``x[..., t + 1]`` at t; ``fill`` in the last row."""
    return xp.concat([x[..., 1:], xp.full_like(x[..., :1], fill)], axis=-1)


def preceding(xp: Any, x: Array, fill: Scalar) -> Array:
    """``x[..., t - 1]`` at t; ``fill`` in the first row."""
    return xp.concat([xp.full_like(x[..., :1], fill), x[..., :-1]], axis=-1)


def next_row_exists(
    xp: Any,
    labels: Array,
    *,
    segment_ids: Array | None = None,
    position_ids: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array:
    """True where row t + 1 lies in the same batch row and the same segment; bool ``[..., T]``."""
    if cu_seqlens is not None:
        row = xp.cumulative_sum(xp.ones_like(labels, dtype=cu_seqlens.dtype), axis=-1) - 1
        segment_ids = xp.searchsorted(cu_seqlens, row, side="right")
    if position_ids is not None:
        joined = position_ids[..., 1:] == position_ids[..., :-1] + 1
    elif segment_ids is not None:
        joined = segment_ids[..., 1:] == segment_ids[..., :-1]
    else:
        joined = xp.ones_like(labels[..., 1:], dtype=xp.bool)
    return xp.concat([joined, xp.zeros_like(labels[..., :1], dtype=xp.bool)], axis=-1)


def rows_of(
    xp: Any,
    labels: Array,
    vocab: int,
    *,
    ignore_index: int = -100,
    where: Array | None = None,
    shift: bool = False,
    segment_ids: Array | None = None,
    position_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: str = "terminal",
    truncated: Array | None = None,
) -> Rows:
    """Aligns the labels with their logits and gives every row its kind.

    The first rule that applies decides:

    ====================================  =============================================
    no label (ignore_index, ``where``)    IGNORED
    the label is in ``eos_token_id``      TERMINAL
    next row exists and is labelled       BOOTSTRAP
    ``truncated`` holds for the row       BOOTSTRAP if a next row exists, else NO_TD
    ``eos_token_id`` is given             BOOTSTRAP if a next row exists, else NO_TD
    ``boundary="terminal"``               TERMINAL
    ``boundary="bootstrap"``              BOOTSTRAP if a next row exists, else NO_TD
    ``boundary="drop"``                   NO_TD
    ====================================  =============================================
    """
    has_next = next_row_exists(
        xp, labels, segment_ids=segment_ids, position_ids=position_ids, cu_seqlens=cu_seqlens
    )
    if shift:
        labels = xp.where(has_next, following(xp, labels, ignore_index), ignore_index)
    labelled = labels != ignore_index
    if where is not None:
        labelled = labelled & where

    at_end = TERMINAL if boundary == "terminal" and eos_token_id is None else NO_TD
    kind = xp.full_like(labels, at_end, dtype=xp.int8)
    if eos_token_id is not None or boundary == "bootstrap":
        kind = xp.where(has_next, BOOTSTRAP, kind)
    if truncated is not None:
        if truncated.ndim < labels.ndim:  # one flag a sequence
            truncated = truncated[..., None]
        kind = xp.where(truncated, xp.where(has_next, BOOTSTRAP, xp.full_like(kind, NO_TD)), kind)
    kind = xp.where(has_next & following(xp, labelled, False), BOOTSTRAP, kind)
    for token in end_tokens(eos_token_id):
        kind = xp.where(labels == token, TERMINAL, kind)
    kind = xp.where(labelled, kind, IGNORED)

    in_range = (labels >= 0) & (labels < vocab)
    labels = xp.where(labelled, xp.where(in_range, labels, BAD_LABEL), NO_LABEL)
    return Rows(labels, kind)


def end_tokens(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end an episode."""
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


# --- Weights: what makes one loss different from another ---


class Objective(NamedTuple):
    """A loss: the weights of its terms."""

    mle: Array  # m_t
    td: Array | None  # d_t; None where the loss has no TD term at all
    gamma: Scalar = 1.0
    entropy_coef: Scalar = 0.0

    @property
    def entropy(self) -> bool:
        """Whether the entropy has to be computed."""
        return needs_entropy(self.entropy_coef)


def needs_entropy(entropy_coef: Scalar) -> bool:
    """Unless the coefficient is the number 0: the value of an array is not looked at."""
    return not (isinstance(entropy_coef, int | float) and entropy_coef == 0)


def mle_objective(
    xp: Any,
    kind: Array,
    token_weights: Array,
    *,
    reduction: str = "mean",
    num_items: Scalar | None = None,
    entropy_coef: Scalar = 0.0,
) -> Objective:
    """MLE, with ``entropy_coef`` > 0 the entropy-regularised MLE of Eq. 18: m = w/N, d = 0."""
    share = _share(xp, token_weights, kind != IGNORED, reduction, num_items)
    return Objective(share, None, entropy_coef=entropy_coef)


def iqlearn_objective(
    xp: Any,
    kind: Array,
    token_weights: Array,
    *,
    lam: Scalar,
    gamma: Scalar,
    reduction: str = "mean",
    num_items: Scalar | None = None,
    entropy_coef: Scalar = 0.0,
) -> Objective:
    """Offline IQLearn, Eq. 14: m = w/N, d = lam w/N."""
    share = _share(xp, token_weights, kind != IGNORED, reduction, num_items)
    return Objective(share, _td_only(xp, kind, lam * share), gamma, entropy_coef)


def online_iqlearn_objective(
    xp: Any,
    kind: Array,
    token_weights: Array,
    is_expert: Array,
    *,
    alpha: Scalar,
    lam: Scalar,
    gamma: Scalar,
    reduction: str = "mean",
    num_items: tuple[Scalar, Scalar] | None = None,
    entropy_coef: Scalar = 0.0,
) -> Objective:
    """Online IQLearn, Eqs. 15-17.

    Expert rows have m = w/N_E and d = lam/(1 - alpha) w/N_E; agent rows have m = 0 and
    d = lam alpha/(1 - alpha)^2 w/N_B.
    """
    if is_expert.ndim < kind.ndim:  # one flag a sequence
        is_expert = is_expert[..., None]
    expert_items, agent_items = (None, None) if num_items is None else num_items
    labelled = kind != IGNORED
    expert = _share(xp, token_weights, labelled & is_expert, reduction, expert_items)
    agent = _share(xp, token_weights, labelled & ~is_expert, reduction, agent_items)
    td = lam / (1 - alpha) * expert + lam * alpha / (1 - alpha) ** 2 * agent
    return Objective(expert, _td_only(xp, kind, td), gamma, entropy_coef)


def _share(xp: Any, weights: Array, rows: Array, reduction: str, num_items: Scalar | None) -> Array:
    """w_t / N on the given rows, 0 elsewhere; all 0 where N = 0."""
    weights = xp.where(rows, weights, 0.0)
    if reduction != "mean":
        return weights
    total = xp.sum(weights) if num_items is None else xp.asarray(num_items, dtype=weights.dtype)
    return xp.where(total != 0, weights / xp.where(total != 0, total, 1.0), 0.0)


def _td_only(xp: Any, kind: Array, weights: Array) -> Array:
    return xp.where(_has_td(kind), weights, 0.0)


def _has_td(kind: Array) -> Array:
    return (kind == TERMINAL) | (kind == BOOTSTRAP)


# --- From row statistics to the loss ---


class Statistics(NamedTuple):
    """Row statistics, ``[..., T]``."""

    value: Array  # V_t = logsumexp(q_t)
    label_logit: Array  # q_t[a_t]; 0 without a label
    logprob: Array  # log pi_t; 0 without a label
    entropy: Array  # H_t; None where it was not computed


class Transition(NamedTuple):
    """What the TD term sees of each row, ``[..., T]``."""

    value: Array  # V_t, or v_t of a separate value head
    next_value: Array  # V'_t; 0 unless the row bootstraps
    reward: Array  # delta_t; 0 without a TD term


def statistics(
    xp: Any, labels: Array, row_max: Array, logsum: Array, label_logit: Array, entropy: Array | None
) -> Statistics:
    """Statistics from what the kernels return.

    They keep V as the unevaluated sum ``row_max + logsum``: log pi = (q_a - max) - logsum loses
    nothing where the logits have a large common offset, q_a - V would.
    """
    logprob = xp.where(labels != NO_LABEL, (label_logit - row_max) - logsum, 0.0)
    return Statistics(row_max + logsum, label_logit, logprob, entropy)


def transition(
    xp: Any,
    kind: Array,
    stats: Statistics,
    gamma: Scalar,
    *,
    next_values: Array | None = None,
    values: Array | None = None,
    stop_gradient: Callable[[Array], Array] | None = None,
) -> Transition:
    """The TD residual delta_t = Q_t(a_t) - gamma V'_t.

    With ``values`` v (A.1.1) the Q-value is v_t + log pi_t and the value v_t; otherwise they are
    q_t[a_t] and logsumexp(q_t). ``stop_gradient``, where given, is applied to V'.
    """
    value = stats.value if values is None else values
    q = stats.label_logit if values is None else values + stats.logprob
    ahead = next_value(xp, kind, value, next_values)
    if stop_gradient is not None:
        ahead = stop_gradient(ahead)
    return Transition(value, ahead, xp.where(_has_td(kind), q - gamma * ahead, 0.0))


def next_value(xp: Any, kind: Array, value: Array, next_values: Array | None) -> Array:
    """V'_t: ``next_values`` or else V_{t+1} where the row bootstraps, 0 elsewhere."""
    ahead = following(xp, value, 0.0) if next_values is None else next_values
    return xp.where(kind == BOOTSTRAP, ahead, 0.0)


def row_losses(xp: Any, loss: Objective, stats: Statistics, reward: Array) -> Array:
    """m_t (-log pi_t - kappa H_t) + d_t delta_t^2, ``[..., T]``.

    A term of weight 0 is 0, and so is its derivative, even where it is NaN: it is masked before it
    is used, not after.
    """
    weighted = loss.mle != 0
    nll = -xp.where(weighted, stats.logprob, 0.0)
    if loss.entropy:
        nll = nll - loss.entropy_coef * xp.where(weighted, stats.entropy, 0.0)
    total = loss.mle * nll
    if loss.td is not None:
        total = total + loss.td * xp.where(loss.td != 0, reward, 0.0) ** 2
    return total


def metrics(
    xp: Any, kind: Array, loss: Objective, stats: Statistics, step: Transition
) -> dict[str, Array]:
    """Means over the labelled rows ("td", "reward": over the rows with a TD term), 0-d arrays."""
    labelled = kind != IGNORED
    out = {"nll": _mean(xp, -stats.logprob, labelled), "value": _mean(xp, step.value, labelled)}
    if loss.entropy:
        out["entropy"] = _mean(xp, stats.entropy, labelled)
    if loss.td is not None:
        out["td"] = _mean(xp, step.reward**2, _has_td(kind))
        out["reward"] = _mean(xp, step.reward, _has_td(kind))
    out["tokens"] = xp.sum(xp.astype(labelled, stats.value.dtype))
    return out


def _mean(xp: Any, x: Array, rows: Array) -> Array:
    count = xp.sum(xp.astype(rows, x.dtype))
    return xp.sum(xp.where(rows, x, 0.0)) / xp.where(count > 0, count, 1.0)


# --- Loss and gradient in one pass over the logits ---


class SinglePass(NamedTuple):
    """A loss with its gradients."""

    loss: Array
    dlogits: Array
    dvalues: Array | None
    dnext_values: Array | None
    stats: Statistics
    step: Transition


def single_pass(
    xp: Any,
    kernels: Any,
    logits: Array,
    rows: Rows,
    loss: Objective,
    *,
    next_values: Array | None = None,
    values: Array | None = None,
    detach_next: bool = False,
) -> SinglePass:
    """The summed loss and its gradients: each logit is read once, each gradient written once.

    ``kernels`` has ``label_logit(logits, labels)``, ``row_stats_grad(logits, alpha, beta,
    entropy_weight)`` and ``set_label(dlogits, labels, elements)``, which returns the gradient with
    the labels' elements replaced (in place where arrays allow it).
    """
    labels, kind = rows
    label_logit = kernels.label_logit(logits, labels)
    alpha, beta = affine_coefficients(
        xp, kind, loss, label_logit, next_values=next_values, values=values, detach_next=detach_next
    )
    entropy_weight = loss.entropy_coef * loss.mle if loss.entropy else None
    needed = (kind != IGNORED) | preceding(xp, kind == BOOTSTRAP, False)
    row_max, logsum, entropy, dlogits = kernels.row_stats_grad(
        logits, xp.where(needed, alpha, UNREAD), beta, entropy_weight
    )

    stats = statistics(xp, labels, row_max, logsum, label_logit, entropy)
    step = transition(xp, kind, stats, loss.gamma, next_values=next_values, values=values)
    a = _plus(xp, _plus(xp, alpha, beta, stats.value), entropy_weight, entropy)
    u = td_slope(xp, loss, step.reward)
    element = label_gradient(xp, a, entropy_weight, -loss.mle + u, stats.logprob)
    dlogits = kernels.set_label(dlogits, labels, element)

    dvalues = dnext_values = None
    if values is not None or next_values is not None:
        flowing = xp.zeros_like(u) if detach_next else xp.where(kind == BOOTSTRAP, u, 0.0)
        back = -loss.gamma * flowing
        dnext_values = None if next_values is None else back
        if values is not None:
            dvalues = u if next_values is not None else u + preceding(xp, back, 0.0)
    total = xp.sum(row_losses(xp, loss, stats, step.reward))
    return SinglePass(total, dlogits, dvalues, dnext_values, stats, step)


def affine_coefficients(
    xp: Any,
    kind: Array,
    loss: Objective,
    label_logit: Array,
    *,
    next_values: Array | None = None,
    values: Array | None = None,
    detach_next: bool = False,
) -> tuple[Array, Array]:
    """``(alpha, beta)`` of A_t = alpha_t + beta_t V_t + kappa m_t H_t, before any row is read."""
    alpha, beta = loss.mle, xp.zeros_like(loss.mle)
    if loss.td is None:
        return alpha, beta
    if values is not None:  # delta_t holds log pi_t, so A_t = m_t (1 + kappa H_t) - u_t
        q = values - loss.gamma * next_value(xp, kind, values, next_values) + label_logit
        return alpha - 2 * loss.td * xp.where(loss.td != 0, q, 0.0), 2 * loss.td
    if next_values is not None or detach_next:
        return alpha, beta
    # row t - 1 bootstraps from row t, and differentiates through its value
    td = preceding(xp, xp.where(kind == BOOTSTRAP, loss.td, 0.0), 0.0)
    q = xp.where(td != 0, preceding(xp, label_logit, 0.0), 0.0)
    return alpha - 2 * loss.gamma * td * q, 2 * loss.gamma**2 * td


def td_slope(xp: Any, loss: Objective, reward: Array) -> Array:
    """u_t = 2 d_t delta_t, 0 where d_t = 0."""
    if loss.td is None:
        return xp.zeros_like(reward)
    return 2 * loss.td * xp.where(loss.td != 0, reward, 0.0)


def label_gradient(xp: Any, a: Array, b: Array | None, c: Array, logprob: Array) -> Array:
    """p_a (A + B log p_a) + C with p_a = exp(logprob), and C alone where A = B = 0.

    Written with expm1, so that the A - A of a confident row cancels exactly.
    """
    live = a != 0 if b is None else (a != 0) | (b != 0)
    logprob = xp.where(live, logprob, 0.0)
    element = a * xp.expm1(logprob) + (a + c)
    if b is not None:
        finite = xp.where(logprob > -xp.inf, logprob, 0.0)
        element = element + b * xp.exp(logprob) * finite
    return xp.where(live, element, c)


def _plus(xp: Any, base: Array, weight: Array | None, x: Array | None) -> Array:
    """``base + weight * x`` where a weight of 0 silences x, NaN or not."""
    if weight is None:
        return base
    return base + weight * xp.where(weight != 0, x, 0.0)
