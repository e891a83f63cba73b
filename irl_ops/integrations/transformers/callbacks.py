"""Trainer callbacks: the metrics in the logs, the checks, and the schedule of ``lam``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from irl_ops.integrations.transformers.forward import ModelLoss
from irl_ops.integrations.transformers.fused import fits
from irl_ops.integrations.transformers.loss import (
    DATA_PARALLEL,
    IQLearnOptions,
    Loss,
    OutputsLoss,
    checked,
)
from irl_ops.integrations.transformers.model import (
    applied_loss,
    apply_iqlearn,
    transformers_model,
)
from irl_ops.torch import iqlearn_loss

if TYPE_CHECKING:
    from transformers import Trainer


class IQLearnCallback(TrainerCallback):
    """Logs "nll", "td", "value", "reward", and checks that IQLearn is what trains.

    They are means over the labelled tokens of the logging window, over all ranks, of all that
    ``iqlearn_loss`` returns as metrics; those of an evaluation have the prefix of its loss
    ("eval_nll"). They reach ``trainer.state.log_history``, the console, what ``evaluate`` and
    ``predict`` return, and ``metric_for_best_model``. The Trainer calls its reporters (TensorBoard,
    W&B) before any callback in ``callbacks=``: ``IQLearnCallback().attach(trainer)`` puts this one
    in front of them.

    Args:
        loss_func: what ``iqlearn_loss_func`` returned. None: the model is one of ``apply_iqlearn``.

    Raises:
        TypeError: another ``loss_func``.
        ValueError: when training starts, for ``label_smoothing_factor`` other than 0,
            ``nn.DataParallel``, a ``loss_func`` with ``sp_size`` above 1, a model without IQLearn,
            or ``metric_for_best_model`` of an NLL or TD term with ``greater_is_better=True``.
        RuntimeError: before an update in which IQLearn was not called.
    """

    def __init__(self, loss_func: Callable[..., Tensor] | None = None) -> None:
        if not (loss_func is None or isinstance(loss_func, OutputsLoss)):
            raise TypeError(f"loss_func={loss_func!r}; accepted: None or an iqlearn_loss_func(...)")
        self.loss_func = loss_func

    def attach(self, trainer: Trainer) -> None:
        """Puts this callback before all others of ``trainer``: reporters then see the metrics.

        Where ``apply_iqlearn`` left it open, no logits are stored in training from now on: nothing
        in a Trainer reads them. They are if it has a ``compute_loss`` of its own, compiles the
        model, or runs FSDP1 or tensor parallelism, and where the model does more with them than
        scale, cap or shift them by a bias (with a warning).

        Raises:
            ValueError: the Trainer's ``compute_loss_func`` is ``irl_ops.torch.iqlearn_loss``.
        """
        if trainer.compute_loss_func is iqlearn_loss:
            raise ValueError(
                "compute_loss_func=irl_ops.torch.iqlearn_loss takes logits, and the Trainer has "
                "outputs and num_items_in_batch; accepted: iqlearn_loss_func(...)"
            )
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        model: Any = trainer.model
        loss = None if self.loss_func is not None else loss_of(model)
        if loss is not None and loss.fused_linear is None:
            loss.choose(_reads_no_logits(trainer) and fits(transformers_model(model)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses what would train something else without a word."""
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer would smooth a "
                "cross-entropy of its own, or ignore this; accepted: 0"
            )
        if args.n_gpu > 1:
            raise ValueError(DATA_PARALLEL)
        split = getattr(args, "parallelism_config", None)
        if self.loss_func is not None and split is not None and split.sp_size > 1:
            raise ValueError(
                f"parallelism_config.sp_size={split.sp_size}, under which the Trainer calls no "
                "compute_loss_func; accepted: 1, or apply_iqlearn(model, ...)"
            )
        refuse_the_worst(args)
        loss = self._loss(kwargs["model"])
        loss.reset()
        if self.loss_func is not None:
            loss.watch_ends(getattr(kwargs["model"], "config", None))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops before an update that IQLearn had no part in."""
        loss = self._loss(kwargs["model"])
        if not loss.called:
            raise RuntimeError(
                "IQLearn was not called in this step: something trains with a loss of its own "
                "(Liger's fused cross-entropy, TRL's SFTTrainer, Unsloth, a Trainer's own "
                "compute_loss). Turn that off, or call irl_ops.torch.iqlearn_loss there"
            )
        loss.called = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the metrics to ``logs``, and to the copy that the Trainer has already stored."""
        metrics = self._metrics(logs or {}, kwargs["model"])
        if metrics:
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Adds the metrics to those that ``predict`` returns."""
        metrics.update(self._metrics(metrics, kwargs["model"]))

    def _metrics(self, logs: dict[str, Any], model: torch.nn.Module) -> dict[str, float]:
        for key in logs:
            if key.endswith("loss") and key != "train_loss":  # that sums up a finished training
                return self._loss(model).drain(key.removesuffix("loss"))
        return {}

    def _loss(self, model: torch.nn.Module) -> Loss:
        if isinstance(self.loss_func, OutputsLoss):
            return self.loss_func
        loss = loss_of(model)
        if loss is None:
            raise ValueError(
                "the model has no IQLearn loss: call apply_iqlearn(model, ...) first, or give "
                "IQLearnCallback the iqlearn_loss_func(...) that compute_loss_func has"
            )
        return loss


def loss_of(model: torch.nn.Module) -> ModelLoss | None:
    """What ``apply_iqlearn`` has put on the model inside a Trainer's wrappers."""
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

    return applied_loss(transformers_model(extract_model_from_parallel(model)))


def refuse_the_worst(args: Any) -> None:
    """The Trainer takes every metric whose name does not end in "loss" for one that should rise.

    Raises:
        ValueError: it would keep the checkpoint with the largest NLL or TD term.
    """
    name = getattr(args, "metric_for_best_model", None) or ""
    if name.endswith(("nll", "td")) and args.greater_is_better:
        raise ValueError(
            f"metric_for_best_model={name!r} with greater_is_better=True, which is the Trainer's "
            "default for it, would keep the worst checkpoint; accepted: greater_is_better=False"
        )


def _reads_no_logits(trainer: Any) -> bool:
    """Whether logits can be left out of a Trainer's steps, as far as the Trainer goes."""
    from transformers import Trainer

    accelerator = trainer.accelerator
    fsdp1 = trainer.is_fsdp_enabled and not getattr(accelerator, "is_fsdp2", False)
    plain = type(trainer).compute_loss is Trainer.compute_loss
    return plain and not (trainer.args.torch_compile or fsdp1 or trainer.get_tp_size() > 1)


class ApplyIQLearn(IQLearnCallback):
    """``apply_iqlearn`` for trainers that make the model themselves and let one give callbacks.

    It is applied to the Trainer's model when the Trainer is made, before anything wraps it, and
    what ``IQLearnCallback`` does is done as well.

    Args:
        fused_linear: as in ``apply_iqlearn``.
        **options: likewise.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``apply_iqlearn``, for options at once.
        RuntimeError: when the Trainer is made, if it will not tell the model how many labels a
            step has: each micro-batch would be a mean of its own.
    """

    def __init__(
        self, *, fused_linear: bool | None = None, **options: Unpack[IQLearnOptions]
    ) -> None:
        super().__init__()
        self.fused_linear = fused_linear
        self.options = checked("ApplyIQLearn", dict(options))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Applies the loss to the model of the new Trainer."""
        base = transformers_model(kwargs["model"])
        takes_rest = any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values()
        )
        if not getattr(base, "accepts_loss_kwargs", takes_rest):  # what the Trainer has asked
            raise RuntimeError(
                f"{type(base).__name__}.forward takes no num_items_in_batch, and the Trainer will "
                "pass none; accepted: apply_iqlearn(model, ...) before the Trainer is made"
            )
        apply_iqlearn(kwargs["model"], fused_linear=self.fused_linear, **self.options)


class LamScheduleCallback(TrainerCallback):
    """Sets ``lam`` from a schedule before every step, and logs it; nothing is compiled again.

    Args:
        lam: the 0-d floating tensor that was given as ``lam`` to ``apply_iqlearn`` or
            ``iqlearn_loss_func``.
        schedule: a function of the optimiser step, such as
            ``functools.partial(irl_ops.schedules.warmup_ramp, lam=0.1, warmup_steps=500)``.

    Raises:
        TypeError: ``lam`` is something else.
        ValueError: when training starts, the loss has another ``lam``: a number, or another tensor,
            such as the one that ``copy.deepcopy`` gives to the copy of a model.
    """

    def __init__(self, lam: Tensor, schedule: Callable[[int], float]) -> None:
        if not (isinstance(lam, Tensor) and lam.ndim == 0 and lam.is_floating_point()):
            raise TypeError(f"lam={lam!r}; accepted: the 0-d floating tensor that the loss has")
        self.lam = lam
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses to schedule, and log, a tensor that no loss reads."""
        try:
            applied = loss_of(kwargs["model"])
        except TypeError:  # not of Transformers, so with an iqlearn_loss_func
            applied = None
        losses: list[Loss] = list(OutputsLoss.alive) if applied is None else [applied]
        if not any(loss.options.get("lam") is self.lam for loss in losses):
            given = "no iqlearn_loss_func(...)" if applied is None else "not the model's loss"
            raise ValueError(
                f"lam={self.lam!r} of LamScheduleCallback is another tensor than the loss's: "
                f"{given} has it; accepted: the very tensor that apply_iqlearn(model, lam=lam) or "
                "iqlearn_loss_func(lam=lam) was given"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets ``lam`` for all micro-batches of the step."""
        self.lam.fill_(self.schedule(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds "lam", that of the last step, to the training logs."""
        if logs and "loss" in logs:
            logs["lam"] = state.log_history[-1]["lam"] = self.lam.item()
