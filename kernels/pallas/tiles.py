"""How rows lie in memory, and how a kernel walks a block of them.

The unit is a tile: a group of rows (8 in float32, 16 in 16 bits, what one row of registers holds)
by 128 lanes. A chunk is as many tiles as there are registers for; offsets inside it are static,
because computing addresses is what a loop of dynamic ones waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from irl_ops.kernels.pallas.generations import Generation
from irl_ops.kernels.pallas.softcap import Softcap

LANES = 128
Carry = TypeVar("Carry")


class Blocks(NamedTuple):
    """The grid over ``[outer, rows, V]``, and the blocks that its programs see."""

    outer: int
    rows: int
    vocab: int
    block: tuple[int, int]  # rows and columns; multiples of a tile
    group: int  # rows of a tile
    chunk: int  # columns of a chunk

    @staticmethod
    def of(logits: jax.Array, rows: int, columns: int, of: Generation) -> Blocks:
        """Blocks no larger than given, nor than the logits need."""
        outer, n, vocab = logits.shape
        group = 32 // logits.dtype.itemsize
        chunk = of.registers * 8 // group * LANES
        rows = min(rows, pl.cdiv(n, group) * group)
        columns = min(columns, pl.cdiv(vocab, LANES) * LANES)
        return Blocks(outer, n, vocab, (rows, columns), group, min(chunk, columns))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Outer, blocks of rows, blocks of columns."""
        rows, columns = self.block
        return self.outer, pl.cdiv(self.rows, rows), pl.cdiv(self.vocab, columns)

    @property
    def logits(self) -> pl.BlockSpec:
        """The block of ``[outer, rows, V]`` that a program sees."""
        return pl.BlockSpec((None, *self.block), lambda o, i, j: (o, i, j))

    def vectors(self, count: int) -> pl.BlockSpec:
        """The block of ``[outer, rows, count]`` beside it."""
        return pl.BlockSpec((None, self.block[0], count), lambda o, i, j: (o, i, 0))

    @property
    def columns_of_last(self) -> int:
        """How many columns the last block of a row really has."""
        return self.vocab - (self.grid[2] - 1) * self.block[1]

    def each_group(self, body: Callable[[Any], None]) -> None:
        """``body(rows)`` for every group of rows of a block, ``rows`` a slice."""

        def step(i: jax.Array, none: None) -> None:
            body(pl.ds(pl.multiple_of(i * self.group, self.group), self.group))

        lax.fori_loop(0, self.block[0] // self.group, step, None)

    def each_chunk(self, columns: int, body: Callable[[Any, int, Any], Any], carry: Carry) -> Carry:
        """``carry = body(first column, columns, carry)`` for every chunk of a block of columns."""
        whole = columns // self.chunk

        def step(i: jax.Array, carry: Any) -> Any:
            return body(pl.multiple_of(i * self.chunk, self.chunk), self.chunk, carry)

        carry = lax.fori_loop(0, whole, step, carry)
        rest = columns - whole * self.chunk
        return body(whole * self.chunk, rest, carry) if rest else carry


def chunk_of(ref: Any, rows: Any, start: Any, columns: int) -> Any:
    """The part of a block that has these rows and columns, in whole tiles."""
    return ref.at[rows, pl.ds(start, pl.cdiv(columns, LANES) * LANES)]


def tiles_of(ref: Any, columns: int, cap: Softcap, beyond: float | None = None) -> list[jax.Array]:
    """The tiles of a chunk, capped, in float32; ``beyond`` in the lanes behind the last column."""
    tiles = []
    for start in range(0, columns, LANES):
        x = cap.logits(ref[:, start : start + LANES].astype(jnp.float32))
        if beyond is not None and start + LANES > columns:
            x = jnp.where(lanes_of(x) < columns - start, x, beyond)
        tiles.append(x)
    return tiles


def lanes_of(tile: jax.Array) -> jax.Array:
    """0 to 127 along the last axis."""
    return lax.broadcasted_iota(jnp.int32, tile.shape, 1)


def planes(x: jax.Array, axes: int) -> jax.Array:
    """``[..., rows, V]`` (2 axes) or ``[..., rows]`` (1) with one axis in front, without a copy.

    Rows fold into the axis before them where they fill whole tiles; elsewhere that would be a copy.
    """
    shape = x.shape if x.ndim >= axes else (1, *x.shape)
    rows = shape[len(shape) - axes]
    lead = 1 if rows % 16 == 0 else -1
    tail = shape[len(shape) - axes + 1 :]
    return x.reshape(lead, -1 if lead == 1 else rows, *tail)


def array_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of an output, which under ``shard_map`` varies over the axes that ``x`` does."""
    of = jax.typeof(x)
    if hasattr(of, "manual_axis_type"):
        varying = {"manual_axis_type": of.manual_axis_type, "sharding": of.sharding}
    else:  # before JAX 0.10
        varying = {"vma": of.vma}
    return jax.ShapeDtypeStruct(shape, dtype, **varying)  # type: ignore[no-untyped-call]


def columns_beside(*vectors: jax.Array) -> jax.Array:
    """Row vectors ``[outer, rows]`` as one float32 ``[outer, rows, count]``.

    In memory the last axis is padded to 128 lanes, for one vector as for all of them.
    """
    return jnp.stack([v.astype(jnp.float32) for v in vectors], axis=-1)
