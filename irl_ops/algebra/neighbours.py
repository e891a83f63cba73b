"""Neighbouring rows, and what a window of rows is given of those beyond its edges.

A chunk of rows, the rows of one rank and a whole batch are one idea: a window. Nothing else in the
algebra reaches across rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
Scalar = Any


class Edge(NamedTuple):
    """The rows around a window, ``[..., 1]`` or numbers; the defaults say that there are none."""

    onto: Array | bool = False  # whether the row before bootstraps from the window's first
    td: Array | float = 0.0  # d of the row before
    label_logit: Array | float = 0.0  # q[a] of the row before
    value: Array | float = 0.0  # V of the row behind the window's last


NO_EDGE = Edge()


def following(xp: Any, x: Array, edge: Array | Scalar) -> Array:
    """``x[..., t + 1]`` at t, and the edge in the last row."""
    return xp.concat([x[..., 1:], _beyond(xp, x, edge)], axis=-1)


def preceding(xp: Any, x: Array, edge: Array | Scalar) -> Array:
    """``x[..., t - 1]`` at t, and the edge in the first row."""
    return xp.concat([_beyond(xp, x, edge), x[..., :-1]], axis=-1)


def _beyond(xp: Any, x: Array, edge: Array | Scalar) -> Array:
    if isinstance(edge, bool | int | float):
        return xp.full_like(x[..., :1], edge)
    return xp.broadcast_to(xp.astype(edge, x.dtype), x[..., :1].shape)
