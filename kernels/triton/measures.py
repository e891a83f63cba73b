"""row_measures and its gradient: what else a read of a row can tell.

Statistics are those of z: q times the row's scale where the column is kept, -inf elsewhere. What is
not asked for is not compiled. Traffic: one read of the logits and of the mask; the gradient writes
once as well. Exponentials as in ``row_stats`` and ``row_grad``.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import edge_of, groups_of, row_of
from irl_ops.kernels.triton.softmax import (
    INF,
    capped,
    entropy_of,
    exp,
    origin_of,
    through_cap,
    weighted,
)

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def seen(
    q, mask_row, column, there, above, scale,
    MASK: tl.constexpr, ABOVE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """z of q in these columns, those that are ``there``."""
    z = q
    if SCALED:
        z = q * scale
    if ABOVE:
        z = tl.where(q < above, -INF, z)
    if MASK:
        z = tl.where(tl.load(mask_row + column, there, 0) != 0, z, -INF)
    return z


@triton.jit
def _gathered(
    z, start, top, total, centred_sum, squares, place, z_sum, count,
    L: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, TOP: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with a tile [R, L], whose first column is ``start``."""
    tile_top = tl.max(z, 0)
    if TOP:  # the first of the largest: an earlier tile keeps its place
        row = tl.argmax(z, 0)
        place = tl.where(tile_top > top, start + row * L + tl.arange(0, L), place)
    new_top = tl.maximum(top, tile_top)
    origin = origin_of(new_top)
    shift = top - origin
    moved = exp(shift)
    centred = z - origin[None, :]
    e = exp(centred)
    if ENTROPY:
        centred_sum = moved * centred_sum + weighted(moved * total, shift)
        centred_sum += tl.sum(weighted(e, centred), 0)
    if SQUARES:
        squares = moved * moved * squares + tl.sum(e * e, 0)
    if MEAN:
        present = z != -INF
        z_sum += tl.sum(tl.where(present, z, 0.0), 0)
        count += tl.sum(tl.where(present, 1.0, 0.0), 0)
    total = moved * total + tl.sum(e, 0)
    return new_top, total, centred_sum, squares, place, z_sum, count


@triton.jit(
    do_not_specialize=["n_cols", "inner", "q_outer", "q_inner", "m_outer", "m_inner", "ids_per_row"]
)
def row_measures(
    logits, ids, row_scale, keep_mask, keep_above,
    n_cols, inner, q_outer, q_inner, m_outer, m_inner, ids_per_row,
    row_max, logsum, picked, entropy, log_sum_sq, top1, mean_logit, kept,
    R: tl.constexpr, L: tl.constexpr, EDGES: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, TOP: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, ABOVE: tl.constexpr, SCALED: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One row per program, tile by tile; see ``scan.py``."""
    TILE: tl.constexpr = R * L
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    skip, whole_groups = groups_of(source, n_cols, EDGES)
    middle = tl.multiple_of(source + skip, 16)
    scale, above, mask_row = 1.0, 0.0, keep_mask
    if SCALED:
        scale = tl.load(row_scale + row)
    if ABOVE:
        above = tl.load(keep_above + row)
    if MASK:
        outer = row // inner
        mask_row = keep_mask + outer.to(tl.int64) * m_outer
        mask_row += (row - outer * inner).to(tl.int64) * m_inner

    column = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    top = tl.full((L,), -INF, tl.float32)
    place = tl.full((L,), NOWHERE, tl.int32)
    total = tl.zeros((L,), tl.float32)
    centred_sum = tl.zeros((L,), tl.float32)
    squares = tl.zeros((L,), tl.float32)
    z_sum = tl.zeros((L,), tl.float32)
    count = tl.zeros((L,), tl.float32)
    for start in tl.range(0, whole_groups, TILE):
        inside = start + column < whole_groups
        x = tl.load(middle + start + column, inside, -INF, eviction_policy="evict_first")
        q = capped(x, SCALE, SOFTCAP)
        place_of = skip + start + column
        z = seen(q, mask_row, place_of, inside, above, scale, MASK, ABOVE, SCALED)
        top, total, centred_sum, squares, place, z_sum, count = _gathered(
            z, skip + start, top, total, centred_sum, squares, place, z_sum, count,
            L, ENTROPY, SQUARES, TOP, MEAN,
        )  # fmt: skip

    highest = tl.max(top, 0)
    if EDGES:
        edge, at_edge = edge_of(source, n_cols, skip, whole_groups)
        x_edge = tl.load(source + edge, at_edge, -INF)
        q_edge = capped(x_edge, SCALE, SOFTCAP)
        z_edge = seen(q_edge, mask_row, edge, at_edge, above, scale, MASK, ABOVE, SCALED)
        z_edge = tl.where(at_edge, z_edge, -INF)
        highest = tl.maximum(highest, tl.max(z_edge, 0))
    origin = origin_of(highest)
    shift = top - origin
    moved = exp(shift)
    all_total = tl.sum(moved * total, 0)
    if EDGES:
        centred_edge = z_edge - origin
        e_edge = exp(centred_edge)
        all_total += tl.sum(e_edge, 0)
    log_total = tl.log(all_total)
    tl.store(row_max + row, highest)
    tl.store(logsum + row, log_total)
    if ENTROPY:
        weighted_sum = tl.sum(moved * centred_sum + weighted(moved * total, shift), 0)
        if EDGES:
            weighted_sum += tl.sum(weighted(e_edge, centred_edge), 0)
        h = entropy_of(all_total, weighted_sum, log_total)
        most = tl.log(n_cols.to(tl.float32))  # h may be rounded out of its range; NaN stays
        h = tl.where(h < 0.0, 0.0, tl.where(h > most, most, h))
        tl.store(entropy + row, h)
    if SQUARES:
        all_squares = tl.sum(moved * moved * squares, 0)
        if EDGES:
            all_squares += tl.sum(e_edge * e_edge, 0)
        log_squares = tl.log(all_squares) - 2.0 * log_total
        log_squares = tl.where(log_squares > 0.0, 0.0, log_squares)
        tl.store(log_sum_sq + row, tl.where(all_total == 0.0, -INF, log_squares))
    if TOP:
        first = tl.min(tl.where(top == highest, place, NOWHERE), 0)
        if EDGES:
            first = tl.minimum(first, tl.min(tl.where(z_edge == highest, edge, NOWHERE), 0))
        first = tl.where((first >= n_cols) | (highest == -INF), 0, first)
        tl.store(top1 + row, first)
    if MEAN:
        all_sum, all_count = tl.sum(z_sum, 0), tl.sum(count, 0)
        if EDGES:
            present = z_edge != -INF
            all_sum += tl.sum(tl.where(present, z_edge, 0.0), 0)
            all_count += tl.sum(tl.where(present, 1.0, 0.0), 0)
        tl.store(kept + row, all_count)
        tl.store(mean_logit + row, tl.where(all_count == 0.0, -INF, all_sum / all_count))

    for k in tl.range(0, ids_per_row):
        at = row.to(tl.int64) * ids_per_row + k
        label = tl.load(ids + at)
        good = (label >= 0) & (label < n_cols)
        q_at = capped(tl.load(source + label, good, 0.0), SCALE, SOFTCAP)
        z_at = seen(q_at, mask_row, label, good, above, scale, MASK, ABOVE, SCALED)
        z_at = tl.where(label >= n_cols, float("nan"), tl.where(label < 0, 0.0, z_at))
        tl.store(picked + at, z_at)


@triton.jit
def _by_z(
    z, origin, log_total, a, b, d, e, live,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradient by z, without what the ids add."""
    log_p = (z - origin) - log_total
    p = exp(log_p)
    inner = a
    if B:
        inner += b * log_p
    if D:
        inner += d * p
    g = p * inner
    if E:
        g += e
    return tl.where(live, g, 0.0)


@triton.jit
def _by_x(
    g, z, q, scale, SCALED: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """The gradient by x of one by z; 0 where z = -inf."""
    if SCALED:
        g = tl.where(g == 0.0, 0.0, g * scale)
    return through_cap(tl.where(z == -INF, 0.0, g * SCALE), q, SOFTCAP)


@triton.jit(
    do_not_specialize=[
        "n_cols", "inner", "q_outer", "q_inner", "m_outer", "m_inner", "d_outer", "d_inner",
        "ids_per_row",
    ]
)  # fmt: skip
def row_measures_grad(
    logits, ids, row_max, logsum, a, b, c, d, e, row_scale, keep_mask, keep_above,
    n_cols, inner, q_outer, q_inner, m_outer, m_inner, d_outer, d_inner, ids_per_row,
    dlogits,
    BLOCK: tl.constexpr, EDGES: tl.constexpr, MATCHED: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, ABOVE: tl.constexpr, SCALED: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One block of columns of one row per program; the first of a row takes the edges as well."""
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    target = row_of(dlogits, row, inner, d_outer, d_inner, EDGES)
    skip, whole_groups = groups_of(source, n_cols, EDGES)
    middle, out = tl.multiple_of(source + skip, 16), target + skip
    if MATCHED:
        out = tl.multiple_of(out, 16)
    origin, log_total = origin_of(tl.load(row_max + row)), tl.load(logsum + row)
    a_row, b_row, d_row, e_row = tl.load(a + row), 0.0, 0.0, 0.0
    live = a_row != 0.0
    if B:
        b_row = tl.load(b + row)
        live = live | (b_row != 0.0)
    if D:
        d_row = tl.load(d + row)
        live = live | (d_row != 0.0)
    if E:
        e_row = tl.load(e + row)
        live = live | (e_row != 0.0)
    scale, above, mask_row = 1.0, 0.0, keep_mask
    if SCALED:
        scale = tl.load(row_scale + row)
    if ABOVE:
        above = tl.load(keep_above + row)
    if MASK:
        outer = row // inner
        mask_row = keep_mask + outer.to(tl.int64) * m_outer
        mask_row += (row - outer * inner).to(tl.int64) * m_inner

    begin = tl.program_id(1) * BLOCK
    lane = tl.arange(0, BLOCK)
    column = begin + lane
    inside = column < whole_groups
    x = tl.load(middle + column, inside, -INF, eviction_policy="evict_first")
    q = capped(x, SCALE, SOFTCAP)
    z = seen(q, mask_row, skip + column, inside, above, scale, MASK, ABOVE, SCALED)
    g = _by_z(z, origin, log_total, a_row, b_row, d_row, e_row, live, B, D, E)
    for k in tl.range(0, ids_per_row):
        at = row.to(tl.int64) * ids_per_row + k
        place = tl.load(ids + at) - skip - begin
        if (place >= 0) & (place < BLOCK):  # few are; and 32 bits hold those that are
            g += tl.where(lane == place.to(tl.int32), tl.load(c + at), 0.0)
    g = _by_x(g, z, q, scale, SCALED, SCALE, SOFTCAP)
    tl.store(out + column, g.to(dlogits.dtype.element_ty), inside, eviction_policy="evict_first")
    if EDGES:
        if tl.program_id(1) == 0:
            edge, at_edge = edge_of(source, n_cols, skip, whole_groups)
            x_edge = tl.load(source + edge, at_edge, -INF)
            q_edge = capped(x_edge, SCALE, SOFTCAP)
            z_edge = seen(q_edge, mask_row, edge, at_edge, above, scale, MASK, ABOVE, SCALED)
            g_edge = _by_z(z_edge, origin, log_total, a_row, b_row, d_row, e_row, live, B, D, E)
            for i in tl.range(0, ids_per_row):
                at_edge_id = row.to(tl.int64) * ids_per_row + i
                hit = edge == tl.load(ids + at_edge_id)
                g_edge += tl.where(hit, tl.load(c + at_edge_id), 0.0)
            g_edge = _by_x(g_edge, z_edge, q_edge, scale, SCALED, SCALE, SOFTCAP)
            tl.store(target + edge, g_edge.to(dlogits.dtype.element_ty), at_edge)
