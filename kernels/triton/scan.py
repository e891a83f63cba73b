"""The normaliser of a row in one read, tile by tile.

A tile is [R, L]. Each of its L lanes keeps a maximum, a sum and, with ENTROPY, a sum of e (q - max)
of its own, so that no thread waits for another before the row ends. A tile costs R exponentials per
lane, and one to move the sums to the new maximum: 1 + 1/R per element; one more with SOFTCAP.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of
from irl_ops.kernels.triton.softmax import INF, capped, exp, origin_of, weighted


@triton.jit
def scan(
    row, n_cols, skip, count,
    R: tl.constexpr, L: tl.constexpr, ENTROPY: tl.constexpr, EDGES: tl.constexpr,
    KEEP: tl.constexpr,  # the eviction policy of what was read
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``(row_max, total, centred_sum)``: sums of e = exp(q - row_max) and of e (q - row_max)."""
    TILE: tl.constexpr = R * L
    middle = tl.multiple_of(row + skip, 16)
    column = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    top = tl.full((L,), -INF, tl.float32)
    total = tl.zeros((L,), tl.float32)
    centred_sum = tl.zeros((L,), tl.float32)
    whole = count // TILE * TILE
    for start in tl.range(0, whole, TILE):
        x = tl.load(middle + start + column, eviction_policy=KEEP)
        q = capped(x, SCALE, SOFTCAP)
        top, total, centred_sum = _with_tile(q, top, total, centred_sum, ENTROPY)
    if whole < count:
        mask = whole + column < count
        x = tl.load(middle + whole + column, mask, -INF, eviction_policy=KEEP)
        q = capped(x, SCALE, SOFTCAP)
        top, total, centred_sum = _with_tile(q, top, total, centred_sum, ENTROPY)

    row_max = tl.max(top, 0)
    if EDGES:
        edge, at_edge = edge_of(row, n_cols, skip, count)
        q_edge = capped(tl.load(row + edge, at_edge, -INF), SCALE, SOFTCAP)
        row_max = tl.maximum(row_max, tl.max(q_edge, 0))
    origin = origin_of(row_max)
    total, centred_sum = _moved(top, total, centred_sum, origin, ENTROPY)
    all_total, all_centred = tl.sum(total, 0), 0.0
    if ENTROPY:
        all_centred = tl.sum(centred_sum, 0)
    if EDGES:
        e = exp(q_edge - origin)
        all_total += tl.sum(e, 0)
        if ENTROPY:
            all_centred += tl.sum(weighted(e, q_edge - origin), 0)
    return row_max, all_total, all_centred


@triton.jit
def _with_tile(q, top, total, centred_sum, ENTROPY: tl.constexpr):
    new_top = tl.maximum(top, tl.max(q, 0))  # along axis 0 lies one thread's own data
    origin = origin_of(new_top)
    total, centred_sum = _moved(top, total, centred_sum, origin, ENTROPY)
    centred = q - origin[None, :]
    e = exp(centred)
    if ENTROPY:
        centred_sum += tl.sum(weighted(e, centred), 0)
    return new_top, total + tl.sum(e, 0), centred_sum


@triton.jit
def _moved(top, total, centred_sum, origin, ENTROPY: tl.constexpr):
    """The sums about ``top`` as sums about ``origin``; empty ones, with top = -inf, stay 0."""
    shift = top - origin
    scale = exp(shift)
    if ENTROPY:
        centred_sum = scale * centred_sum + weighted(scale * total, shift)
    return scale * total, centred_sum
