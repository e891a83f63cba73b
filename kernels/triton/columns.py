"""Where a row lies in memory, and which of its columns make whole 16-byte groups.

A row is ``skip`` single elements up to a 16-byte boundary, ``count`` elements in whole groups, and
a few that are left. Masks are drawn between groups, so that every access to the middle is 128 bits
wide, whatever V and the strides are; the ends, under 8 elements each, are accessed one by one.
Without EDGES there are no ends: V and all strides are multiples of a group. With them the order in
which a row is summed depends on where it starts, and so may its last bit.
"""

import triton
import triton.language as tl

GROUP_BYTES = tl.constexpr(16)


@triton.jit
def row_of(base, row, inner, outer_stride, inner_stride, EDGES: tl.constexpr):
    """The address of a row: rows are [outer, inner], both strides arbitrary, offsets 64 bits."""
    GROUP: tl.constexpr = GROUP_BYTES // (base.dtype.element_ty.primitive_bitwidth // 8)
    outer = row // inner
    offset = outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride
    if not EDGES:
        offset = offset // GROUP * GROUP  # the same number, which the compiler sees is a multiple
    return base + offset


@triton.jit
def groups_of(row, n_cols, EDGES: tl.constexpr):
    """``(skip, count)`` of a row."""
    ITEM: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    GROUP: tl.constexpr = GROUP_BYTES // ITEM
    skip = 0
    if EDGES:
        past = (row.to(tl.int64) & (GROUP_BYTES - 1)).to(tl.int32) // ITEM
        skip = tl.minimum(-past & (GROUP - 1), n_cols)
    return skip, (n_cols - skip) // GROUP * GROUP


@triton.jit
def edge_of(row, n_cols, skip, count, LANES: tl.constexpr = 0):
    """``(columns, mask)`` of the elements outside the groups: those before, then those behind."""
    GROUP: tl.constexpr = GROUP_BYTES // (row.dtype.element_ty.primitive_bitwidth // 8)
    lane = tl.arange(0, LANES if LANES else 2 * GROUP)
    before = lane < GROUP
    column = tl.where(before, lane, skip + count + lane - GROUP)
    return column, column < tl.where(before, skip, n_cols)
