"""The C++ row kernels on NumPy arrays, called by XLA through Python.

What ``jax.pure_callback`` does, without its copy of the arguments to a device: the copy waits for a
thread of a pool whose threads may all be in a callback.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from irl_ops import _native
from irl_ops.jax import private
from irl_ops.kernels.reference.measures import RowMeasures, Slopes

NDArray = np.ndarray[Any, np.dtype[Any]]


def through_python(
    name: str, out: Sequence[Any], *given: jax.Array, **told: Any
) -> tuple[jax.Array, ...]:
    """The results of the kernel, of the shapes and dtypes ``out``, the entropy last.

    ``told``: the numbers of the readout, and of the row measures what is there, as words.
    """
    results: list[jax.Array] = _callback.bind(*given, name=name, out=tuple(out), **told)
    return tuple(results)


def _row_stats(out: list[NDArray], q: NDArray, labels: NDArray, **numbers: Any) -> None:
    vectors = out if len(out) == 4 else [*out, None]
    row_max, logsum, picked, h = (_address(x) for x in vectors)
    labels = labels.astype(np.int64)  # under a name, so that it lives through the call
    _native.row_stats(
        *_rows(q), _address(labels), row_max, logsum, picked, h, _threads(), **numbers
    )


def _row_grad(
    out: list[NDArray], q: NDArray, labels: NDArray, *vectors: NDArray, **numbers: Any
) -> None:
    row_max, logsum, a, b, c = (_address(x) for x in vectors)
    labels = labels.astype(np.int64)
    y, _, _, strides, _ = _rows(out[0])
    _native.row_grad(
        *_rows(q), _address(labels), row_max, logsum, a, b, c, y, strides, _threads(), **numbers
    )


def _row_stats_grad(
    out: list[NDArray],
    q: NDArray,
    alpha: NDArray,
    beta: NDArray,
    weight: NDArray | None = None,
    **numbers: Any,
) -> None:
    row_max, logsum, h = (_address(x) for x in (*out[:2], None if weight is None else out[3]))
    y, _, _, strides, _ = _rows(out[2])
    _native.row_stats_grad(
        *_rows(q), _address(alpha), _address(beta), _address(weight),
        row_max, logsum, h, y, strides, _threads(), **numbers,
    )  # fmt: skip


def _row_measures(
    out: list[NDArray],
    q: NDArray,
    ids: NDArray,
    *arrays: NDArray,
    given: str,
    wanted: str,
    **numbers: Any,
) -> None:
    found = dict(zip(("row_max", "logsum", "picked", *wanted.split()), out, strict=True))
    ids, top1 = ids.astype(np.int64), found.get("top1")
    if top1 is not None:
        found["top1"] = np.empty(top1.shape, np.int64)
    view = _view(dict(zip(given.split(), arrays, strict=True)), q)
    at = tuple(_address(found.get(name)) for name in RowMeasures._fields)
    _native.row_measures(*_rows(q), _address(ids), ids.shape[-1], at, view, _threads(), **numbers)
    if top1 is not None:
        top1[...] = found["top1"]


def _row_measures_grad(
    out: list[NDArray],
    q: NDArray,
    ids: NDArray,
    row_max: NDArray,
    logsum: NDArray,
    a: NDArray,
    c: NDArray,
    *arrays: NDArray,
    given: str,
    **numbers: Any,
) -> None:
    named = dict(zip(given.split(), arrays, strict=True), a=a, c=c)
    ids = ids.astype(np.int64)
    slopes = tuple(_address(named.get(name)) for name in Slopes._fields)
    y, _, _, strides, _ = _rows(out[0])
    _native.row_measures_grad(
        *_rows(q), _address(ids), ids.shape[-1], _address(row_max), _address(logsum), slopes,
        y, strides, _view(named, q), _threads(), **numbers,
    )  # fmt: skip


def _view(named: dict[str, NDArray], q: NDArray) -> tuple[int, int, list[int], int]:
    scale, mask, above = (
        _address(named.get(name)) for name in ("row_scale", "keep_mask", "keep_above")
    )
    return scale, mask, [q.shape[-1]], above


def _label_logit(out: list[NDArray], q: NDArray, labels: NDArray, **numbers: Any) -> None:
    labels = labels.astype(np.int64)
    _native.label_logit(*_rows(q), _address(labels), _address(out[0]), **numbers)


def _set_label(
    out: list[NDArray],
    y: NDArray,
    labels: NDArray,
    elements: NDArray,
    label_logit: NDArray | None = None,
    **numbers: Any,
) -> None:
    out[0][...] = y
    labels = labels.astype(np.int64)
    vectors = (_address(x) for x in (labels, elements, label_logit))
    _native.set_label(*_rows(out[0]), *vectors, **numbers)


def _rows(x: NDArray) -> tuple[int, str, list[int], list[int], int]:
    vocab = x.shape[-1]
    return _address(x), x.dtype.name, [math.prod(x.shape[:-1])], [vocab], vocab


def _address(x: NDArray | None) -> int:
    return 0 if x is None else x.ctypes.data


def _threads() -> int:
    return os.cpu_count() or 1


_KERNELS: dict[str, Callable[..., None]] = {
    "row_stats": _row_stats,
    "row_grad": _row_grad,
    "row_stats_grad": _row_stats_grad,
    "row_measures": _row_measures,
    "row_measures_grad": _row_measures_grad,
    "label_logit": _label_logit,
    "set_label": _set_label,
}


def _lower(ctx: Any, *given: Any, name: str, out: tuple[Any, ...], **told: Any) -> Any:
    def called(*arrays: NDArray) -> list[NDArray]:
        results = [np.empty(x.shape, x.dtype) for x in out]
        _KERNELS[name](results, *arrays, **told)
        return results

    return private.emit_callback(ctx, called, given)


_callback: Any = Primitive("irl_callback")
_callback.multiple_results = True
_callback.def_abstract_eval(
    lambda *_, name, out, **__: [jax.core.ShapedArray(x.shape, x.dtype) for x in out]
)
mlir.register_lowering(_callback, _lower, platform="cpu")
