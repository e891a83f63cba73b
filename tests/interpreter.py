"""Triton's interpreter, which computes with NumPy, as the tests need it.

Its conversion to bfloat16 cuts digits off; hardware rounds to nearest, ties to even, and so must
what is compared within half a unit in the last place. It adds along any axis but the last one
number after another, where hardware adds in a tree. And it prepares the language anew for every
call of one jit function by another, which is half of its time; once for each function is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_cast_impl = interpreter.InterpreterBuilder.cast_impl
_prepared: set[Any] = set()


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    """As the interpreter's own, but for float32 to bfloat16, which is stored as uint16."""
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast_impl(self, source, target)
    bits = source.data.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # rounding would carry a NaN over to infinity
    data = np.where(np.isnan(source.data), quiet, rounded).astype(np.uint16)
    return interpreter.TensorHandle(data, target.scalar)


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """One jit function called by another."""
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def sum_along(self: Any, given: Any) -> Any:
    """In pairs of pairs, as NumPy does along the last axis of an array."""
    last = np.ascontiguousarray(np.moveaxis(given.handle.data, self.axis, -1))
    total = last.sum(-1)
    return self.to_tensor(
        np.expand_dims(total, self.axis) if self.keep_dims else total, given.dtype
    )


def install() -> None:
    """From now on, in this process."""
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpretedFunction.__call__ = call
    interpreter.ReduceOps.sum = sum_along
