"""Bad input raises when it is traced: the argument is named, what came and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from irl_ops.algebra import BOUNDARIES, REDUCTIONS

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int32", "int64")


def check_logits(logits: Any, labels: Any) -> None:
    """Logits ``[..., T, V]`` in a float dtype, labels ``[..., T]`` in an integer one."""
    _check_array("logits", logits, FLOATS)
    _check_array("labels", labels, INTEGERS)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; accepted: [..., T, V] with V of 1 or more"
        )
    _check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last axis")


def check_sequence(
    labels: Any,
    *,
    ignore_index: Any,
    where: Any,
    shift: Any,
    segment_ids: Any,
    position_ids: Any,
    cu_seqlens: Any,
    eos_token_id: Any,
    boundary: Any,
    truncated: Any,
) -> None:
    """The options that say which row follows which."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}; accepted: an int")
    check_switches(shift=shift)
    markers = dict(segment_ids=segment_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
    given = [name for name, marker in markers.items() if marker is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are given; accepted: at most one of {', '.join(markers)}"
        )
    for name in ("segment_ids", "position_ids"):
        if markers[name] is not None:
            _check_rows(name, markers[name], labels, INTEGERS)
    if cu_seqlens is not None:
        _check_array("cu_seqlens", cu_seqlens, INTEGERS)
        if labels.ndim != 1 or cu_seqlens.ndim != 1:
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and labels "
                f"{list(labels.shape)}; accepted: cu_seqlens [S+1] with logits [N, V], labels [N]"
            )
    if where is not None:
        _check_rows("where", where, labels, ("bool",))
    if truncated is not None:
        check_flags("truncated", truncated, labels)
    _check_choice("boundary", boundary, BOUNDARIES)
    if eos_token_id is not None and not _is_token(eos_token_id):
        tokens = eos_token_id
        if not isinstance(tokens, Sequence) or not tokens or not all(map(_is_token, tokens)):
            raise TypeError(
                f"eos_token_id is {eos_token_id!r}; accepted: an int, a sequence of ints, None"
            )


def check_weights(labels: Any, *, token_weights: Any, num_items: Any, reduction: Any) -> None:
    """The options that say how rows are averaged; ``num_items`` as one number or a tuple."""
    _check_choice("reduction", reduction, REDUCTIONS)
    if token_weights is not None:
        _check_rows("token_weights", token_weights, labels, (*FLOATS, "float64"))
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is given with reduction={reduction!r}; accepted: 'mean'")
    for items in num_items if isinstance(num_items, tuple) else (num_items,):
        check_scalar("num_items", items, 0, math.inf)


def check_values(labels: Any, *, next_values: Any, values: Any) -> None:
    """The arrays of values, float ``[..., T]``."""
    for name, x in (("next_values", next_values), ("values", values)):
        if x is not None:
            _check_rows(name, x, labels, FLOATS)


def check_scalar(name: str, x: Any, low: float, high: float, *, open_end: bool = False) -> None:
    """A number within [low, high], or a 0-d array, whose value is not looked at."""
    if _is_array(x) and not isinstance(x, float):  # a numpy.float64 is a float
        if x.ndim != 0:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted: a number, a 0-d array")
        if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
            raise TypeError(f"{name} is {x.dtype}; accepted: an array of floats or integers")
        return
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} is {x!r}; accepted: a number or a 0-d array")
    open_end = open_end or high == math.inf
    if not math.isfinite(x) or not (low <= x < high if open_end else low <= x <= high):
        end = ")" if open_end else "]"
        raise ValueError(f"{name} is {x}; accepted: [{low}, {high}{end}")


def check_switches(**switches: Any) -> None:
    """Options that are True or False."""
    for name, x in switches.items():
        if not isinstance(x, bool):
            raise TypeError(f"{name} is {x!r}; accepted: True or False")


def check_flags(name: str, x: Any, labels: Any) -> None:
    """A bool a sequence or a bool a row."""
    if _is_array(x) and x.shape == labels.shape[:-1] and x.dtype == bool:
        return
    _check_rows(name, x, labels, ("bool",), "or that without its last axis")


def _check_rows(name: str, x: Any, labels: Any, dtypes: Sequence[str], also: str = "") -> None:
    _check_array(name, x, dtypes)
    _check_shape(name, x, labels.shape, f"the shape of labels {also}".strip())


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_token(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check_choice(name: str, x: Any, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{name} is {x!r}; accepted: {', '.join(map(repr, choices))}")


def _check_array(name: str, x: Any, dtypes: Sequence[str]) -> None:
    if not _is_array(x):
        raise TypeError(f"{name} is a {type(x).__name__}; accepted: a jax.Array")
    if str(x.dtype) not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; accepted: {', '.join(dtypes)}")


def _check_shape(name: str, x: Any, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {list(shape)}, {meaning}")
