"""row_stats_grad: statistics and gradient while the whole row lies in VMEM.

Traffic: one read and one write of the logits. Exponentials: 2 + 1/16 an element (on v4 2 + 1/8).
Where the generation's VMEM cannot hold whole rows, row_stats and row_grad serve: two reads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from irl_ops.kernels.pallas import softmax
from irl_ops.kernels.pallas.generations import Generation, resident_rows
from irl_ops.kernels.pallas.row_grad import row_grad
from irl_ops.kernels.pallas.row_stats import row_stats
from irl_ops.kernels.pallas.softcap import Softcap
from irl_ops.kernels.pallas.softmax import Normaliser
from irl_ops.kernels.pallas.tiles import (
    LANES,
    Blocks,
    array_like,
    chunk_of,
    columns_beside,
    planes,
    tiles_of,
)


def row_stats_grad(
    logits: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    entropy_weight: jax.Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    of: Generation,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """``(row_max, logsum, entropy, dlogits)``; see ``irl_ops.kernels.reference``.

    The gradient takes the logits' storage: XLA copies them first where they are read later on.
    Rows with alpha = -inf are answered with 0, but read.
    """
    weights = [alpha, beta] if entropy_weight is None else [alpha, beta, entropy_weight]
    read = [jnp.where(alpha == -jnp.inf, 0.0, w) for w in weights]
    rows = resident_rows(logits.dtype, logits.shape[-1], of)
    cap = Softcap(logit_scale, softcap)
    whole = functools.partial(_resident, rows) if rows else _in_two
    stats, dlogits = whole(logits, read, cap, of, interpret)
    row_max, logsum, h, _ = stats
    unread = alpha == -jnp.inf
    row_max, logsum = jnp.where(unread, 0.0, row_max), jnp.where(unread, 0.0, logsum)
    return row_max, logsum, None if h is None else jnp.where(unread, 0.0, h), dlogits


def _resident(
    rows: int,
    logits: jax.Array,
    weights: list[jax.Array],
    cap: Softcap,
    of: Generation,
    interpret: Any,
) -> tuple[Normaliser, jax.Array]:
    x = planes(logits, 2)
    given = columns_beside(*(planes(w, 1) for w in weights))
    blocks, count = Blocks.of(x, rows, x.shape[-1] + LANES, of), len(weights)
    stats, dlogits = pl.pallas_call(
        functools.partial(_kernel, blocks, cap),
        grid=blocks.grid,
        in_specs=[blocks.vectors(count), blocks.logits],
        out_specs=[blocks.vectors(count), blocks.logits],
        out_shape=[
            array_like(x, (*x.shape[:2], count), jnp.float32),
            array_like(x, x.shape, x.dtype),
        ],
        input_output_aliases={1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=of.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=11 * x.size,
            transcendentals=2 * x.size,
            bytes_accessed=2 * x.size * x.dtype.itemsize + 2 * weights[0].size * LANES * 4,
        ),
        interpret=interpret,
        name="irl_row_stats_grad",
    )(given, x)
    row_max, logsum, *h = (stats[..., k].reshape(weights[0].shape) for k in range(count))
    return Normaliser(row_max, logsum, h[0] if h else None), dlogits.reshape(logits.shape)


def _kernel(blocks: Blocks, cap: Softcap, given: Any, x: Any, stats: Any, out: Any) -> None:
    """A block of whole rows, group by group: down the row for the sums, down again to write."""
    entropy = given.shape[-1] == 3

    def group(rows: Any) -> None:
        def fold(start: Any, width: int, run: softmax.Running) -> softmax.Running:
            tiles = tiles_of(chunk_of(x, rows, start, width), width, cap, beyond=-softmax.INF)
            return softmax.fold(run, tiles)

        run = softmax.empty((blocks.group, LANES), entropy)
        of = softmax.finish(blocks.each_chunk(blocks.vocab, fold, run))
        for k, value in enumerate(v for v in of if v is not None):
            stats[rows, k : k + 1] = value
        alpha, beta, *weight = (given[rows, k : k + 1] for k in range(given.shape[-1]))
        b = weight[0] if weight else None
        a = softmax.coefficient(alpha, beta, b, of)
        row = softmax.Rows.of(of.row_max, of.logsum, a, b).over(LANES)

        def write(start: Any, width: int, _: None) -> None:
            target = chunk_of(out, rows, start, width)
            for k, tile in enumerate(tiles_of(chunk_of(x, rows, start, width), width, cap)):
                g = cap.behind(softmax.gradient(tile, row), tile)
                target[:, k * LANES : (k + 1) * LANES] = g.astype(out.dtype)

        blocks.each_chunk(blocks.vocab, write, None)

    blocks.each_group(group)


def _in_two(
    logits: jax.Array, weights: list[jax.Array], cap: Softcap, of: Generation, interpret: Any
) -> tuple[Normaliser, jax.Array]:
    alpha, beta, *weight = weights
    none = jnp.full(alpha.shape, -1, jnp.int32)
    options: dict[str, Any] = dict(cap._asdict(), of=of, interpret=interpret)
    row_max, logsum, _, h = row_stats(logits, none, bool(weight), **options)
    stats = Normaliser(row_max, logsum, h)
    b = weight[0] if weight else None
    a = softmax.coefficient(alpha, beta, b, stats)
    zero = jnp.zeros_like(a)
    dlogits = row_grad(logits, none, row_max, logsum, a, b, zero, **options)
    return stats, dlogits
