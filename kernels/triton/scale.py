"""scale_: the gradient times the 0-d gradient from above.

Traffic: none where the factor is 1, which every program finds out on the device, without the host
waiting; else one read and one write. The number of programs does not grow with the rows, so that
nothing is all they cost.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of, groups_of, row_of


@triton.jit(do_not_specialize=["rows", "n_cols", "inner", "d_outer", "d_inner"])
def scale(
    factor, rows, n_cols, inner, d_outer, d_inner,
    dlogits,
    BLOCK: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Every program takes its share of the rows, block of columns by block."""
    times = tl.load(factor)
    if times != 1.0:
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            place = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
            skip, count = groups_of(place, n_cols, EDGES)
            middle = tl.multiple_of(place + skip, 16)
            for start in tl.range(0, count, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(middle + column, column < count, 0.0, eviction_policy="evict_first")
                x = (x.to(tl.float32) * times).to(dlogits.dtype.element_ty)
                tl.store(middle + column, x, column < count, eviction_policy="evict_first")
            if EDGES:
                edge, at_edge = edge_of(place, n_cols, skip, count)
                x = tl.load(place + edge, at_edge, 0.0).to(tl.float32) * times
                tl.store(place + edge, x.to(dlogits.dtype.element_ty), at_edge)
