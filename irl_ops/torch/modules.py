"""The losses as torch.nn.Module."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from irl_ops.options import DEFAULTS, names_in, refuse, signature
from irl_ops.torch.forward import Loss
from irl_ops.torch.linear import linear_iqlearn_loss
from irl_ops.torch.losses import iqlearn_loss
from irl_ops.torch.options import IQLearnOptions, LinearIQLearnOptions


class IQLearnLoss(torch.nn.Module):
    """Offline IQLearn with its options fixed beforehand; see ``iqlearn_loss``.

    Args:
        return_metrics: whether calls return ``(loss, metrics)``.
        **options: any other keyword argument of ``iqlearn_loss``. A ``lam`` or ``gamma`` given as a
            0-d tensor may be changed in place between calls.

    Attributes:
        options: what was given.
        ignore_index: the label of rows that carry none; some trainers read it.

    Raises:
        TypeError: an option that ``iqlearn_loss`` does not have.

    Example:
        >>> loss_fn = IQLearnLoss(lam=0.1, shift=True)
        >>> loss = loss_fn(torch.randn(2, 8, 100), torch.randint(100, (2, 8)))
    """

    @signature(IQLearnOptions)
    def __init__(
        self, *, return_metrics: bool = False, **options: Unpack[IQLearnOptions[Tensor]]
    ) -> None:
        super().__init__()
        unknown = [name for name in options if name not in names_in(IQLearnOptions)]
        if unknown:
            refuse("IQLearnLoss", unknown, IQLearnOptions)
        self.options: dict[str, Any] = dict(options)
        self.return_metrics = return_metrics

    @property
    def ignore_index(self) -> int:
        """The label of rows that carry none."""
        ignored: int = self.options.get("ignore_index", DEFAULTS["ignore_index"])
        return ignored

    def forward(self, logits: Tensor, labels: Tensor, **options: Any) -> Loss:
        """The loss; ``options`` given here take precedence, e.g. the batch's ``segment_ids``."""
        merged = {"return_metrics": self.return_metrics, **self.options, **options}
        loss: Loss = iqlearn_loss(logits, labels, **merged)
        return loss

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LinearIQLearnLoss(torch.nn.Module):
    """``linear_iqlearn_loss`` with its options fixed beforehand; otherwise as ``IQLearnLoss``.

    Args:
        return_metrics: whether calls return ``(loss, metrics)``.
        **options: any other keyword argument of ``linear_iqlearn_loss``.

    Attributes:
        options: what was given.
        ignore_index: the label of rows that carry none.

    Raises:
        TypeError: an option that ``linear_iqlearn_loss`` does not have.

    Example:
        >>> loss_fn = LinearIQLearnLoss(lam=0.1, shift=True)
        >>> hidden, weight = torch.randn(2, 8, 16), torch.randn(100, 16)
        >>> loss = loss_fn(hidden, weight, torch.randint(100, (2, 8)))
    """

    @signature(LinearIQLearnOptions)
    def __init__(
        self, *, return_metrics: bool = False, **options: Unpack[LinearIQLearnOptions[Tensor]]
    ) -> None:
        super().__init__()
        unknown = [name for name in options if name not in names_in(LinearIQLearnOptions)]
        if unknown:
            refuse("LinearIQLearnLoss", unknown, LinearIQLearnOptions)
        self.options: dict[str, Any] = dict(options)
        self.return_metrics = return_metrics

    @property
    def ignore_index(self) -> int:
        """The label of rows that carry none."""
        ignored: int = self.options.get("ignore_index", DEFAULTS["ignore_index"])
        return ignored

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Loss:
        """The loss; ``options`` given here take precedence, such as the layer's ``bias``."""
        merged = {"return_metrics": self.return_metrics, **self.options, **options}
        loss: Loss = linear_iqlearn_loss(hidden, weight, labels, **merged)
        return loss

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
