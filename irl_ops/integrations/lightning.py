"""IQLearn in Lightning: one object is the loss in ``training_step`` and a callback of the Trainer.

Lightning divides each loss by ``accumulate_grad_batches``, and DDP and FSDP average over processes:
a mean of means, where documents of unequal length count unequally. Here each micro-batch gives its
sum, and the gradients are divided by the number of labels just before they are clipped and used.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from irl_ops.integrations.options import try_options
from irl_ops.options import IQLearnOptions
from irl_ops.torch import iqlearn_loss


class IQLearn(Callback):  # type: ignore[misc]
    """``iqlearn_loss`` over the whole accumulated batch of all processes.

    ::

        class Model(LightningModule):
            def training_step(self, batch, index):
                return self.iqlearn(self(batch["input_ids"]), batch["labels"])

        model.iqlearn = IQLearn(lam=0.1, shift=True)
        trainer = Trainer(callbacks=[model.iqlearn], accumulate_grad_batches=4)

    With gradients the value of a call is the mean over the micro-batch's labels, to be logged; its
    gradient is that of the sum. Without, as in validation, it is the mean and no more.

    Args:
        **options: of ``irl_ops.torch.iqlearn_loss``, those that hold for a whole run.

    Attributes:
        metrics: of the last call, what ``return_metrics=True`` gives: for ``self.log_dict``.

    Raises:
        TypeError, ValueError: as ``iqlearn_loss``.
        RuntimeError: a call with gradients while no Trainer has this callback; an update without
            any call.
        NotImplementedError: DeepSpeed, whose gradients are out of reach; ``token_weights``.
    """

    def __init__(self, **options: Unpack[IQLearnOptions[Tensor]]) -> None:
        given: dict[str, Any] = dict(options)
        for name in ("reduction", "num_items"):
            if name in given:
                raise TypeError(f"IQLearn has no option {name!r}, which it decides itself")
        try_options({n: v for n, v in given.items() if not isinstance(v, Tensor)})
        self.options = given
        self.metrics: dict[str, Tensor] = {}
        self._trainer: Trainer | None = None
        self._items: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor, **batch: Any) -> Tensor:
        """The loss of a micro-batch; ``batch`` holds its ``position_ids``, ``truncated``, ..."""
        options = {**self.options, **batch}
        trainer = self._trainer
        if not (logits.requires_grad and torch.is_grad_enabled()):
            mean: Tensor
            mean, self.metrics = iqlearn_loss(logits, labels, return_metrics=True, **options)
            return mean
        if trainer is None:
            raise RuntimeError(
                "IQLearn is no callback of the Trainer, so nobody would divide the gradients; "
                "accepted: Trainer(callbacks=[it]), or irl_ops.torch.iqlearn_loss elsewhere"
            )
        if options.get("token_weights") is not None:
            raise NotImplementedError("token_weights: labels are counted here, and not weights")
        total: Tensor
        total, self.metrics = iqlearn_loss(
            logits, labels, return_metrics=True, reduction="sum", **options
        )
        items = self.metrics["tokens"]
        self._items = items if self._items is None else self._items + items
        # What is returned is divided by the steps before its gradient is taken.
        slope: Tensor = trainer.accumulate_grad_batches * (total - total.detach())
        return total.detach() / items.clamp(min=1) + slope

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the first batch of a fit, validation or test."""
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise NotImplementedError(
                "DeepSpeed keeps gradients where they cannot be divided; accepted: DDP, FSDP, or "
                "irl_ops.integrations.loops.whole_batch in a loop of one's own"
            )
        self._trainer, self._items = trainer, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the last."""
        self._trainer = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Divides the gradients by the labels, once per step, before they are clipped."""
        if self._items is None:
            raise RuntimeError(
                "IQLearn was not called in this step: something else trains; accepted: a "
                "training_step that returns self.iqlearn(logits, labels)"
            )
        items = trainer.strategy.reduce(self._items, reduce_op="sum")
        self._items = None
        scale = torch.where(items > 0, trainer.world_size / items, 0.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.to(parameter.grad.device))
