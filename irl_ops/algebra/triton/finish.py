"""After the pass: ``finish``, residuals and what they are to the loss and to its gradients."""

import triton
import triton.language as tl

from irl_ops.algebra.triton.coefficients import given_ahead
from irl_ops.algebra.triton.numbers import number
from irl_ops.algebra.triton.rows import BOOTSTRAP, IGNORED, NO_LABEL, has_td
from irl_ops.algebra.triton.weights import totals, weigh
from irl_ops.kernels.triton.columns import row_of
from irl_ops.kernels.triton.softmax import INF, exp


@triton.jit(
    do_not_specialize=["n", "length", "blocks", "vocab", "inner", "d_outer", "d_inner"]
)  # fmt: skip
def finish(
    labels, kinds, weights, is_expert, row_max, logsum, label_logit, entropy,
    alpha, beta, entropy_weight, values, next_values, partial,
    mle, td, agent_td, gamma, entropy_coef, z_loss, expert_items, agent_items, above,
    n, length, blocks, vocab, inner, d_outer, d_inner,
    dlogits, elements, dvalues, dnext_values, losses, sums,
    MLE: tl.constexpr, TD: tl.constexpr, AGENT_TD: tl.constexpr, GAMMA: tl.constexpr,
    ENTROPY: tl.constexpr, Z: tl.constexpr, ITEMS: tl.constexpr, AGENT_ITEMS: tl.constexpr,
    ABOVE: tl.constexpr, EXPERT: tl.constexpr, MEAN: tl.constexpr,
    VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr, DETACH: tl.constexpr,
    # where elements go: "" for no gradient, "dlogits", or "elements" for a launch of their own
    GRADIENT: tl.constexpr,
    PER_ROW_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Residuals, what they are to the gradient, the loss of every row, and sums for ``total``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    expert_total, agent_total = totals(
        partial, blocks, expert_items, agent_items, MEAN, ITEMS, AGENT_ITEMS, EXPERT
    )
    discount = number(gamma, 0, True, GAMMA)
    kind = tl.load(kinds + i, inside, 0)
    label = tl.load(labels + i, inside, NO_LABEL)
    labelled = kind != IGNORED
    m, d = weigh(
        i, inside, kind, weights, is_expert, length, mle, td, agent_td, above,
        expert_total, agent_total, MLE, TD, AGENT_TD, ABOVE, EXPERT,
    )  # fmt: skip
    top, picked = tl.load(row_max + i, inside, 0.0), tl.load(label_logit + i, inside, 0.0)
    own = top + tl.load(logsum + i, inside, 0.0)
    logprob = _logprob(i, inside, labels, row_max, logsum, label_logit)
    h = tl.zeros_like(m)
    if ENTROPY:
        h = tl.load(entropy + i, inside, 0.0)
    reward = _reward(
        i, inside, kind, labels, row_max, logsum, label_logit, values, next_values, discount, n,
        VALUES, NEXT_VALUES,
    )  # fmt: skip
    u = 2 * d * tl.where(d != 0.0, reward, 0.0)

    if GRADIENT != "":
        a, weight = tl.load(alpha + i, inside, 0.0), tl.load(beta + i, inside, 0.0)
        a = tl.where(a == -INF, 0.0, a) + weight * tl.where(weight != 0.0, own, 0.0)
        b = tl.zeros_like(a)
        if ENTROPY:
            b = tl.load(entropy_weight + i, inside, 0.0)
            a += b * tl.where(b != 0.0, h, 0.0)
        element = _label_gradient(a, b, u - m, logprob, ENTROPY)
        if GRADIENT == "dlogits":
            place = row_of(dlogits, i, inner, d_outer, d_inner, True) + label
            good = (label >= 0) & (label < vocab)
            tl.store(place, element.to(dlogits.dtype.element_ty), good)
        else:
            tl.store(elements + i, element, inside)
        back = tl.where(kind == BOOTSTRAP, -discount * u, 0.0)
        if DETACH:
            back = tl.zeros_like(back)
        if NEXT_VALUES:
            tl.store(dnext_values + i, back, inside)
        if VALUES:
            slope = u
            if not (NEXT_VALUES or DETACH):
                before = inside & (i % length != 0)
                kind_before = tl.load(kinds + i - 1, before, 0)
                _, d_before = weigh(
                    i - 1, before, kind_before, weights, is_expert, length, mle, td, agent_td,
                    above, expert_total, agent_total, MLE, TD, AGENT_TD, ABOVE, EXPERT,
                )  # fmt: skip
                reward_before = _reward(
                    i - 1, before, kind_before, labels, row_max, logsum, label_logit, values,
                    next_values, discount, n, VALUES, NEXT_VALUES,
                )  # fmt: skip
                u_before = 2 * d_before * tl.where(d_before != 0.0, reward_before, 0.0)
                onto = before & (kind_before == BOOTSTRAP)
                slope += tl.where(onto, -discount * u_before, 0.0)
            tl.store(dvalues + i, slope, inside)

    weighted = m != 0.0
    nll = -tl.where(weighted, logprob, 0.0)
    if ENTROPY:
        nll -= number(entropy_coef, 0, True, ENTROPY) * tl.where(weighted, h, 0.0)
    if Z:
        v = tl.where(weighted, own, 0.0)
        nll += number(z_loss, 0, True, Z) * v * v
    delta = tl.where(d != 0.0, reward, 0.0)
    loss = m * nll + d * delta * delta
    if PER_ROW_LOSS:
        tl.store(losses + i, loss, inside)
    value = own
    if VALUES:
        value = tl.load(values + i, inside, 0.0).to(tl.float32)
    with_td = has_td(kind)
    place, step = sums + tl.program_id(0), tl.num_programs(0)
    tl.store(place, tl.sum(tl.where(inside, loss, 0.0), 0))
    tl.store(place + step, tl.sum(tl.where(labelled, -logprob, 0.0), 0))
    tl.store(place + 2 * step, tl.sum(tl.where(labelled, value, 0.0), 0))
    tl.store(place + 3 * step, tl.sum(tl.where(labelled, h, 0.0), 0))
    tl.store(place + 4 * step, tl.sum(tl.where(with_td, reward * reward, 0.0), 0))
    tl.store(place + 5 * step, tl.sum(tl.where(with_td, reward, 0.0), 0))
    tl.store(place + 6 * step, tl.sum((labelled & (picked >= top)).to(tl.float32), 0))
    tl.store(place + 7 * step, tl.sum(tl.where(labelled, own * own, 0.0), 0))
    tl.store(place + 8 * step, tl.sum(labelled.to(tl.float32), 0))
    tl.store(place + 9 * step, tl.sum(with_td.to(tl.float32), 0))


@triton.jit
def _logprob(i, inside, labels, row_max, logsum, label_logit):
    logprob = tl.load(label_logit + i, inside, 0.0) - tl.load(row_max + i, inside, 0.0)
    logprob -= tl.load(logsum + i, inside, 0.0)
    return tl.where(tl.load(labels + i, inside, NO_LABEL) != NO_LABEL, logprob, 0.0)


@triton.jit
def _reward(
    i, inside, kind, labels, row_max, logsum, label_logit, values, next_values, discount, n,
    VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr,
):  # fmt: skip
    """delta of the rows i; 0 without a TD term."""
    q = tl.load(label_logit + i, inside, 0.0)
    if VALUES:
        q = tl.load(values + i, inside, 0.0).to(tl.float32)
        q += _logprob(i, inside, labels, row_max, logsum, label_logit)
    if VALUES or NEXT_VALUES:
        ahead = given_ahead(i, inside, kind, values, next_values, n, NEXT_VALUES)
    else:
        there = inside & (i + 1 < n)
        ahead = tl.load(row_max + i + 1, there, 0.0) + tl.load(logsum + i + 1, there, 0.0)
        ahead = tl.where(kind == BOOTSTRAP, ahead, 0.0)
    return tl.where(has_td(kind), q - discount * ahead, 0.0)


@triton.jit
def _label_gradient(a, b, c, logprob, ENTROPY: tl.constexpr):
    """p (A + B log p) + C, with expm1 so that the A - A of a confident row cancels exactly.

    An infinite A, which a label of logit -inf in the row before sends here, stays what it is.
    """
    live = a != 0.0
    if ENTROPY:
        live = live | (b != 0.0)
    x = tl.where(live, logprob, 0.0)
    endless = tl.abs(a) == INF
    finite = tl.where(endless, 0.0, a)
    element = finite * _expm1(x) + (finite + c)
    if ENTROPY:
        element += b * exp(x) * tl.where(x > -INF, x, 0.0)
    return tl.where(live, tl.where(endless, a, element), c)


@triton.jit
def _expm1(x):
    """For x up to 0, or a little above by rounding: the first eight terms of its series near 0."""
    series = 1 + x / 8
    for k in tl.static_range(6):
        series = 1 + series * x / (7 - k)
    return tl.where(x > -0.5, series * x, exp(x) - 1)
