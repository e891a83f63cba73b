"""What this package takes from inside torch, which may rename it: here, and only here."""

from __future__ import annotations

from typing import Any

import torch

_functorch: Any = getattr(torch._C, "_functorch", None)
_is_tracked: Any = getattr(_functorch, "is_gradtrackingtensor", None)


def differentiated_by_func(x: torch.Tensor) -> bool:
    """Whether a ``torch.func`` transform differentiates by ``x``; False where torch cannot tell.

    Then ``torch.func`` itself refuses the autograd function of a loss, in words of its own.
    """
    return False if _is_tracked is None else bool(_is_tracked(x))
