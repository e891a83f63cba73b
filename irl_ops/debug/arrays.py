"""Arrays of any framework, as NumPy sees them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray


def framework(x: Any) -> str | None:
    """``"torch"``, ``"jax"`` or ``"numpy"``; None for what is no array. Imports nothing."""
    for name, kind in (("torch", "Tensor"), ("jax", "Array")):
        module = sys.modules.get(name)
        if module is not None and isinstance(x, getattr(module, kind)):
            return name
    return "numpy" if isinstance(x, np.ndarray) else None


def size(x: Any) -> list[int]:
    """The shape, as plain numbers."""
    return [int(n) for n in x.shape]


def dtype_name(x: Any) -> str:
    """``"float32"``, ``"bfloat16"``, ... in every framework alike."""
    return str(x.dtype).removeprefix("torch.")


def to_numpy(x: Any, where: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Floats as float64; ``where`` [2, n] picks elements of a matrix before they are copied."""
    kind = framework(x)
    if kind == "torch":
        import torch

        x = x.detach()
        if where is not None:
            x = x[tuple(torch.from_numpy(where).to(x.device))]
        plain: NDArray[np.float64] = x.to("cpu", torch.float64).numpy()
        return plain
    if where is not None:
        x = x[tuple(where)]
    return np.asarray(x).astype(np.float64)


def as_is(x: Any) -> Any:
    """Integers, flags and numbers as NumPy has them; floats as float64; what is no array stays."""
    kind = framework(x)
    if kind is None:
        return x
    if kind == "torch":
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
        return x.numpy()
    x = np.asarray(x)
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def bfloat16(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to the nearest bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def float16(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to the nearest float16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)
