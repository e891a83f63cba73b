"""row_measures: what else a read of a row can tell, of z: q times the row's scale where it is kept.

Traffic: one read of the logits. Exponentials: 1 + 1/16 an element (on v4 1 + 1/8). Each id costs a
comparison and a selection an element; nothing that is not asked for costs anything. A mask is put
into the logits by XLA, inside whatever makes them; logits that lie in memory are copied for it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
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
from irl_ops.kernels.reference.measures import RowMeasures

UNROLLED = 4


class View(NamedTuple):
    """z of q, in a group of rows; ``[group, 128]`` each, None where rows have none."""

    scale: jax.Array | None
    above: jax.Array | None

    def of(self, q: jax.Array) -> jax.Array:
        """In float32, rounded once; what is masked is -inf already."""
        z = q if self.scale is None else q * self.scale
        return z if self.above is None else jnp.where(q < self.above, -softmax.INF, z)


def row_measures(
    logits: jax.Array,
    ids: jax.Array,
    wanted: tuple[str, ...] = (),
    *,
    row_scale: jax.Array | None = None,
    keep_mask: jax.Array | None = None,
    keep_above: jax.Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    of: Generation,
    interpret: Any = False,
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``; 1 to ``generations.MOST_IDS`` ids per row."""
    x, y = planes(masked(logits, keep_mask), 2), planes(ids.astype(jnp.int32), 2)
    count, vectors = ids.shape[-1], beside(logits, row_scale, keep_above)
    blocks = Blocks.of(x, rows_for(count, of), of.columns, of)
    rows, names = blocks.block[0], kept_of(wanted)
    outputs = ["row_max", "logsum", *(n for n in RowMeasures._fields[3:] if n in names)]
    asked = Asked("entropy" in names, "log_sum_sq" in names, "top1" in names, "kept" in names)
    shapes = [(*x.shape[:2], len(outputs)), (*x.shape[:2], count)]
    out, picked = pl.pallas_call(
        functools.partial(
            _kernel, blocks, asked, Softcap(logit_scale, softcap), row_scale is not None
        ),
        grid=blocks.grid,
        in_specs=[blocks.vectors(count), *map(blocks.vectors, widths(vectors)), blocks.logits],
        out_specs=[blocks.vectors(len(outputs)), blocks.vectors(count)],
        out_shape=[array_like(x, shape, jnp.float32) for shape in shapes],
        scratch_shapes=[
            pltpu.VMEM((count, blocks.group, LANES), jnp.int32),
            pltpu.VMEM((count, rows, LANES), jnp.float32),
            *[pltpu.VMEM((rows, LANES), jnp.float32)] * asked.arrays,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=of.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=(6 + 2 * count) * x.size,
            transcendentals=x.size,
            bytes_accessed=x.size * x.dtype.itemsize + 4 * x.shape[0] * x.shape[1] * LANES * 4,
        ),
        interpret=interpret,
        name="irl_row_measures",
    )(y, *vectors, x)
    found = {name: out[..., k].reshape(ids.shape[:-1]) for k, name in enumerate(outputs)}
    at_ids = jnp.where(ids >= logits.shape[-1], jnp.nan, picked.reshape(ids.shape))
    found["picked"] = jnp.where(ids < 0, 0.0, at_ids)
    if asked.top:
        found["top1"] = found["top1"].astype(jnp.int32)
    return RowMeasures(*(found.get(name) for name in RowMeasures._fields))


class Asked(NamedTuple):
    """What is kept of the columns that were seen, beside maximum and sum."""

    entropy: bool
    squares: bool
    top: bool
    mean: bool

    @property
    def arrays(self) -> int:
        """How many that takes."""
        return 2 + self.entropy + self.squares + self.top + 2 * self.mean

    def start(self, shape: tuple[int, int]) -> list[jax.Array]:
        """Nothing seen: of ``softmax.Running``, then a place, then a sum and a count."""
        run = softmax.empty(shape, self.entropy, self.squares)
        zeros = [jnp.zeros(shape, jnp.float32)] * (self.top + 2 * self.mean)
        return [*(v for v in run if v is not None), *zeros]

    def named(self, kept: list[Any]) -> tuple[softmax.Running, Any, Any, Any]:
        """Back from the list; None for what is not kept."""
        items = iter(kept)
        top, total = next(items), next(items)
        centred = next(items) if self.entropy else None
        squares = next(items) if self.squares else None
        place = next(items) if self.top else None
        pair = (next(items), next(items)) if self.mean else (None, None)
        return softmax.Running(top, total, centred, squares), place, *pair


def _kernel(blocks: Blocks, asked: Asked, cap: Softcap, scaled: bool, ids: Any, *refs: Any) -> None:
    """One block of columns; what the lanes have seen so far lies in ``kept``."""
    *given, x, out, picked, places, found = refs[: -asked.arrays]
    kept = refs[-asked.arrays :]
    j, last = pl.program_id(2), blocks.grid[2] - 1
    first = j * blocks.block[1]

    @pl.when(j == 0)
    def _() -> None:
        for ref, value in zip(kept, asked.start((blocks.block[0], LANES)), strict=True):
            ref[...] = value
        found[...] = jnp.zeros(found.shape, jnp.float32)

    def group(columns: int, rows: Any) -> None:
        view = view_of(given, scaled, rows)
        spread(ids, rows, places, first)

        def step(start: Any, width: int, kept: list[jax.Array]) -> list[jax.Array]:
            read = tiles_of(chunk_of(x, rows, start, width), width, cap, beyond=-softmax.INF)
            tiles = [view.of(q) for q in read]

            def pick(k: Any) -> None:
                at, place = found[k, rows, :], places[k] - start
                for t, tile in enumerate(tiles):
                    at = jnp.where(place == t * LANES, tile, at)
                found[k, rows, :] = at

            each_id(places.shape[0], pick)
            return _with(asked, kept, tiles, first + start)

        seen = [ref[rows, :] for ref in kept]
        for ref, value in zip(kept, blocks.each_chunk(columns, step, seen), strict=True):
            ref[rows, :] = value

    if blocks.columns_of_last == blocks.block[1]:
        blocks.each_group(functools.partial(group, blocks.block[1]))
    else:
        for here, columns in ((j < last, blocks.block[1]), (j == last, blocks.columns_of_last)):
            pl.when(here)(functools.partial(blocks.each_group, functools.partial(group, columns)))

    @pl.when(j == last)
    def _() -> None:
        blocks.each_group(functools.partial(_finish, asked, blocks.vocab, out, picked, found, kept))


def _with(
    asked: Asked, kept: list[jax.Array], tiles: list[jax.Array], column: Any
) -> list[jax.Array]:
    """With a few tiles more, the first of which begins at ``column``."""
    run, place, total, count = asked.named(kept)
    if place is not None:  # the first of the largest: an earlier tile keeps its place
        best, lane = run.top, lanes_of(run.top)
        for t, tile in enumerate(tiles):
            better = tile > best
            here = (column + t * LANES + lane).astype(jnp.float32)  # exact: V is below 2^24
            best, place = jnp.where(better, tile, best), jnp.where(better, here, place)
    if total is not None and count is not None:
        for tile in tiles:
            present = tile != -softmax.INF
            total = total + jnp.where(present, tile, 0.0)
            count = count + jnp.where(present, 1.0, 0.0)
    return [v for v in (*softmax.fold(run, tiles), place, total, count) if v is not None]


def _finish(
    asked: Asked, vocab: int, out: Any, picked: Any, found: Any, kept: Any, rows: Any
) -> None:
    run, place, total, count = asked.named([ref[rows, :] for ref in kept])
    of = softmax.finish(run)
    values = [of.row_max, of.logsum]
    if of.entropy is not None:  # which rounding may take out of its range; NaN stays
        most, h = math.log(vocab), of.entropy
        values.append(jnp.where(h < 0.0, 0.0, jnp.where(h > most, most, h)))
    if of.log_sum_sq is not None:
        values.append(of.log_sum_sq)
    if place is not None:
        first = jnp.where(run.top == of.row_max, place, float(vocab))
        first = jnp.min(first, axis=1, keepdims=True)
        values.append(jnp.where(first < vocab, first, 0.0))
    if total is not None and count is not None:
        total, count = (jnp.sum(v, axis=1, keepdims=True) for v in (total, count))
        mean = jnp.where(count == 0.0, -softmax.INF, total / jnp.maximum(count, 1.0))
        values += [mean, count]
    for k, value in enumerate(values):
        out[rows, k : k + 1] = value
    for k in range(found.shape[0]):
        picked[rows, k : k + 1] = jnp.sum(found[k, rows, :], axis=1, keepdims=True)


# --- What row_measures_grad shares ---


def masked(logits: jax.Array, keep_mask: jax.Array | None) -> jax.Array:
    """The logits with -inf where a column is left out."""
    return logits if keep_mask is None else jnp.where(keep_mask, logits, -softmax.INF)


def beside(logits: jax.Array, *vectors: jax.Array | None) -> list[jax.Array]:
    """The vectors that are there as one array beside the rows, if there is any."""
    given = [planes(v, 1) for v in vectors if v is not None]
    return [columns_beside(*given)] if given else []


def widths(vectors: list[jax.Array]) -> list[int]:
    """Their last axes."""
    return [v.shape[-1] for v in vectors]


def kept_of(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """With what comes together with the mean."""
    return (*wanted, "kept") if "mean_logit" in wanted else wanted


def rows_for(count: int, of: Generation) -> int:
    """Rows of a block, so that what is picked at ``count`` ids takes 2 MiB at most."""
    return min(of.rows, max(16, 4096 // count // 16 * 16))


def view_of(given: Any, scaled: bool, rows: Any) -> View:
    """Spread once, and not for every tile."""
    if not given:
        return View(None, None)
    columns = given[0].shape[-1]
    wide = [
        jnp.broadcast_to(v, (v.shape[0], LANES))
        for v in (given[0][rows, k : k + 1] for k in range(columns))
    ]
    return View(wide[0] if scaled else None, None if columns == scaled else wide[-1])


def spread(ids: Any, rows: Any, places: Any, first: Any) -> None:
    """Each lane's distance from the ids of its row, in columns behind ``first``."""
    for k in range(places.shape[0]):
        place = jnp.broadcast_to(ids[rows, k : k + 1], places.shape[1:]) - first
        places[k] = place - lanes_of(place)


def each_id(count: int, body: Any) -> None:
    """``body(k)`` for each of the ids."""
    if count <= UNROLLED:
        for k in range(count):
            body(k)
    else:
        lax.fori_loop(0, count, lambda k, _: body(k), None)
