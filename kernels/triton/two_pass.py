"""row_stats_grad of a row that is larger than a block of threads can hold.

Traffic: one read of the logits from DRAM, a second that is meant to come from the L2 cache, and one
write. The second pass runs backwards, so that it starts with what was read last, marks what it has
seen as first to be evicted, and reads nothing where the gradient is zero. Exponentials: 2 + 1/R per
element, two more with SOFTCAP. In place is safe: a tile is loaded before it is stored, and no other
program looks there.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of, groups_of, row_of
from irl_ops.kernels.triton.scan import scan
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
)


@triton.jit(do_not_specialize=["n_cols", "inner", "q_outer", "q_inner", "d_outer", "d_inner"])
def row_stats_grad(
    logits, alpha, beta, entropy_weight, n_cols, inner, q_outer, q_inner, d_outer, d_inner,
    row_max, logsum, entropy, dlogits,
    R: tl.constexpr, L: tl.constexpr,
    ENTROPY: tl.constexpr, EDGES: tl.constexpr, MATCHED: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One row per program."""
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    target = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
    skip, count = groups_of(source, n_cols, EDGES)
    alpha_row, beta_row, needed = coefficients_of(alpha, beta, row)
    columns, whole_groups = tl.where(needed, n_cols, 0), tl.where(needed, count, 0)
    top, total, centred_sum = scan(
        source, columns, tl.where(needed, skip, 0), whole_groups,
        R, L, ENTROPY, EDGES, "evict_last", SCALE, SOFTCAP,
    )  # fmt: skip
    origin, log_total = origin_of(top), tl.log(total)
    tl.store(row_max + row, tl.where(needed, top, 0.0))
    tl.store(logsum + row, tl.where(needed, log_total, 0.0))
    b, h = 0.0, 0.0
    if ENTROPY:
        h = entropy_of(total, centred_sum, log_total)
        tl.store(entropy + row, h)
        b = tl.where(needed, tl.load(entropy_weight + row), 0.0)
    a = coefficient(alpha_row, beta_row, b, top + log_total, h)
    live = (a != 0.0) | (b != 0.0)
    a, b = a * SCALE, b * SCALE

    TILE: tl.constexpr = R * L
    column = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    dtype = dlogits.dtype.element_ty
    middle, out = tl.multiple_of(source + skip, 16), target + skip
    if MATCHED:
        out = tl.multiple_of(out, 16)
    if EDGES:
        edge, at_edge = edge_of(source, n_cols, skip, count)
        edge_to_read = at_edge & (edge < tl.where(live, n_cols, 0))
        q_edge = capped(tl.load(source + edge, edge_to_read, -INF), SCALE, SOFTCAP)
        c_edge = q_edge - origin
        g_edge = gradient(exp(c_edge), c_edge, total, log_total, a, b, live, ENTROPY)
        g_edge = through_cap(g_edge, q_edge, SOFTCAP)
        tl.store(target + edge, g_edge.to(dtype), at_edge)
    whole, readable = count // TILE * TILE, tl.where(live, count, 0)
    if whole < count:
        place = whole + column
        x = tl.load(middle + place, place < readable, -INF, eviction_policy="evict_first")
        q = capped(x, SCALE, SOFTCAP)
        c = q - origin
        g = gradient(exp(c), c, total, log_total, a, b, live, ENTROPY)
        g = through_cap(g, q, SOFTCAP).to(dtype)
        tl.store(out + place, g, place < count, eviction_policy="evict_first")
    for done in tl.range(0, whole, TILE):
        place = whole - TILE - done + column
        x = tl.load(middle + place, place < readable, -INF, eviction_policy="evict_first")
        q = capped(x, SCALE, SOFTCAP)
        c = q - origin
        g = gradient(exp(c), c, total, log_total, a, b, live, ENTROPY)
        g = through_cap(g, q, SOFTCAP).to(dtype)
        tl.store(out + place, g, eviction_policy="evict_first")
