"""``SFTTrainer`` that trains IQLearn, with the options in its configuration."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from trl import SFTTrainer

from irl_ops.integrations.transformers import LamScheduleCallback, apply_iqlearn
from irl_ops.integrations.transformers.forward import ModelLoss
from irl_ops.integrations.transformers.model import applied_loss, transformers_model
from irl_ops.integrations.trl.config import IQLearnConfig
from irl_ops.integrations.trl.mixin import IQLearnMixin
from irl_ops.schedules import warmup_ramp


class IQLearnSFTTrainer(IQLearnMixin, SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with offline IQLearn in the place of its NLL, and the same arguments.

    ``model`` may be a name, a model or a PEFT model, as there; ``apply_iqlearn`` is called on it
    here, with the options of ``args``. What the trainer computes and refuses: see ``IQLearnMixin``.

    Args:
        model: as in ``SFTTrainer``, without ``apply_iqlearn``.
        args: an ``IQLearnConfig``. None: its defaults.
        *others, **named: the other arguments of ``SFTTrainer``.

    Raises:
        TypeError: ``args`` is something else.
        ValueError: ``apply_iqlearn`` was called on the model before; and as ``IQLearnMixin``.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "iqlearn"]
    _name = "IQLearn"

    def __init__(
        self, model: Any, args: IQLearnConfig | None = None, *others: Any, **named: Any
    ) -> None:
        if args is None:
            args = IQLearnConfig("iqlearn")
        if not isinstance(args, IQLearnConfig):
            raise TypeError(
                f"args={type(args).__name__}, which has no lam; accepted: IQLearnConfig(...), or "
                "IQLearnMixin with a model after apply_iqlearn(model, ...)"
            )
        super().__init__(model, args, *others, **named)

    def _check_model(self, model: Any) -> None:
        if not isinstance(model, str) and applied_loss(transformers_model(model)) is not None:
            raise ValueError(
                f"model={type(model).__name__} after apply_iqlearn, whose options those of args "
                "would replace; accepted: the model without, or IQLearnMixin"
            )

    def _apply(self) -> ModelLoss:
        trainer: Any = self
        args: IQLearnConfig = trainer.args
        options = args.loss_options()
        if args.lam_warmup_steps or args.lam_ramp_steps:
            lam = options["lam"] = torch.zeros((), device=args.device)
            schedule = partial(
                warmup_ramp,
                lam=args.lam,
                warmup_steps=args.lam_warmup_steps,
                ramp_steps=args.lam_ramp_steps,
            )
            trainer.add_callback(LamScheduleCallback(lam, schedule))
        apply_iqlearn(trainer.model, fused_linear=args.fused_linear, **options)
        trainer.model_accepts_loss_kwargs = True  # which was asked of the model before this
        return super()._apply()
