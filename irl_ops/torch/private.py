"""What this package takes from inside torch, which may rename it: here, and only here."""

from __future__ import annotations

from typing import Any

import torch

_functorch: Any = getattr(torch._C, "_functorch", None)
_is_tracked: Any = getattr(_functorch, "is_gradtrackingtensor", None)
_is_wrapped: Any = getattr(_functorch, "is_functorch_wrapped_tensor", None)
_transforms_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)


def differentiated_by_func(x: torch.Tensor) -> bool:
    """Whether a ``torch.func`` transform differentiates by ``x``; False where torch cannot tell.

    Then ``torch.func`` itself refuses the autograd function of a loss, in words of its own.
    """
    return False if _is_tracked is None else bool(_is_tracked(x))


def is_wrapped(x: torch.Tensor) -> bool:
    """Whether a transform of torch.func stands between ``x`` and its memory.

    Where torch cannot tell, nothing is taken for wrapped, and reading the memory of what is raises.
    """
    return False if _is_wrapped is None else bool(_is_wrapped(x))


def within_transform() -> bool:
    """Whether a transform of torch.func is at work here, in compiled programs too.

    Where torch cannot tell, an operator without a rule for it raises.
    """
    return False if _transforms_active is None else bool(_transforms_active())
