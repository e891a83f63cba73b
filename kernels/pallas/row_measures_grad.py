"""row_measures_grad: ``p (A + B log p + D p) + E + sum_k C_k 1{j = id_k}`` times dz/dx.

Traffic: one read and one write of the logits. One exponential an element; each id costs a
comparison, an addition and a selection.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from irl_ops.kernels.pallas import softmax
from irl_ops.kernels.pallas.generations import Generation
from irl_ops.kernels.pallas.row_measures import (
    UNROLLED,
    beside,
    masked,
    rows_for,
    spread,
    view_of,
    widths,
)
from irl_ops.kernels.pallas.softcap import Softcap
from irl_ops.kernels.pallas.tiles import (
    LANES,
    Blocks,
    array_like,
    chunk_of,
    columns_beside,
    planes,
    tiles_of,
)
from irl_ops.kernels.reference.measures import Slopes


def row_measures_grad(
    logits: jax.Array,
    ids: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    slopes: Slopes,
    *,
    row_scale: jax.Array | None = None,
    keep_mask: jax.Array | None = None,
    keep_above: jax.Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    of: Generation,
    interpret: Any = False,
) -> jax.Array:
    """The gradient in the logits' dtype; see ``irl_ops.kernels.reference.measures``.

    It takes the logits' storage: XLA copies them first where they are read later on.
    """
    x, y = planes(masked(logits, keep_mask), 2), planes(ids.astype(jnp.int32), 2)
    count, vectors = ids.shape[-1], beside(logits, row_scale, keep_above)
    optional = {"b": slopes.b, "d": slopes.d, "e": slopes.e}
    there = {name: v for name, v in optional.items() if v is not None}
    given = columns_beside(*(planes(v, 1) for v in (row_max, logsum, slopes.a, *there.values())))
    blocks = Blocks.of(x, rows_for(count, of), of.columns, of)
    at_ids = planes(slopes.c.astype(jnp.float32), 2)
    arrays = [y, at_ids, given, *vectors, x]
    out = pl.pallas_call(
        functools.partial(
            _kernel, blocks, tuple(there), Softcap(logit_scale, softcap), row_scale is not None
        ),
        grid=blocks.grid,
        in_specs=[*map(blocks.vectors, widths(arrays[:-1])), blocks.logits],
        out_specs=blocks.logits,
        out_shape=array_like(x, x.shape, x.dtype),
        input_output_aliases={len(arrays) - 1: 0},
        scratch_shapes=[
            pltpu.VMEM((count, blocks.group, LANES), jnp.int32),
            pltpu.VMEM((count, blocks.group, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=of.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=(8 + 3 * count) * x.size,
            transcendentals=x.size,
            bytes_accessed=2 * x.size * x.dtype.itemsize + 4 * x.shape[0] * x.shape[1] * LANES * 4,
        ),
        interpret=interpret,
        name="irl_row_measures_grad",
    )(*arrays)
    dlogits: jax.Array = out.reshape(logits.shape)
    return dlogits


def _kernel(
    blocks: Blocks,
    optional: tuple[str, ...],
    cap: Softcap,
    scaled: bool,
    ids: Any,
    at_ids: Any,
    given: Any,
    *refs: Any,
) -> None:
    """One block; what lies behind the last column and the last row is computed and not stored."""
    *beside_rows, x, out, places, elements = refs
    first = pl.program_id(2) * blocks.block[1]
    count = places.shape[0]

    def group(rows: Any) -> None:
        columns = [given[rows, k : k + 1] for k in range(given.shape[-1])]
        row_max, logsum, a = columns[:3]
        more = {name: wide(v) for name, v in zip(optional, columns[3:], strict=True)}
        b = columns[3 + optional.index("b")] if "b" in optional else None
        row = softmax.Rows.of(row_max, logsum, a, b)
        if "d" in optional:
            row = row._replace(live=row.live | (columns[3 + optional.index("d")] != 0.0))
        row, view = row.over(LANES), view_of(beside_rows, scaled, rows)
        spread(ids, rows, places, first)
        for k in range(count):
            elements[k] = wide(at_ids[rows, k : k + 1])

        def step(start: Any, width: int, _: None) -> None:
            target = chunk_of(out, rows, start, width)
            tiles = tiles_of(chunk_of(x, rows, start, width), width, cap)
            for t, (q, at) in enumerate(zip(tiles, at_the_ids(start, len(tiles)), strict=True)):
                z = view.of(q)
                logp = (z - row.origin) - row.logsum
                p = jnp.exp(logp)
                inner = row.a
                if row.b is not None:
                    inner = inner + row.b * jnp.maximum(logp, softmax.FLOOR)
                if "d" in more:
                    inner = inner + more["d"] * p
                g = jnp.where(row.live, p * inner, 0.0) + at
                if "e" in more:
                    g = g + more["e"]
                g = jnp.where(z == -softmax.INF, 0.0, g)
                if view.scale is not None:
                    g = jnp.where(g == 0.0, 0.0, g * view.scale)
                target[:, t * LANES : (t + 1) * LANES] = cap.behind(g, q).astype(out.dtype)

        blocks.each_chunk(blocks.block[1], step, None)

    def at_the_ids(start: Any, tiles: int) -> list[jax.Array]:
        """The sums of C at the ids, in each tile of a chunk; an id that is there twice adds up."""

        def add(k: Any, sums: list[jax.Array]) -> list[jax.Array]:
            place, c = places[k] - start, elements[k]
            return [jnp.where(place == t * LANES, s + c, s) for t, s in enumerate(sums)]

        sums = [jnp.zeros(places.shape[1:], jnp.float32)] * tiles
        if count > UNROLLED:
            looped: list[jax.Array] = lax.fori_loop(0, count, add, sums)
            return looped
        return functools.reduce(lambda sums, k: add(k, sums), range(count), sums)

    blocks.each_group(group)


def wide(v: jax.Array) -> jax.Array:
    """Spread once, and not for every tile."""
    return jnp.broadcast_to(v, (v.shape[0], LANES))
