"""Memory for large gradients on the CPU that stays mapped between steps.

The operating system clears every page of a fresh allocation at its first touch, which takes longer
than computing the gradient that is written there. So the memory of a gradient that is gone is kept,
and the next one of its size is written into it. Chunks of logits that become their gradient, and
the gradient of the weight behind them, are such memory too.

* At most ``limit()`` bytes are kept idle: 1 GiB (``2**30``), or what the environment variable
  ``IRL_OPS_POOL_BYTES`` says when this module is first imported. 0 keeps nothing: every gradient is
  then allocated by torch.
* ``set_limit(bytes)`` changes that, at once. ``release()`` gives idle memory back to the system.
* Memory in use is not counted, and lives as long as the last tensor on it. Two live tensors never
  share any. A tensor takes an idle block of at most twice its size.
* A tensor of the pool may be viewed, saved, shared with other processes, or resized within its
  size; torch refuses to resize it beyond ("storage that is not resizable").
* All functions may be called from any thread. A forked child starts with nothing idle.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from irl_ops.torch.arguments import PLAIN

try:
    from irl_ops import _native as _native
except ImportError:  # not built: irl_ops.torch.native says so, and nothing comes from the pool
    _DTYPES: dict[torch.dtype, str] = {}
else:
    _DTYPES = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
        torch.float64: "float64",
    }

_VARIABLE = "IRL_OPS_POOL_BYTES"
_DEFAULT = 2**30
_SMALLEST = 2**21  # bytes: one huge page; less stays in the heap of the process anyway


def empty_like(logits: Tensor) -> Tensor:
    """``torch.empty_like(logits)``, from memory of the pool where that pays.

    Args:
        logits: Any tensor. On the CPU, strided, of float32, bfloat16, float16 or float64 and of
            2 MiB or more, the result comes from the pool unless its limit is 0; else from torch.

    Returns:
        A dense tensor of the same shape, dtype and device, with the strides that
        ``torch.empty_like`` gives. Its values are those of any earlier tensor.
    """
    if not _serves(logits, logits.numel()):
        return torch.empty_like(logits)
    strides = logits.stride()
    if not logits.is_contiguous():
        strides = torch.empty_like(logits, device="meta").stride()
    return _take(logits, logits.shape, strides)


def new_empty(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x.new_empty(rows, columns)``, from the pool as in ``empty_like``."""
    if not _serves(x, rows * columns):
        return x.new_empty(rows, columns)
    return _take(x, (rows, columns), (columns, 1))


def limit() -> int:
    """How many idle bytes are kept at most."""
    return _native.pool_limit() if _DTYPES else 0


def set_limit(bytes: int) -> None:
    """Keeps at most ``bytes`` idle from now on; 0 turns the pool off. What is above goes at once.

    Raises:
        TypeError: ``bytes`` is no int.
        ValueError: ``bytes`` is below 0 or above 2**63 - 1.
    """
    if isinstance(bytes, bool) or not isinstance(bytes, int):
        raise TypeError(f"bytes is {bytes!r}, accepted is an int >= 0")
    if not 0 <= bytes < 2**63:
        raise ValueError(f"bytes is {bytes}, accepted are 0 to 2**63 - 1")
    if _DTYPES:
        _native.pool_set_limit(bytes)


def idle() -> int:
    """How many bytes are kept idle now."""
    return _native.pool_idle() if _DTYPES else 0


def release() -> int:
    """Gives all idle memory back to the system, and says how many bytes that were."""
    return _native.pool_release() if _DTYPES else 0


def _take(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    tensor: Tensor = from_dlpack(_native.pool_empty(shape, strides, _DTYPES[like.dtype]))
    return tensor


def _serves(x: Tensor, elements: int) -> bool:
    """Whether as many elements like those of ``x`` come from the pool."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN  # a subclass makes its own
        and elements * x.element_size() >= _SMALLEST
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and limit() > 0
    )


def _from_environment() -> int:
    text = os.environ.get(_VARIABLE, "")
    if not text.strip():
        return _DEFAULT
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise ValueError(f"{_VARIABLE} is {text!r}, accepted is a number of bytes >= 0")
    return value


set_limit(_from_environment())
