"""IQLearn in ms-swift: an entry of its ``loss_map``, for ``--loss_type iqlearn``.

A file for ``--external_plugins``::

    from irl_ops.integrations.swift import register

    register(lam=0.1, gamma=0.99)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Unpack

from torch import Tensor

from irl_ops.integrations.transformers.loss import IQLearnOptions, Loss, checked


def register(**options: Unpack[IQLearnOptions]) -> None:
    """Puts "iqlearn" into ms-swift's ``loss_map``; options as for ``apply_iqlearn``.

    Raises:
        TypeError, ValueError: as ``apply_iqlearn``.
    """
    from swift.loss import loss_map

    loss_map["iqlearn"] = partial(IQLearnLoss, options=checked("register", dict(options)))


class IQLearnLoss(Loss):
    """What ms-swift makes of the entry: ``loss_map[loss_type](args, trainer)``.

    Labels are not shifted yet, and the first of each document is masked by ms-swift's templates,
    which is what parts the documents of a packed batch. The loss is the sum over
    ``num_items_in_batch``, to which the trainer adds a router's loss; ``loss_scale`` are the
    weights of tokens.

    Raises:
        ValueError: ``use_logits_to_keep=True``, which drops rows between labels; sequence
            parallelism, ``enable_dft_loss``, label smoothing.
    """

    def __init__(self, args: Any, trainer: Any, *, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.args, self.trainer = args, trainer
        self.is_megatron = any(k.__name__ == "BaseMegatronTrainer" for k in type(trainer).__mro__)
        if self.is_megatron:
            raise ValueError(
                "loss_type='iqlearn' of a Megatron trainer; accepted: "
                "irl_ops.integrations.megatron.apply_iqlearn on its model"
            )
        for name, accepted in (
            ("use_logits_to_keep", (None, False)),
            ("enable_dft_loss", (None, False)),
            ("label_smoothing_factor", (None, 0)),
        ):
            if (given := getattr(args, name, None)) not in accepted:
                raise ValueError(f"{name}={given!r} with loss_type='iqlearn'; accepted: False")
        # None would become True at the first step: rows between two turns would be dropped, and
        # with them the next row of each turn's last.
        args.use_logits_to_keep = False

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Any = None,
        loss_scale: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The loss of the model's outputs."""
        template = getattr(self.trainer, "template", None)
        if (ranks := getattr(template, "sequence_parallel_size", 1)) > 1:
            raise ValueError(
                f"sequence_parallel_size={ranks} splits sequences over "
                "processes, and the TD term needs the next row; accepted: 1"
            )
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs.logits
        if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"logits={shape} with labels {list(labels.shape)}; accepted: all rows, [B, T, V]"
            )
        batch = {}
        if loss_scale is not None:  # which ms-swift has moved to the rows that score the tokens
            batch["token_weights"] = loss_scale.reshape(labels.shape).float()
        return self.compute(logits, labels, num_items_in_batch, shift=True, **batch)
