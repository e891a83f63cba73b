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

NDArray = np.ndarray[Any, np.dtype[Any]]


def through_python(
    name: str, out: Sequence[Any], *given: jax.Array, **numbers: Any
) -> tuple[jax.Array, ...]:
    """The results of the kernel, of the shapes and dtypes ``out``, the entropy last."""
    results: list[jax.Array] = _callback.bind(*given, name=name, out=tuple(out), **numbers)
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
    "label_logit": _label_logit,
    "set_label": _set_label,
}


def _lower(ctx: Any, *given: Any, name: str, out: tuple[Any, ...], **numbers: Any) -> Any:
    def called(*arrays: NDArray) -> list[NDArray]:
        results = [np.empty(x.shape, x.dtype) for x in out]
        _KERNELS[name](results, *arrays, **numbers)
        return results

    return private.emit_callback(ctx, called, given)


_callback: Any = Primitive("irl_callback")
_callback.multiple_results = True
_callback.def_abstract_eval(
    lambda *_, name, out, **__: [jax.core.ShapedArray(x.shape, x.dtype) for x in out]
)
mlir.register_lowering(_callback, _lower, platform="cpu")
