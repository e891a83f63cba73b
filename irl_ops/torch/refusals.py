"""What a backward pass refuses, rather than answer wrongly."""

from __future__ import annotations

from typing import NoReturn

import torch


def refuse_second_derivative() -> None:
    """Called in a backward pass, which runs with gradients enabled under create_graph alone."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "irl_ops: second derivatives are not implemented (create_graph=True); they would be "
            "silently zero"
        )


def refuse_second_pass() -> NoReturn:
    """Raises for a second backward pass, whose gradient the first has given away."""
    raise RuntimeError(
        "irl_ops: backward ran a second time through the same loss, whose gradient the first pass "
        "has handed over; call the loss again for another pass"
    )
