"""Which arguments the losses accept, as torch tensors."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from irl_ops.algebra import Heads, Sequence
from irl_ops.arguments import Arguments
from irl_ops.torch.private import differentiated_by_func, is_wrapped

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors whose memory may be read and written; a subclass decides for itself."""


class TorchArguments(Arguments):
    """The checks for tensors, which have devices, may require a gradient, and may be a leaf."""

    array, noun = "torch.Tensor", "tensor"
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    integers = (torch.int32, torch.int64)
    weights = floats
    flags = (torch.bool,)

    def is_array(self, x: Any) -> bool:
        """Whether ``x`` is a tensor."""
        return isinstance(x, Tensor)

    def is_real(self, x: Tensor) -> bool:
        """Whether a tensor holds floats or integers."""
        return not x.is_complex() and x.dtype != torch.bool

    def remembers(self) -> bool:
        """Eager calls are many and small; a compiler's numbers may be symbols."""
        return not torch.compiler.is_compiling()

    def peek(self, x: Tensor) -> float | None:
        """The value of a 0-d tensor on the CPU, outside of compilers and transforms."""
        return x.item() if _can_look(x) else None

    def peek_list(self, x: Tensor) -> list[int] | None:
        """The values of an integer tensor, under the conditions of ``peek``."""
        listed: list[int] | None = x.tolist() if _can_look(x) else None
        return listed

    def check_logits(self, logits: Any, labels: Any) -> None:
        """The checks of all frameworks; refuses transforms that the losses do not support."""
        super().check_logits(logits, labels)
        if torch.compiler.is_compiling():
            return
        if differentiated_by_func(logits):
            raise RuntimeError(
                "irl_ops: torch.func transforms (grad, vjp, jvp, jacrev) are not implemented; use "
                "loss.backward() or torch.autograd.grad"
            )
        _refuse_tangent(logits)

    def check_place(self, name: str, x: Tensor, other: Tensor) -> None:
        """Both on one device; a 0-d tensor may be on the CPU."""
        if x.device != other.device and not (x.ndim == 0 and x.device.type == "cpu"):
            raise ValueError(
                f"{name} is on {x.device}; accepted: {other.device}, where the logits are"
            )

    def check_constant(self, name: str, x: Tensor) -> None:
        """Refuses a tensor that requires a gradient or carries a tangent."""
        if x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which this loss does not compute; accepted: "
                f"{name}.detach(), or a loss written on the outputs of token_stats"
            )
        _refuse_tangent(x)

    def heads(self, labels: Any, given: Heads) -> Heads:
        """The checks of all frameworks; refuses tangents."""
        for x in (given.values, given.next_values):
            if isinstance(x, Tensor):
                _refuse_tangent(x)
        return super().heads(labels, given)

    def check_inplace(self, logits: Tensor) -> None:
        """The gradient may take the logits' storage unless somebody else is sure to need it."""
        if torch.compiler.is_compiling():
            return  # the compiler decides about storage
        base = logits if logits._base is None else logits._base
        if logits.is_leaf or (base.is_leaf and base.requires_grad):
            raise ValueError(
                "inplace=True with logits that are a leaf, or a view of one; accepted: logits that "
                "were computed, since the gradient takes their storage"
            )
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            raise ValueError(
                f"inplace=True with logits of strides {list(logits.stride())}; accepted: a "
                "contiguous last axis, since others are copied"
            )
        extent = 1
        for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
            if size > 1 and stride < extent:
                raise ValueError(
                    "inplace=True with logits that overlap themselves (shape "
                    f"{list(logits.shape)}, strides {list(logits.stride())}); accepted: one "
                    "element per address"
                )
            extent = max(extent, stride * size)

    def refuse_label(
        self, labels: Tensor, given: Tensor, vocab: int, sequence: Sequence
    ) -> NoReturn:
        """The IndexError for the first bad one of the ``labels``, aligned with their rows."""
        *lead, row = (labels >= vocab).nonzero()[0].tolist()
        position = (*lead, row + sequence.shift)
        label = int(given[position])
        if 0 <= label < vocab and sequence.cu_seqlens is not None:
            self._check_offsets(sequence.cu_seqlens, given)
        raise IndexError(
            f"labels[{', '.join(map(str, position))}] is {label}; accepted: 0 to {vocab - 1} (the "
            f"logits have {vocab} columns) and ignore_index={sequence.ignore_index}"
        )


def _can_look(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) not in PLAIN:
        return False
    return x.device.type == "cpu" and not is_wrapped(x)


def _refuse_tangent(x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("irl_ops: forward-mode derivatives are not implemented")


arguments = TorchArguments()
