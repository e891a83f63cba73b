"""The arithmetic of a group of rows, in float32, lane by lane.

Each of the 128 lanes keeps a maximum and sums of its own, so that they are combined once per row.
A lane that has seen nothing but -inf has the maximum -inf, the origin 0 and empty sums.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

INF = float("inf")
FLOOR = -200.0  # exp(FLOOR) is 0 in float32, and 0 FLOOR is 0 where 0 (-inf) is NaN


class Running(NamedTuple):
    """Sums over what a lane has seen, about its maximum; ``[group, 128]`` each."""

    top: jax.Array
    total: jax.Array  # sum of e = exp(q - top)
    centred: jax.Array | None  # sum of e (q - top); None without entropy
    squares: jax.Array | None = None  # sum of e^2, likewise


class Normaliser(NamedTuple):
    """Of whole rows; ``[group, 1]`` each."""

    row_max: jax.Array
    logsum: jax.Array
    entropy: jax.Array | None
    log_sum_sq: jax.Array | None = None


def empty(shape: tuple[int, int], entropy: bool, squares: bool = False) -> Running:
    """Nothing seen."""
    zero = jnp.zeros(shape, jnp.float32)
    top = jnp.full(shape, -INF, jnp.float32)
    return Running(top, zero, zero if entropy else None, zero if squares else None)


def fold(run: Running, tiles: list[jax.Array]) -> Running:
    """With a few tiles more: one exponential each, and one to move the sums to the new maximum."""
    top = jnp.maximum(run.top, _largest(tiles))
    origin = origin_of(top)
    _, total, centred, squares = _moved(run, origin)
    for x in tiles:
        c = x - origin
        e = jnp.exp(c)
        total = total + e
        if centred is not None:
            centred = centred + e * jnp.maximum(c, FLOOR)
        if squares is not None:
            squares = squares + e * e
    return Running(top, total, centred, squares)


def finish(run: Running) -> Normaliser:
    """The lanes together."""
    row_max = jnp.max(run.top, axis=1, keepdims=True)
    _, total, centred, squares = _moved(run, origin_of(row_max))
    total = jnp.sum(total, axis=1, keepdims=True)
    logsum = jnp.log(total)
    entropy = log_sum_sq = None
    if centred is not None:
        centred = jnp.sum(centred, axis=1, keepdims=True)
        entropy = jnp.where(total == 0.0, 0.0, logsum - centred / total)
    if squares is not None:  # of a confident row both vanish, and rounding may go above 0
        log_squares = jnp.log(jnp.sum(squares, axis=1, keepdims=True)) - 2.0 * logsum
        log_sum_sq = jnp.where(total == 0.0, -INF, jnp.minimum(log_squares, 0.0))
    return Normaliser(row_max, logsum, entropy, log_sum_sq)


def origin_of(top: jax.Array) -> jax.Array:
    """The maximum, or 0 where nothing but -inf was seen, so that -inf less the origin is no NaN."""
    return jnp.where(top == -INF, 0.0, top)


class Rows(NamedTuple):
    """What the gradient of rows needs; ``[..., 1]`` each, or as wide as what it meets."""

    origin: jax.Array
    logsum: jax.Array
    a: jax.Array
    b: jax.Array | None  # None stands for 0
    live: jax.Array  # whether A or B is not 0

    @staticmethod
    def of(row_max: jax.Array, logsum: jax.Array, a: jax.Array, b: jax.Array | None) -> Rows:
        """Without mass, q - origin - logsum has to stay -inf."""
        live = a != 0.0 if b is None else (a != 0.0) | (b != 0.0)
        return Rows(origin_of(row_max), jnp.where(logsum == -INF, 0.0, logsum), a, b, live)

    def over(self, lanes: int) -> Rows:
        """Spread once, and not for every tile."""
        shape = (self.a.shape[0], lanes)
        origin, logsum, a, live = (
            jnp.broadcast_to(x, shape) for x in (self.origin, self.logsum, self.a, self.live)
        )
        return Rows(
            origin, logsum, a, None if self.b is None else jnp.broadcast_to(self.b, shape), live
        )


def gradient(x: jax.Array, row: Rows) -> jax.Array:
    """``p (A + B log p)``: 0 where q = -inf, and in rows that are not live, NaN or not."""
    logp = (x - row.origin) - row.logsum
    inner = row.a if row.b is None else row.a + row.b * jnp.maximum(logp, FLOOR)
    return jnp.where(row.live, jnp.exp(logp) * inner, 0.0)


def coefficient(
    alpha: jax.Array, beta: jax.Array, b: jax.Array | None, of: Normaliser
) -> jax.Array:
    """``A = alpha + beta V + B H``. A coefficient of 0 silences its factor, NaN or not."""
    a = alpha + jnp.where(beta == 0.0, 0.0, beta * (of.row_max + of.logsum))
    if b is None or of.entropy is None:
        return a
    return a + jnp.where(b == 0.0, 0.0, b * of.entropy)


def _moved(run: Running, origin: jax.Array) -> Running:
    """The same sums about another origin."""
    shift = run.top - origin
    scale = jnp.exp(shift)
    total = scale * run.total
    centred, squares = run.centred, run.squares
    if centred is not None:
        centred = scale * centred + total * jnp.maximum(shift, FLOOR)
    if squares is not None:
        squares = scale * scale * squares
    return Running(run.top, total, centred, squares)


def _largest(tiles: list[jax.Array]) -> jax.Array:
    """A tree, so that no maximum waits for all before it."""
    while len(tiles) > 1:
        pairs = [jnp.maximum(x, y) for x, y in zip(tiles[::2], tiles[1::2], strict=False)]
        tiles = pairs + tiles[2 * len(pairs) :]
    return tiles[0]
