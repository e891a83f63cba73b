"""IQLearn as a loss of torchtune 0.6: ``loss: {_component_: ...torchtune.IQLearnLoss}``."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

import irl_ops.torch
from irl_ops.integrations.options import try_options
from irl_ops.options import IQLearnOptions


class IQLearnLoss(irl_ops.torch.IQLearnLoss):
    """Offline IQLearn in the place of ``CEWithChunkedOutputLoss``, on the whole logits.

    Recipes shift the labels, put an ignored one behind each row, flatten rows and logits to
    ``[B T]`` and ``[B T, V]``, and multiply the mean by the number of labels; so this is the mean.
    They read ``ignore_index``. Labels end at each ignored one, which parts the flattened rows.

    Positions never reach a loss of torchtune: in packed data the first token of a document must be
    no label, as in data sets that mask prompts (``train_on_input: False``).

    Args:
        **options: of ``irl_ops.torch.iqlearn_loss``, those that hold for a whole run.

    Raises:
        TypeError: an option that the loss does not have or that recipes decide (``shift``,
            ``reduction``, ``num_items``); logits in chunks.
        ValueError: an option's value; at the first call, labels that no recipe has shifted.
    """

    def __init__(self, **options: Unpack[IQLearnOptions[Tensor]]) -> None:
        for name in ("shift", "reduction", "num_items"):
            if name in options:
                raise TypeError(f"IQLearnLoss has no option {name!r}, which torchtune decides")
        super().__init__(**options)
        try_options(dict(options))
        self._seen = False

    def forward(self, logits: Tensor | list[Tensor], labels: Tensor, **unused: Any) -> Tensor:
        """The mean over the labelled rows of logits [N, V] and labels [N]."""
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"logits={type(logits).__name__} of {len(logits)} chunks: at each cut the next row "
                "is missing; accepted: a tensor [N, V], from a model without output chunks"
            )
        if not self._seen and not torch.compiler.is_compiling():
            self._seen = True
            if labels.flatten()[-1].item() != self.ignore_index:
                raise ValueError(
                    f"labels[-1]={labels.flatten()[-1].item()}: recipes of torchtune shift labels "
                    f"and put {self.ignore_index} behind them; accepted: labels shifted so"
                )
        loss = super().forward(logits, labels)
        assert isinstance(loss, Tensor)
        return loss
