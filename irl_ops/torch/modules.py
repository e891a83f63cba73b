"""The losses as torch.nn.Module."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from irl_ops.torch.losses import iqlearn_loss


class IQLearnLoss(torch.nn.Module):
    """Offline IQLearn with its options fixed beforehand; see ``iqlearn_loss``.

    Args:
        **options: any keyword argument of ``iqlearn_loss``. A ``lam`` or ``gamma`` given as a 0-d
            tensor may be changed in place between calls.

    Raises:
        TypeError: an option that ``iqlearn_loss`` does not have.

    Example:
        >>> loss_fn = IQLearnLoss(lam=0.1, shift=True)
        >>> loss = loss_fn(torch.randn(2, 8, 100), torch.randint(100, (2, 8)))
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        accepted = list(inspect.signature(iqlearn_loss).parameters)[2:]
        for name in options:
            if name not in accepted:
                raise TypeError(f"IQLearnLoss has no option {name!r}; accepted: {accepted}")
        self.options = options

    def forward(
        self, logits: Tensor, labels: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss; ``options`` given here take precedence, e.g. the batch's ``segment_ids``."""
        return iqlearn_loss(logits, labels, **{**self.options, **options})

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
