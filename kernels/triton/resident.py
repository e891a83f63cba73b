"""row_stats_grad with the whole row on chip.

Traffic: one read and one write of the logits; rows that nobody needs are not read.
One exponential per element, two with ENTROPY, and one more with SOFTCAP.
The row lies in the registers of one block of threads, or of a cluster of blocks (``num_ctas``)
whose reductions go through distributed shared memory. In place is safe: every store waits for a sum
over the whole row, and so for every load.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import GROUP_BYTES, edge_of, groups_of, row_of
from irl_ops.kernels.triton.softmax import (
    INF,
    capped,
    coefficient,
    coefficients_of,
    entropy_of,
    exp,
    gradient,
    origin_of,
    through_cap,
    weighted,
)


@triton.jit(do_not_specialize=["n_cols", "inner", "q_outer", "q_inner", "d_outer", "d_inner"])
def row_stats_grad(
    logits, alpha, beta, entropy_weight, n_cols, inner, q_outer, q_inner, d_outer, d_inner,
    row_max, logsum, entropy, dlogits,
    LANES: tl.constexpr, PARTS: tl.constexpr,  # the row in parts of so many columns
    ENTROPY: tl.constexpr, EDGES: tl.constexpr, MATCHED: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One row per program.

    Everything that is read is asked for before anything is waited for. The parts and the edges are
    combined lane by lane before threads meet, once for the maximum and once for the sums: in a
    cluster each meeting costs several barriers.
    """
    GROUP: tl.constexpr = GROUP_BYTES // (logits.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    target = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
    skip, count = groups_of(source, n_cols, EDGES)
    alpha_row, beta_row, needed = coefficients_of(alpha, beta, row)
    b, h = 0.0, 0.0
    if ENTROPY:
        b = tl.where(needed, tl.load(entropy_weight + row), 0.0)
    readable = tl.where(needed, count, 0)
    middle, out = tl.multiple_of(source + skip, 16), target + skip
    if MATCHED:
        out = tl.multiple_of(out, 16)

    lane = tl.arange(0, LANES)
    x = ()
    for k in tl.static_range(PARTS):
        column = k * LANES + lane
        read = tl.load(middle + column, column < readable, -INF, eviction_policy="evict_first")
        x += (read,)
    if EDGES:  # one element per group of lanes, and so per thread
        edge, at_edge = edge_of(source, n_cols, skip, count, LANES // GROUP)
        edge_to_read = at_edge & (edge < tl.where(needed, n_cols, 0))
        x_edge = tl.load(source + edge, edge_to_read, -INF)

    q = (capped(x[0], SCALE, SOFTCAP),)
    tops = q[0]
    for k in tl.static_range(1, PARTS):
        q += (capped(x[k], SCALE, SOFTCAP),)
        tops = tl.maximum(tops, q[k])
    if EDGES:
        q_edge = capped(x_edge, SCALE, SOFTCAP)
        tops = tl.max(tl.reshape(tops, (LANES // GROUP, GROUP)), 1)
        tops = tl.maximum(tops, q_edge)
    top = tl.max(tops, 0)

    origin = origin_of(top)
    c = (q[0] - origin,)
    e = (exp(c[0]),)
    totals = e[0]
    if ENTROPY:
        centred_sums = weighted(e[0], c[0])
    for k in tl.static_range(1, PARTS):
        c += (q[k] - origin,)
        e += (exp(c[k]),)
        totals += e[k]
        if ENTROPY:
            centred_sums += weighted(e[k], c[k])
    if EDGES:
        c_edge = q_edge - origin
        e_edge = exp(c_edge)
        totals = tl.sum(tl.reshape(totals, (LANES // GROUP, GROUP)), 1) + e_edge
        if ENTROPY:
            centred_sums = tl.sum(tl.reshape(centred_sums, (LANES // GROUP, GROUP)), 1)
            centred_sums += weighted(e_edge, c_edge)
    if ENTROPY:
        total, centred_sum = tl.split(tl.sum(tl.join(totals, centred_sums), 0))
    else:
        total = tl.sum(totals, 0)
    log_total = tl.log(total)
    tl.store(row_max + row, tl.where(needed, top, 0.0))
    tl.store(logsum + row, tl.where(needed, log_total, 0.0))
    if ENTROPY:
        h = entropy_of(total, centred_sum, log_total)
        tl.store(entropy + row, h)

    a = coefficient(alpha_row, beta_row, b, top + log_total, h)
    live = (a != 0.0) | (b != 0.0)
    a, b = a * SCALE, b * SCALE
    dtype = dlogits.dtype.element_ty
    for k in tl.static_range(PARTS):
        column = k * LANES + lane
        g = gradient(e[k], c[k], total, log_total, a, b, live, ENTROPY)
        g = through_cap(g, q[k], SOFTCAP).to(dtype)
        tl.store(out + column, g, column < count, eviction_policy="evict_first")
    if EDGES:
        g_edge = gradient(e_edge, c_edge, total, log_total, a, b, live, ENTROPY)
        g_edge = through_cap(g_edge, q_edge, SOFTCAP).to(dtype)
        tl.store(target + edge, g_edge, at_edge)
