"""row_grad: ``p_j (A + B log p_j) + C 1{j = label}`` from the row's statistics.

Traffic: one read and one write of the logits; where A = B = 0 no read (with SOFTCAP
where C = 0 too). One exponential per element, two with SOFTCAP.
In place is safe: every element is loaded and stored by one program, in this order.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of, groups_of, row_of
from irl_ops.kernels.triton.softmax import INF, capped, gradient, origin_of, through_cap


@triton.jit(do_not_specialize=["n_cols", "inner", "q_outer", "q_inner", "d_outer", "d_inner"])
def row_grad(
    logits, labels, row_max, logsum, a, b, c, n_cols, inner, q_outer, q_inner, d_outer, d_inner,
    dlogits,
    BLOCK: tl.constexpr, EDGES: tl.constexpr, MATCHED: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One block of columns of one row per program; the first of a row takes the edges as well."""
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    target = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
    skip, count = groups_of(source, n_cols, EDGES)
    middle, out = tl.multiple_of(source + skip, 16), target + skip
    if MATCHED:
        out = tl.multiple_of(out, 16)
    origin, log_total = origin_of(tl.load(row_max + row)), tl.load(logsum + row)
    a_row, b_row, c_row = tl.load(a + row), tl.load(b + row), tl.load(c + row)
    label = tl.load(labels + row)
    live = (a_row != 0.0) | (b_row != 0.0)
    read = live
    if SOFTCAP != 0.0:  # the slope at the label is that of its logit
        read = read | ((c_row != 0.0) & (label >= 0))
    a_row, b_row, c_row = a_row * SCALE, b_row * SCALE, c_row * SCALE

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    readable = tl.where(read, count, 0)
    x = tl.load(middle + column, column < readable, -INF, eviction_policy="evict_first")
    q = capped(x, SCALE, SOFTCAP)
    g = gradient(0.0, q - origin, 0.0, log_total, a_row, b_row, live, True)
    g += tl.where(column + skip == label, c_row, 0.0)
    g = through_cap(g, q, SOFTCAP).to(dlogits.dtype.element_ty)
    tl.store(out + column, g, column < count, eviction_policy="evict_first")
    if EDGES:
        if tl.program_id(1) == 0:
            edge, at_edge = edge_of(source, n_cols, skip, count)
            edge_to_read = at_edge & (edge < tl.where(read, n_cols, 0))
            q_edge = capped(tl.load(source + edge, edge_to_read, -INF), SCALE, SOFTCAP)
            g_edge = gradient(0.0, q_edge - origin, 0.0, log_total, a_row, b_row, live, True)
            g_edge += tl.where(edge == label, c_row, 0.0)
            g_edge = through_cap(g_edge, q_edge, SOFTCAP)
            tl.store(target + edge, g_edge.to(dlogits.dtype.element_ty), at_edge)
