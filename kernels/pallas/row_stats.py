"""row_stats: maximum, log-sum, label logit and, if asked, entropy of every row.

Traffic: one read of the logits. Exponentials: 1 + 1/16 an element (on v4 1 + 1/8).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from irl_ops.kernels.pallas import softmax
from irl_ops.kernels.pallas.generations import Generation
from irl_ops.kernels.pallas.softcap import Softcap
from irl_ops.kernels.pallas.tiles import (
    LANES,
    Blocks,
    array_like,
    chunk_of,
    lanes_of,
    planes,
    tiles_of,
)


def row_stats(
    logits: jax.Array,
    labels: jax.Array,
    entropy: bool = False,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    of: Generation,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``.

    All of ``q = softcap tanh(logit_scale x / softcap)``; see ``softcap.py``.
    """
    x, y = planes(logits, 2), planes(labels.astype(jnp.int32), 1)[..., None]
    blocks = Blocks.of(x, of.rows, of.columns, of)
    rows, count = blocks.block[0], 4 if entropy else 3
    out = pl.pallas_call(
        functools.partial(_kernel, blocks, entropy, Softcap(logit_scale, softcap)),
        grid=blocks.grid,
        in_specs=[blocks.vectors(1), blocks.logits],
        out_specs=blocks.vectors(count),
        out_shape=array_like(x, (*x.shape[:2], count), jnp.float32),
        scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.float32)] * count,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=of.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.size,
            transcendentals=x.size,
            bytes_accessed=x.size * x.dtype.itemsize + 2 * y.size * LANES * 4,
        ),
        interpret=interpret,
        name="irl_row_stats",
    )(y, x)
    row_max, logsum, picked, *h = (out[..., k].reshape(labels.shape) for k in range(count))
    picked = jnp.where(labels >= logits.shape[-1], jnp.nan, picked)
    return row_max, logsum, picked, h[0] if entropy else None


def _kernel(
    blocks: Blocks, entropy: bool, cap: Softcap, labels: Any, x: Any, out: Any, *kept: Any
) -> None:
    """One block of columns; what the lanes have seen so far lies in ``kept``."""
    j, last = pl.program_id(2), blocks.grid[2] - 1
    first = j * blocks.block[1]

    @pl.when(j == 0)
    def _() -> None:
        start = softmax.empty((blocks.block[0], LANES), entropy)
        for ref, value in zip(kept, [jnp.zeros_like(start.total), *start], strict=False):
            ref[...] = value

    def fold(columns: int) -> None:
        blocks.each_group(functools.partial(_fold, blocks, cap, columns, first, labels, x, kept))

    if blocks.columns_of_last == blocks.block[1]:
        fold(blocks.block[1])
    else:
        pl.when(j < last)(functools.partial(fold, blocks.block[1]))
        pl.when(j == last)(functools.partial(fold, blocks.columns_of_last))

    @pl.when(j == last)
    def _() -> None:
        blocks.each_group(functools.partial(_finish, out, kept))


def _fold(
    blocks: Blocks,
    cap: Softcap,
    columns: int,
    first: Any,
    labels: Any,
    x: Any,
    kept: Any,
    rows: Any,
) -> None:
    run = [ref[rows, :] for ref in kept]
    place = labels[rows, :] - first - lanes_of(run[0])

    def step(start: Any, width: int, run: list[jax.Array]) -> list[jax.Array]:
        tiles = tiles_of(chunk_of(x, rows, start, width), width, cap, beyond=-softmax.INF)
        picked, top, total, *centred = run
        for k, tile in enumerate(tiles):
            picked = jnp.where(place == start + k * LANES, tile, picked)
        seen = softmax.Running(top, total, centred[0] if centred else None)
        return [picked, *(v for v in softmax.fold(seen, tiles) if v is not None)]

    for ref, value in zip(kept, blocks.each_chunk(columns, step, run), strict=True):
        ref[rows, :] = value


def _finish(out: Any, kept: Any, rows: Any) -> None:
    picked, top, total, *centred = (ref[rows, :] for ref in kept)
    of = softmax.finish(softmax.Running(top, total, centred[0] if centred else None))
    out[rows, 0:1] = of.row_max
    out[rows, 1:2] = of.logsum
    out[rows, 2:3] = jnp.sum(picked, axis=1, keepdims=True)
    if of.entropy is not None:
        out[rows, 3:4] = of.entropy
