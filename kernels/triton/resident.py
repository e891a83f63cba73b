"""row_stats_grad with the whole row on chip.

Traffic: one read and one write of the logits; rows that nobody needs are not read.
One exponential an element, two with ENTROPY.
The row lies in the registers of one block of threads, or of a cluster of blocks (``num_ctas``)
whose reductions go through distributed shared memory. In place is safe: every store waits for a sum
over the whole row, and so for every load.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of, groups_of, row_of
from irl_ops.kernels.triton.softmax import (
    INF,
    coefficient,
    coefficients_of,
    entropy_of,
    exp,
    gradient,
    origin_of,
    weighted,
)


@triton.jit(do_not_specialize=["n_cols", "inner", "q_outer", "q_inner", "d_outer", "d_inner"])
def row_stats_grad(
    logits, alpha, beta, entropy_weight, n_cols, inner, q_outer, q_inner, d_outer, d_inner,
    row_max, logsum, entropy, dlogits,
    FIRST: tl.constexpr, SECOND: tl.constexpr,  # the row in two parts: powers of two, or 0
    ENTROPY: tl.constexpr, EDGES: tl.constexpr, MATCHED: tl.constexpr,
):  # fmt: skip
    """One row a program: its first part (1), its second (2), and the edges (3)."""
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    target = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
    skip, count = groups_of(source, n_cols, EDGES)
    alpha_row, beta_row, needed = coefficients_of(alpha, beta, row)
    readable = tl.where(needed, count, 0)
    middle, out = tl.multiple_of(source + skip, 16), target + skip
    if MATCHED:
        out = tl.multiple_of(out, 16)

    first = tl.arange(0, FIRST)
    x1 = tl.load(middle + first, first < readable, -INF, eviction_policy="evict_first")
    top = tl.max(x1.to(tl.float32), 0)
    if SECOND:
        second = FIRST + tl.arange(0, SECOND)
        x2 = tl.load(middle + second, second < readable, -INF, eviction_policy="evict_first")
        top = tl.maximum(top, tl.max(x2.to(tl.float32), 0))
    if EDGES:
        edge, at_edge = edge_of(source, n_cols, skip, count)
        edge_to_read = at_edge & (edge < tl.where(needed, n_cols, 0))
        x3 = tl.load(source + edge, edge_to_read, -INF)
        top = tl.maximum(top, tl.max(x3.to(tl.float32), 0))

    origin = origin_of(top)
    c1 = x1.to(tl.float32) - origin
    e1 = exp(c1)
    total = tl.sum(e1, 0)
    if SECOND:
        c2 = x2.to(tl.float32) - origin
        e2 = exp(c2)
        total += tl.sum(e2, 0)
    if EDGES:
        c3 = x3.to(tl.float32) - origin
        e3 = exp(c3)
        total += tl.sum(e3, 0)
    log_total = tl.log(total)
    tl.store(row_max + row, tl.where(needed, top, 0.0))
    tl.store(logsum + row, tl.where(needed, log_total, 0.0))

    b, h = 0.0, 0.0
    if ENTROPY:
        centred_sum = tl.sum(weighted(e1, c1), 0)
        if SECOND:
            centred_sum += tl.sum(weighted(e2, c2), 0)
        if EDGES:
            centred_sum += tl.sum(weighted(e3, c3), 0)
        h = entropy_of(total, centred_sum, log_total)
        tl.store(entropy + row, h)
        b = tl.where(needed, tl.load(entropy_weight + row), 0.0)

    a = coefficient(alpha_row, beta_row, b, top + log_total, h)
    live = (a != 0.0) | (b != 0.0)
    dtype = dlogits.dtype.element_ty
    g1 = gradient(e1, c1, total, log_total, a, b, live, ENTROPY).to(dtype)
    tl.store(out + first, g1, first < count, eviction_policy="evict_first")
    if SECOND:
        g2 = gradient(e2, c2, total, log_total, a, b, live, ENTROPY).to(dtype)
        tl.store(out + second, g2, second < count, eviction_policy="evict_first")
    if EDGES:
        g3 = gradient(e3, c3, total, log_total, a, b, live, ENTROPY).to(dtype)
        tl.store(target + edge, g3, at_edge)
