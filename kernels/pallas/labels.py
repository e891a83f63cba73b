"""One element per row: label_logit reads it, set_label writes it.

Traffic: of every row the one tile that holds the label's element (4 KiB), read and in set_label
written again. Logits have to be ``in_whole_tiles``: no copy may leave the array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from irl_ops.kernels.pallas.softcap import Softcap
from irl_ops.kernels.pallas.tiles import LANES, array_like

# Places are rounded down to tiles by masks, x & -128: Pallas lowers // by the sign of its operands,
# and asks the running device how.


def label_logit(
    logits: jax.Array,
    labels: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    interpret: Any = False,
) -> jax.Array:
    """``q[label]`` in float32: 0 without a label, NaN for a bad one."""
    x = logits.reshape(-1, logits.shape[-1])
    y = _places(labels, x)
    block = _block(x)
    picked = pl.pallas_call(
        functools.partial(_label_logit, block, Softcap(logit_scale, softcap)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // block,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((block, 1), lambda i, _: (i, 0)),
            scratch_shapes=_scratch(block, x),
        ),
        out_shape=array_like(x, (x.shape[0], 1), jnp.float32),
        cost_estimate=_cost(x, 1),
        interpret=interpret,
        name="irl_label_logit",
    )(y, x)
    return jnp.where(labels >= logits.shape[-1], jnp.nan, picked.reshape(labels.shape))


def set_label(
    dlogits: jax.Array,
    labels: jax.Array,
    elements: jax.Array,
    label_logit: jax.Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The gradient, in its own storage, with the elements at the labels replaced.

    The elements are gradients in q; under a soft cap ``label_logit`` is q at the labels.
    """
    seen = elements if label_logit is None else label_logit
    elements = Softcap(logit_scale, softcap).behind(elements.astype(jnp.float32), seen)
    x = dlogits.reshape(-1, dlogits.shape[-1])
    y = _places(labels, x)
    block = _block(x)
    vector = pl.BlockSpec((block, 1), lambda i, _: (i, 0))
    out = pl.pallas_call(
        functools.partial(_set_label, block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // block,),
            in_specs=[vector, vector, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=_scratch(block, x),
        ),
        out_shape=array_like(x, x.shape, x.dtype),
        input_output_aliases={3: 0},
        cost_estimate=_cost(x, 2),
        interpret=interpret,
        name="irl_set_label",
    )(y, y[:, None], elements.reshape(-1, 1), x)
    replaced: jax.Array = out.reshape(dlogits.shape)
    return replaced


def _label_logit(
    block: int, cap: Softcap, places: Any, x: Any, picked: Any, tiles: Any, arrived: Any
) -> None:
    first = pl.program_id(0) * block
    _move(places, first, block, x, tiles, arrived, store=False)
    height = tiles.shape[1]
    row = lax.broadcasted_iota(jnp.int32, (height, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (height, LANES), 1)

    def group(g: jax.Array, _: None) -> None:
        begin = pl.multiple_of(g * height, height)
        found = jnp.zeros((height, LANES), jnp.float32)
        for k in range(height):
            place = places[first + begin + k]
            here = (row == k) & (lane == jnp.where(place < 0, -1, place & (LANES - 1)))
            found = jnp.where(here, tiles[begin + k].astype(jnp.float32), found)
        picked[pl.ds(begin, height), :] = cap.logits(jnp.sum(found, axis=1, keepdims=True))

    lax.fori_loop(0, block // height, group, None)


def _set_label(
    block: int, places: Any, labels: Any, elements: Any, d: Any, out: Any, tiles: Any, arrived: Any
) -> None:
    """Rows that share a tile each hold a copy of it: every copy gets the elements of all of them.

    So the copies are equal, and it does not matter which of them is written last.
    """
    first = pl.program_id(0) * block
    _move(places, first, block, d, tiles, arrived, store=False)
    height = tiles.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (height, LANES), 1)

    def change(r: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(r & -height, height), height)
        here = labels[rows, :] - _column(places[first + r]) == lane
        tiles[r] = jnp.where(here, elements[rows, :].astype(tiles.dtype), tiles[r])

    lax.fori_loop(0, block, change, None)
    _move(places, first, block, out, tiles, arrived, store=True)


def _move(
    places: Any, first: Any, block: int, hbm: Any, tiles: Any, arrived: Any, store: bool
) -> None:
    """The tiles of all rows of a block, under way at once."""
    height = tiles.shape[1]

    def copy(r: Any) -> Any:
        rows = pl.ds(pl.multiple_of(first + (r & -height), height), height)
        there = hbm.at[rows, pl.ds(_column(places[first + r]), LANES)]
        ends = (tiles.at[r], there) if store else (there, tiles.at[r])
        return pltpu.make_async_copy(*ends, arrived)

    def each(act: Callable[[Any], None]) -> None:
        lax.fori_loop(0, block, lambda r, _: act(copy(r)), None)

    each(lambda moving: moving.start())
    each(lambda moving: moving.wait())


def _column(place: Any) -> Any:
    """The first column of the tile that holds the place; of a row without one, the first tile."""
    return pl.multiple_of(jnp.maximum(place, 0) & -LANES, LANES)


def _places(labels: jax.Array, x: jax.Array) -> jax.Array:
    """The labels that are columns; -1 for all others."""
    flat = labels.reshape(-1).astype(jnp.int32)
    return jnp.where((flat >= 0) & (flat < x.shape[1]), flat, -1)


def _block(x: jax.Array) -> int:
    return next(rows for rows in (128, 64, 32, 16) if x.shape[0] % rows == 0)


def _scratch(block: int, x: jax.Array) -> list[Any]:
    return [pltpu.VMEM((block, _height(x), LANES), x.dtype), pltpu.SemaphoreType.DMA(())]


def _height(x: jax.Array) -> int:
    """Rows of a tile: 8 in float32, 16 in 16 bits."""
    return 32 // int(x.dtype.itemsize)


def _cost(x: jax.Array, ways: int) -> pl.CostEstimate:
    moved = x.shape[0] * LANES * (ways * 32 + 4)
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved)
