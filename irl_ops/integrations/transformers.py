"""IQLearn in Hugging Face Transformers: models, ``Trainer``, and their logs.

The model's own loss becomes IQLearn, in a Trainer and in a plain loop alike::

    model = apply_iqlearn(model, lam=0.1)
    Trainer(model, args, train_dataset=data, callbacks=[IQLearnCallback()]).train()

``iqlearn_loss_func`` is for a model that should stay as it is. Both give sum / num_items_in_batch
where the Trainer counts the labels of the whole accumulated batch over all ranks, and the mean over
the labelled rows where nobody does. ``eval_loss`` is then the training loss too: the perplexity is
exp(eval_nll), which ``IQLearnCallback`` logs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_callback import TrainerCallback

from irl_ops.torch import iqlearn_loss

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["IQLearnCallback", "LamScheduleCallback", "apply_iqlearn", "iqlearn_loss_func"]

Model = TypeVar("Model", bound=torch.nn.Module)

# The options of iqlearn_loss that hold for a whole run; the others belong to a batch.
OPTIONS = (
    "lam",
    "gamma",
    "entropy_coef",
    "ignore_index",
    "eos_token_id",
    "boundary",
    "detach_next",
    "inplace",
    "backend",
)


# ---------------------------------------------------------------------------------- public calls


def apply_iqlearn(
    model: Model, *, fused_linear: bool = False, **iqlearn_loss_options: Any
) -> Model:
    """Makes IQLearn the loss of a language model: ``model(**batch).loss`` and all built on it.

    A decoder's labels are shifted (logits[t] scores labels[t+1]), those of an encoder-decoder are
    aligned, as in Transformers. Packed batches are understood by what marks them: ``seq_idx``,
    ``cu_seq_lens_q`` or ``position_ids``; ``shift_labels`` are taken as they come. A router's
    auxiliary loss is kept. A forward without labels, ``generate``, ``save_pretrained`` and
    ``copy.deepcopy`` work as before; pickling the whole model does not. A second call replaces the
    options of the first.

    Call it before the model is wrapped (DDP, FSDP, ``torch.compile``), before or after PEFT.

    Args:
        model: a Transformers model with a language-modelling head, or a PEFT model around one. It
            is changed in place.
        fused_linear: reserved for the release 0.3.0.
        **iqlearn_loss_options: ``lam``, ``gamma``, ``entropy_coef``, ``ignore_index``,
            ``eos_token_id``, ``boundary``, ``detach_next``, ``inplace`` and ``backend`` of
            ``irl_ops.torch.iqlearn_loss``, with its defaults.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is something else, or an option is unknown or belongs to a batch.
        ValueError: an option's value, or a model whose labels are neither shifted nor those of an
            encoder-decoder.
        NotImplementedError: ``fused_linear=True``.

    The patched forward raises RuntimeError where IQLearn would silently not be used: the labels
    were withheld from the model (label smoothing, another ``compute_loss_func``), or its forward
    computes a loss of its own.
    """
    if fused_linear:
        raise NotImplementedError(
            "fused_linear=True comes with irl_ops 0.3.0; leave it out to compute the logits"
        )
    base = _transformers_model(model)
    options = _checked("apply_iqlearn", iqlearn_loss_options)
    loss_type = getattr(base, "loss_type", None)
    shifts = loss_type is None or LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    if not (base.config.is_encoder_decoder or shifts):
        raise ValueError(
            f"model={type(base).__name__} has loss_type={loss_type!r}; accepted: encoder-decoders "
            "and models with the loss of ForCausalLM"
        )
    if not base.can_generate():
        raise TypeError(f"model={type(base).__name__}; accepted: models that can generate")

    loss = base.__dict__.get("_iqlearn")
    if loss is None:
        loss = base._iqlearn = _ModelLoss()
        base.forward = _patched(base.forward, base)
        base.accepts_loss_kwargs = True  # the Trainer asks before it passes num_items_in_batch
    loss.options = options
    loss.watch_eos(base.config)
    base.loss_function = loss
    return model


def iqlearn_loss_func(*, shift: bool = True, **options: Any) -> Callable[..., Tensor]:
    """A ``compute_loss_func`` for the Trainer; the model stays as it is.

    It sees logits and labels and nothing else: packed documents are told apart by the labels alone,
    so each document's first label must be -100. Prefer ``apply_iqlearn``.

    Args:
        shift: True for decoders. False for encoder-decoders, whose collator must then provide
            ``decoder_input_ids`` (``DataCollatorForSeq2Seq(tokenizer, model=model)``), and for
            labels that were shifted beforehand.
        **options: as for ``apply_iqlearn``.

    Returns:
        ``f(outputs, labels, num_items_in_batch=None)``, the loss as a 0-d float32 tensor:
        sum / num_items_in_batch, or the mean over labelled rows where that is None.

    Raises:
        TypeError, ValueError: as ``apply_iqlearn`` for the options. The function itself raises
            ValueError for the outputs of an encoder-decoder with ``shift=True``, for a router's
            auxiliary loss, which it would drop, and without logits or labels.
    """
    return _OutputsLoss(shift, _checked("iqlearn_loss_func", options))


class IQLearnCallback(TrainerCallback):
    """Logs "nll", "td", "value", "reward" (and "entropy"), and checks that IQLearn is what trains.

    They are means over the labelled tokens of the logging window, over all ranks; those of an
    evaluation are prefixed as ``eval_loss`` is. They reach ``trainer.state.log_history``, the
    console, what ``evaluate`` and ``predict`` return, and ``metric_for_best_model``. The Trainer
    calls its reporters (TensorBoard, W&B) before any callback in ``callbacks=``; ``attach`` puts
    this one in front of them.

    Args:
        loss_func: what ``iqlearn_loss_func`` returned. None: the model is one of ``apply_iqlearn``.

    Raises:
        TypeError: another ``loss_func``.

    Raises at the start of training, ValueError: ``label_smoothing_factor`` other than 0,
    ``nn.DataParallel``, sequences split over ranks, a model without IQLearn. Before the first
    update, RuntimeError: IQLearn was never called.
    """

    def __init__(self, loss_func: Callable[..., Tensor] | None = None) -> None:
        if not (loss_func is None or isinstance(loss_func, _Loss)):
            raise TypeError(f"loss_func={loss_func!r}; accepted: None or an iqlearn_loss_func(...)")
        self.loss_func = loss_func

    def attach(self, trainer: Trainer) -> None:
        """Puts this callback before the others of ``trainer``, so that reporters see the metrics."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuses what would train something else without a word."""
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer would smooth "
                "its own cross-entropy and leave IQLearn out; accepted: 0"
            )
        if args.n_gpu > 1:
            raise ValueError(_DATA_PARALLEL)
        split = getattr(args, "parallelism_config", None)
        if split is not None and (split.cp_size > 1 or split.sp_size > 1):
            raise ValueError(
                f"parallelism_config: cp_size={split.cp_size}, sp_size={split.sp_size} split "
                "sequences over ranks, and the TD term needs the next row; accepted: 1"
            )
        loss = self._loss(kwargs["model"])
        loss.called, loss.sums = False, {}
        if isinstance(loss, _OutputsLoss):
            loss.watch_eos(kwargs["model"].config)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raises before an update that IQLearn had no part in."""
        loss = self._loss(kwargs["model"])
        if not loss.called:
            raise RuntimeError(
                "IQLearn was never called in this step: something trains with a loss of its own "
                "(Liger's fused cross-entropy, TRL's SFTTrainer, Unsloth, a subclass's "
                "compute_loss). Turn that off, or call irl_ops.torch.iqlearn_loss there"
            )
        loss.called = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics to ``logs``, and to the copy that the Trainer has already stored."""
        logs = logs or {}
        for key in logs:
            if key.endswith("loss") and key != "train_loss":  # which sums up a finished training
                metrics = self._loss(kwargs["model"]).drain(key.removesuffix("loss"))
                logs.update(metrics)
                state.log_history[-1].update(metrics)
                break

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Adds the metrics to those that ``predict`` returns."""
        for key in metrics:
            if key.endswith("_loss"):
                metrics.update(self._loss(kwargs["model"]).drain(key.removesuffix("loss")))
                break

    def _loss(self, model: torch.nn.Module) -> _Loss:
        loss = self.loss_func
        if loss is None:
            from accelerate.utils import extract_model_from_parallel

            model = extract_model_from_parallel(model)
            loss = _transformers_model(model).__dict__.get("_iqlearn")
        if not isinstance(loss, _Loss):
            raise ValueError(
                "the model has no IQLearn loss: call apply_iqlearn(model, ...) first, or pass "
                "loss_func, what compute_loss_func= got from iqlearn_loss_func(...)"
            )
        return loss


class LamScheduleCallback(TrainerCallback):
    """Sets ``lam`` from a schedule before every step, and logs it; nothing is traced again.

    Args:
        lam: the 0-d floating tensor that was given as ``lam`` to ``apply_iqlearn`` or
            ``iqlearn_loss_func``.
        schedule: a function of the optimiser step, such as
            ``functools.partial(irl_ops.schedules.warmup_ramp, lam=0.1, warmup_steps=500)``.

    Raises:
        TypeError: ``lam`` is something else.
    """

    def __init__(self, lam: Tensor, schedule: Callable[[int], float]) -> None:
        if not (isinstance(lam, Tensor) and lam.ndim == 0 and lam.is_floating_point()):
            raise TypeError(
                f"lam={lam!r}; accepted: the 0-d floating tensor that the loss was given"
            )
        self.lam = lam
        self.schedule = schedule

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sets ``lam`` for all micro-batches of the step."""
        self.lam.fill_(self.schedule(state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds "lam", the last step's, to the training logs."""
        if logs and "loss" in logs:
            logs["lam"] = state.log_history[-1]["lam"] = self.lam.item()


# ------------------------------------------------------------------------------------ the losses

_DATA_PARALLEL = (
    "nn.DataParallel (n_gpu > 1 in one process) scales the loss of a batch by n_gpu; accepted: one "
    "process a GPU (torchrun), or one visible GPU"
)


class _Loss:
    """``iqlearn_loss`` with its options, and sums of its metrics that stay on the device."""

    options: dict[str, Any]

    def __init__(self) -> None:
        self.called = False
        self.names: list[str] = []
        self.sums: dict[bool, Tensor] = {}  # by whether gradients were recorded
        self.masked_eos: list[int] = []

    def compute(self, logits: Tensor, labels: Tensor, num_items: Any, **batch: Any) -> Tensor:
        """The loss of a batch; ``batch`` holds its ``shift`` and ``segment_ids``."""
        if isinstance(num_items, Tensor):
            if num_items.ndim > 1 or num_items.numel() != 1:  # how the Trainer spreads it over GPUs
                raise ValueError(_DATA_PARALLEL)
            num_items = num_items.to(logits.device).reshape(())
        labels = labels.to(
            logits.device
        )  # the head of a model spread over devices may lie elsewhere
        if self.masked_eos and not torch.compiler.is_compiling():
            self._warn_of_masked_eos(labels)
        loss, metrics = iqlearn_loss(
            logits, labels, num_items=num_items, return_metrics=True, **batch, **self.options
        )
        self.called = True
        self._record(dict(metrics))
        return loss

    def _record(self, metrics: dict[str, Tensor]) -> None:
        tokens = metrics.pop("tokens")
        self.names = list(metrics)
        means = torch.stack([*metrics.values(), torch.ones_like(tokens)])
        sums = torch.where(tokens > 0, means * tokens, 0.0)
        training = torch.is_grad_enabled()
        if training in self.sums:
            sums = self.sums[training] + sums
        self.sums[training] = sums

    def drain(self, prefix: str) -> dict[str, float]:
        """The means since the last call, of training ("") or of an evaluation ("eval_")."""
        sums = self.sums.pop(prefix == "", None)
        if sums is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, tokens = sums.tolist()
        if tokens == 0:
            return {}
        named = zip(self.names, totals, strict=True)
        return {prefix + name: total / tokens for name, total in named}

    def watch_eos(self, config: Any) -> None:
        """Remembers the end tokens if padding with one of them may have masked them all."""
        eos = self.options.get("eos_token_id")
        if eos is None:
            eos = config.eos_token_id
        ids = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        self.masked_eos = ids if config.pad_token_id in ids else []

    def _warn_of_masked_eos(self, labels: Tensor) -> None:
        ends, self.masked_eos = self.masked_eos, []  # once: looking at labels waits for the device
        if not torch.isin(labels, torch.tensor(ends, device=labels.device)).any():
            warnings.warn(
                f"the labels of this batch hold no end token ({ends}), and pad_token_id is one: "
                "masking the padding has masked the ends too, so the model never learns to stop "
                "and the TD term takes the token before for the last. Use a pad token of its own, "
                "or mask by attention_mask",
                stacklevel=3,
            )


class _ModelLoss(_Loss):
    """What ``model.loss_function`` becomes. ``batch`` carries what the forward does not pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: tuple[Any, Tensor | None] | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        num_items, segment_ids = self.batch or (num_items_in_batch, None)
        self.batch = None
        aligned = labels if shift_labels is None else shift_labels
        return self.compute(
            logits, aligned, num_items, shift=shift_labels is None, segment_ids=segment_ids
        )


class _OutputsLoss(_Loss):
    """What ``iqlearn_loss_func`` returns."""

    def __init__(self, shift: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.shift = shift
        self.options = options

    def __call__(
        self, outputs: Mapping[str, Any], labels: Tensor | None, num_items_in_batch: Any = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("labels=None; accepted: the labels of the batch")
        if not isinstance(outputs, Mapping) or outputs.get("logits") is None:
            raise ValueError(
                f"outputs without logits ({type(outputs).__name__}); accepted: a "
                "ModelOutput that holds logits"
            )
        if self.shift and "encoder_last_hidden_state" in outputs:
            raise ValueError(
                "shift=True with the outputs of an encoder-decoder, whose labels are aligned; "
                "accepted: iqlearn_loss_func(shift=False, ...)"
            )
        routers = [key for key in outputs if key.endswith(("aux_loss", "z_loss"))]
        if routers:
            raise ValueError(
                f"outputs.{routers[0]}: the router's loss would be dropped; accepted: "
                "apply_iqlearn(model, ...), which keeps it, or output_router_logits=False"
            )
        return self.compute(outputs["logits"], labels, num_items_in_batch, shift=self.shift)


# ------------------------------------------------------------------------------- the forward pass


def _patched(forward: Callable[..., Any], model: PreTrainedModel) -> MethodType:
    """``forward`` with IQLearn as its loss, bound to the model, so that a deepcopy binds its own.

    It has the same signature, which Trainer and ``generate`` read. ``functools.wraps`` would do
    that, but also set ``__wrapped__``, and accelerate unwraps along it: IQLearn would be gone.
    """
    unbound = getattr(forward, "__func__", None) or (lambda self, **inputs: forward(**inputs))
    signature = inspect.signature(forward)
    names = list(signature.parameters)

    def iqlearn_forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(**dict(zip(names[: len(args)], args, strict=True)), **kwargs)
        num_items = inputs.pop("num_items_in_batch", None)
        if inputs.get("labels") is not None:
            run = _aligned if self.config.is_encoder_decoder else _shifted
            return run(self, functools.partial(unbound, self), inputs, num_items)
        if num_items is not None:
            raise RuntimeError(
                "the Trainer withheld the labels from the model, so IQLearn is not what it trains; "
                "accepted: label_smoothing_factor=0, and no compute_loss_func beside apply_iqlearn"
            )
        return unbound(self, **inputs)

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    iqlearn_forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[this, *signature.parameters.values()]
    )
    return MethodType(iqlearn_forward, model)


def _shifted(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], num_items: Any
) -> Any:
    """A decoder: its forward calls ``model.loss_function``, and adds a router's loss to it."""
    loss: _ModelLoss = model._iqlearn
    loss.batch = (num_items, _segment_ids(inputs))
    try:
        outputs = forward(**inputs)
        called = loss.batch is None
    finally:
        loss.batch = None
    if not called:
        raise RuntimeError(
            f"{type(model).__name__}.forward computes a loss of its own and never called "
            "model.loss_function, so IQLearn is not what it trains. Liger's fused cross-entropy "
            "and TRL's SFTTrainer replace the forward in this way"
        )
    return outputs


def _aligned(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], num_items: Any
) -> Any:
    """An encoder-decoder: most compute a cross-entropy inline, so the labels are kept from it."""
    labels = inputs.pop("labels")
    return_dict = inputs.pop("return_dict", None)
    if inputs.get("use_cache") is None:
        inputs["use_cache"] = False
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        else:  # the forward alone knows how; its own loss is thrown away
            inputs["labels"] = labels
    outputs = forward(**inputs, return_dict=True)
    if any(key.endswith("router_logits") for key in outputs):
        raise NotImplementedError(
            f"output_router_logits=True with {type(model).__name__}: the routers' losses of an "
            "encoder-decoder would be dropped; accepted: False"
        )
    loss = model._iqlearn.compute(outputs.logits, labels, num_items, shift=False)
    outputs = type(outputs)(**{**outputs, "loss": loss})
    if return_dict is None:
        return_dict = model.config.return_dict
    return outputs if return_dict else outputs.to_tuple()


def _segment_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """What marks the documents of a packed batch, as ids [B, T]; None if nothing does.

    Positions that do not increase by one start a document, but not beside padding: left-padded rows
    have positions 1 1 1 0 1 2, and the padding's label is the first token's in Transformers.
    An attention mask that counts documents (1 1 1 2 2 0) marks them as well.
    """
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    if (seq_idx := inputs.get("seq_idx")) is not None:
        return torch.as_tensor(seq_idx)
    if (ends := inputs.get("cu_seq_lens_q")) is not None:
        rows = torch.arange(labels.shape[-1], device=ends.device, dtype=ends.dtype)
        return torch.searchsorted(ends[1:].contiguous(), rows, right=True)[None]
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2:  # 3-d: one axis each for time, height and width
        return None
    starts = positions.diff() != 1
    if mask is not None and mask.ndim == 2:
        starts = ((mask.diff() != 0) | starts) & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return torch.nn.functional.pad(starts.cumsum(-1), (1, 0)).expand(labels.shape[0], -1)


# ----------------------------------------------------------------------------------- the arguments


def _transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError(_DATA_PARALLEL)
    # PEFT's wrapper hands its attributes down but not up: the loss belongs on the model inside.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model={type(model).__name__}; accepted: a Transformers PreTrainedModel or a PEFT "
            "model around one, before DDP, FSDP or torch.compile wrap it"
        )
    return base


def _checked(caller: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options``, once the loss has accepted their values on two rows."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{caller} has no option {name!r}; accepted: {', '.join(OPTIONS)}")
    plain = {
        name: value
        for name, value in options.items()
        if name not in ("inplace", "backend") and not isinstance(value, Tensor)  # device-bound
    }
    iqlearn_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long), **plain)
    return options
