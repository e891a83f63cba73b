"""row_grad: ``p_j (A + B log p_j) + C 1{j = label}`` from the row's statistics.

Traffic: one read and one write of the logits. One exponential an element.
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
    columns_beside,
    lanes_of,
    planes,
    tiles_of,
)


def row_grad(
    logits: jax.Array,
    labels: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    b: jax.Array | None,
    c: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    of: Generation,
    interpret: Any = False,
) -> jax.Array:
    """The gradient in the logits' dtype; see ``irl_ops.kernels.reference``. None for B is 0.

    It takes the logits' storage: XLA copies them first where they are read later on.
    """
    x, y = planes(logits, 2), planes(labels.astype(jnp.int32), 1)[..., None]
    vectors = [v for v in (row_max, logsum, c, a, b) if v is not None]
    given = columns_beside(*(planes(v, 1) for v in vectors))
    blocks = Blocks.of(x, of.rows, of.columns, of)
    out = pl.pallas_call(
        functools.partial(_kernel, blocks, Softcap(logit_scale, softcap)),
        grid=blocks.grid,
        in_specs=[blocks.vectors(1), blocks.vectors(len(vectors)), blocks.logits],
        out_specs=blocks.logits,
        out_shape=array_like(x, x.shape, x.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=of.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * x.size,
            transcendentals=x.size,
            bytes_accessed=2 * x.size * x.dtype.itemsize + 2 * y.size * LANES * 4,
        ),
        interpret=interpret,
        name="irl_row_grad",
    )(y, given, x)
    dlogits: jax.Array = out.reshape(logits.shape)
    return dlogits


def row_grad_in_xla(
    logits: jax.Array,
    labels: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    b: jax.Array | None,
    c: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """The same without a kernel, for XLA to compute inside whatever reads the gradient.

    As little as there can be, from four numbers per row: with a fifth, XLA on v7x stores it as
    well, and with one selection more on v5e too.
    """
    cap = Softcap(logit_scale, softcap)
    q = cap.logits(logits.astype(jnp.float32))
    if b is None:
        live = a != 0.0
        scale = jnp.where(live, a * jnp.exp(-jnp.where(logsum == -softmax.INF, 0.0, logsum)), 0.0)
        e = jnp.exp(q - softmax.origin_of(row_max)[..., None])
        g = jnp.where(e < softmax.INF, e, 0.0) * scale[..., None]  # NaN in rows that are not live
    else:
        row = softmax.Rows.of(*(x[..., None] for x in (row_max, logsum, a, b)))
        g = softmax.gradient(q, row)
    at_label = jnp.arange(logits.shape[-1], dtype=labels.dtype) == labels[..., None]
    return cap.behind(jnp.where(at_label, g + c[..., None], g), q).astype(logits.dtype)


def _kernel(blocks: Blocks, cap: Softcap, labels: Any, given: Any, x: Any, out: Any) -> None:
    """One block; what lies behind the last column and the last row is computed and not stored."""
    first = pl.program_id(2) * blocks.block[1]

    def group(rows: Any) -> None:
        row_max, logsum, c, a, *b = (given[rows, k : k + 1] for k in range(given.shape[-1]))
        row = softmax.Rows.of(row_max, logsum, a, b[0] if b else None).over(LANES)
        place = labels[rows, :] - first - lanes_of(row.a)
        c = jnp.broadcast_to(c, row.a.shape)

        def step(start: Any, width: int, _: None) -> None:
            target = chunk_of(out, rows, start, width)
            for k, tile in enumerate(tiles_of(chunk_of(x, rows, start, width), width, cap)):
                g = softmax.gradient(tile, row)
                g = cap.behind(jnp.where(place == start + k * LANES, g + c, g), tile)
                target[:, k * LANES : (k + 1) * LANES] = g.astype(out.dtype)

        blocks.each_chunk(blocks.block[1], step, None)

    blocks.each_group(group)
