"""Matrices in the tiles of a TPU's memory, for the loops that hold them.

Arguments and results of a program lie in tiles of 8 rows. Within a program v7x's compiler keeps
matrices of 16 bits in tiles of 16 rows: what a loop reads is converted before it, and a sum that it
adds to behind it, by a copy each. As ``[R / 8, 8, D]`` a matrix has tiles of 8 rows everywhere.

Where the rows of a matrix are parted over devices, every device has to have whole tiles, or they
would be sent around. How many devices there are is known when a program is lowered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from irl_ops.jax import private

ROWS = 8  # of a tile
Function = Callable[..., Any]


def in_tiles(matrix: jax.Array) -> jax.Array:
    """``[R, D]`` as ``[R / 8, 8, D]``, where 8 divides R."""
    rows, width = matrix.shape
    return matrix if rows % ROWS else matrix.reshape(rows // ROWS, ROWS, width)


def in_rows(x: jax.Array) -> jax.Array:
    """``[..., D]`` as ``[R, D]``."""
    return x.reshape(-1, x.shape[-1])


def where_whole(rows: tuple[int, ...], tiled: Function, plain: Function) -> Function:
    """``tiled`` in programs whose devices can share the tiles of so many rows, else ``plain``.

    Rows that have no whole tiles on one device are not in tiles anyway. Both functions take and
    return arrays of the same types.
    """
    if private.missing() is not None:
        return plain

    def run(*arrays: Any) -> Any:
        by_tiles, out = jax.make_jaxpr(tiled, return_shape=True)(*arrays)
        by_rows = jax.make_jaxpr(plain)(*arrays)
        flat = jax.tree.leaves(arrays)
        found = _chosen.bind(*flat, rows=rows, tiled=by_tiles, plain=by_rows)
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return run


def _eager(*arrays: Any, plain: Any, **_: Any) -> list[jax.Array]:
    """Under ``jax.disable_jit``."""
    found: list[jax.Array] = jaxpr_as_fun(plain)(*arrays)
    return found


def _batched(arrays: Any, axes: Any, *, rows: Any, **chosen: Any) -> tuple[list[jax.Array], Any]:
    by = {
        name: jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), axes))(*arrays)
        for name, jaxpr in chosen.items()
    }
    found: list[jax.Array] = _chosen.bind(*arrays, rows=rows, **by)
    return found, [0] * len(found)


def _lower(ctx: Any, *arrays: Any, rows: tuple[int, ...], tiled: Any, plain: Any) -> Any:
    devices = private.partitions(ctx)
    whole = all(x % ROWS or x // ROWS % devices == 0 for x in rows)
    run = jaxpr_as_fun(tiled if whole else plain)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *arrays)


_chosen: Any = Primitive("irl_chosen_by_devices")
_chosen.multiple_results = True
_chosen.def_impl(_eager)
_chosen.def_abstract_eval(lambda *_, plain, **__: plain.out_avals)
batching.primitive_batchers[_chosen] = _batched
if private.missing() is None:
    private.lower_with_devices(_chosen)
    mlir.register_lowering(_chosen, _lower)
