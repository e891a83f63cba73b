"""Before the pass: ``coefficients``, what the row kernel is told of each row."""

import triton
import triton.language as tl

from irl_ops.algebra.triton.numbers import number
from irl_ops.algebra.triton.rows import BOOTSTRAP, IGNORED
from irl_ops.algebra.triton.weights import totals, weigh
from irl_ops.kernels.triton.softmax import INF


@triton.jit(do_not_specialize=["n", "length", "blocks"])
def coefficients(
    kinds, weights, is_expert, label_logit, values, next_values, partial,
    mle, td, agent_td, gamma, entropy_coef, z_loss, expert_items, agent_items, above,
    n, length, blocks,
    alpha, beta, entropy_weight,
    MLE: tl.constexpr, TD: tl.constexpr, AGENT_TD: tl.constexpr, GAMMA: tl.constexpr,
    ENTROPY: tl.constexpr, Z: tl.constexpr, ITEMS: tl.constexpr, AGENT_ITEMS: tl.constexpr,
    ABOVE: tl.constexpr, EXPERT: tl.constexpr, MEAN: tl.constexpr,
    VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr, DETACH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A = alpha + beta V + B H with B = entropy_weight; alpha = -inf: nobody needs the row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    expert_total, agent_total = totals(
        partial, blocks, expert_items, agent_items, MEAN, ITEMS, AGENT_ITEMS, EXPERT
    )
    discount = number(gamma, 0, True, GAMMA)
    kind = tl.load(kinds + i, inside, 0)
    m, d = weigh(
        i, inside, kind, weights, is_expert, length, mle, td, agent_td, above,
        expert_total, agent_total, MLE, TD, AGENT_TD, ABOVE, EXPERT,
    )  # fmt: skip
    before = inside & (i % length != 0)
    kind_before = tl.load(kinds + i - 1, before, 0)
    onto = before & (kind_before == BOOTSTRAP)  # row i - 1 bootstraps from row i
    a, b = m, tl.zeros_like(m)
    if Z:
        b = 2 * number(z_loss, 0, True, Z) * m
    if TD and VALUES:
        q = tl.load(values + i, inside, 0.0).to(tl.float32)
        q -= discount * given_ahead(i, inside, kind, values, next_values, n, NEXT_VALUES)
        q += tl.load(label_logit + i, inside, 0.0)
        a -= 2 * d * tl.where(d != 0.0, q, 0.0)
        b += 2 * d
    elif TD and not (NEXT_VALUES or DETACH):
        _, d_before = weigh(
            i - 1, before, kind_before, weights, is_expert, length, mle, td, agent_td, above,
            expert_total, agent_total, MLE, TD, AGENT_TD, ABOVE, EXPERT,
        )  # fmt: skip
        d_before = tl.where(onto, d_before, 0.0)
        picked = tl.load(label_logit + i - 1, before, 0.0)
        a -= 2 * discount * d_before * tl.where(d_before != 0.0, picked, 0.0)
        b += 2 * discount * discount * d_before
    tl.store(alpha + i, tl.where((kind != IGNORED) | onto, a, -INF), inside)
    tl.store(beta + i, b, inside)
    if ENTROPY:
        tl.store(entropy_weight + i, number(entropy_coef, 0, True, ENTROPY) * m, inside)


@triton.jit
def given_ahead(i, inside, kind, values, next_values, n, NEXT_VALUES: tl.constexpr):
    """V' where it does not come from the logits: next_values, or the next row's values."""
    if NEXT_VALUES:
        ahead = tl.load(next_values + i, inside, 0.0).to(tl.float32)
    else:
        ahead = tl.load(values + i + 1, inside & (i + 1 < n), 0.0).to(tl.float32)
    return tl.where(kind == BOOTSTRAP, ahead, 0.0)
