"""Bad input raises at once, and the message names the argument, what came and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from irl_ops.algebra import BOUNDARIES, REDUCTIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_logits(logits: Any, labels: Any) -> None:
    """Logits ``[..., T, V]`` in a float dtype, labels ``[..., T]`` in an integer one."""
    _check_tensor("logits", logits, FLOATS)
    _check_tensor("labels", labels, INTEGERS)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; accepted: [..., T, V] with V of 1 or more"
        )
    _check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last axis")
    _check_device("labels", labels, logits)
    _check_derivatives(logits)


def check_sequence(
    labels: Tensor,
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
            check_rows(name, markers[name], labels, INTEGERS)
    if cu_seqlens is not None:
        _check_tensor("cu_seqlens", cu_seqlens, INTEGERS)
        _check_device("cu_seqlens", cu_seqlens, labels)
        if labels.ndim != 1 or cu_seqlens.ndim != 1:
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and labels "
                f"{list(labels.shape)}; accepted: cu_seqlens [S+1] with logits [N, V], labels [N]"
            )
    if where is not None:
        check_rows("where", where, labels, (torch.bool,))
    if truncated is not None:
        check_flags("truncated", truncated, labels)
    _check_choice("boundary", boundary, BOUNDARIES)
    if eos_token_id is not None and not _is_token(eos_token_id):
        tokens = eos_token_id
        if not isinstance(tokens, Sequence) or not tokens or not all(map(_is_token, tokens)):
            raise TypeError(
                f"eos_token_id is {eos_token_id!r}; accepted: an int, a sequence of ints, None"
            )


def check_weights(labels: Tensor, *, token_weights: Any, num_items: Any, reduction: Any) -> None:
    """The options that say how rows are averaged; ``num_items`` as one number or a tuple."""
    _check_choice("reduction", reduction, REDUCTIONS)
    if token_weights is not None:
        check_rows("token_weights", token_weights, labels, (*FLOATS, torch.float64))
        _refuse_gradient("token_weights", token_weights)
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is given with reduction={reduction!r}; accepted: 'mean'")
    for items in num_items if isinstance(num_items, tuple) else (num_items,):
        check_scalar("num_items", items, labels, 0, math.inf)


def check_values(labels: Tensor, *, next_values: Any, values: Any) -> None:
    """The tensors of values, float ``[..., T]``."""
    for name, x in (("next_values", next_values), ("values", values)):
        if x is not None:
            check_rows(name, x, labels, FLOATS)


def check_scalar(
    name: str, x: Any, logits: Any, low: float, high: float, *, open_end: bool = False
) -> None:
    """A number within [low, high], or a 0-d tensor, whose value is not looked at.

    The tensor lives on the CPU or where the logits do.
    """
    if isinstance(x, Tensor):
        if x.ndim != 0:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted: a number, a 0-d tensor")
        if x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} is {x.dtype}; accepted: a tensor of floats or integers")
        if x.device.type != "cpu" and isinstance(logits, Tensor):
            _check_device(name, x, logits)
        _refuse_gradient(name, x)
        return
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} is {x!r}; accepted: a number or a 0-d tensor")
    open_end = open_end or high == math.inf
    if not math.isfinite(x) or not (low <= x < high if open_end else low <= x <= high):
        end = ")" if open_end else "]"
        raise ValueError(f"{name} is {x}; accepted: [{low}, {high}{end}")


def check_switches(**switches: Any) -> None:
    """Options that are True or False."""
    for name, x in switches.items():
        if not isinstance(x, bool):
            raise TypeError(f"{name} is {x!r}; accepted: True or False")


def check_flags(name: str, x: Any, labels: Tensor) -> None:
    """A bool a sequence or a bool a row."""
    if isinstance(x, Tensor) and x.shape == labels.shape[:-1] and x.dtype == torch.bool:
        return _check_device(name, x, labels)
    return check_rows(name, x, labels, (torch.bool,), "or that without its last axis")


def check_rows(
    name: str, x: Any, labels: Tensor, dtypes: Sequence[torch.dtype], also: str = ""
) -> None:
    """A tensor of the labels' shape and device."""
    _check_tensor(name, x, dtypes)
    _check_shape(name, x, labels.shape, f"the shape of labels {also}".strip())
    _check_device(name, x, labels)


def check_inplace(logits: Tensor) -> None:
    """The gradient may take the logits' storage unless somebody else is sure to need it."""
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True with logits that are a leaf, or a view of one; accepted: logits that "
            "were computed, since the gradient takes their storage"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"inplace=True with logits of strides {list(logits.stride())}; accepted: a contiguous "
            "last axis, since others are copied"
        )
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"inplace=True with logits that overlap themselves (shape {list(logits.shape)}, "
                f"strides {list(logits.stride())}); accepted: one element per address"
            )
        extent = max(extent, stride * size)


def refuse_label(
    labels: Tensor, given: Tensor, vocab: int, ignore_index: int, shift: bool
) -> NoReturn:
    """The IndexError for the first bad one of the ``labels``, which are aligned with their rows."""
    *lead, row = (labels >= vocab).nonzero()[0].tolist()
    position = (*lead, row + shift)
    raise IndexError(
        f"labels[{', '.join(map(str, position))}] is {given[position].item()}; accepted: "
        f"0 to {vocab - 1} (the logits have {vocab} columns) and ignore_index={ignore_index}"
    )


def _is_token(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check_choice(name: str, x: Any, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{name} is {x!r}; accepted: {', '.join(map(repr, choices))}")


def _check_tensor(name: str, x: Any, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; accepted: a torch.Tensor")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; accepted: {', '.join(map(str, dtypes))}")


def _check_shape(name: str, x: Tensor, shape: torch.Size, meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {list(shape)}, {meaning}")


def _check_device(name: str, x: Tensor, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}; accepted: {other.device}, where the logits are")


def _refuse_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which this loss does not compute; accepted: "
            f"{name}.detach(), or a loss written on the outputs of token_stats"
        )
    _refuse_tangent(x)


def _check_derivatives(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_gradtrackingtensor(logits):
        raise RuntimeError(
            "irl_ops: torch.func transforms (grad, vjp, jvp, jacrev) are not implemented; use "
            "loss.backward() or torch.autograd.grad"
        )
    _refuse_tangent(logits)


def _refuse_tangent(x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("irl_ops: forward-mode derivatives are not implemented")
