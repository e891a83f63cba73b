"""The loss of a model in TRL's ``SFTTrainer``, which computes one of its own from hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from irl_ops.integrations.transformers import IQLearnCallback, context
from irl_ops.integrations.transformers.forward import ModelLoss
from irl_ops.integrations.transformers.fused import fits
from irl_ops.integrations.transformers.model import applied_loss, transformers_model


class IQLearnMixin:
    """Makes ``SFTTrainer``, or a subclass of it, train the loss of ``apply_iqlearn``.

    It comes first among the bases::

        class IQLearnTrainer(IQLearnMixin, SFTTrainer):
            pass

        model = apply_iqlearn(model, lam=0.1)
        trainer = IQLearnTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    All kinds of data work, packed and padding-free ones too; a ``peft_config`` as well. The loss of
    a step is the sum over its labels divided by their number, over all micro-batches and
    processes, plus a router's auxiliary loss as TRL weights it: ``router_aux_loss_coef`` times its
    mean over micro-batches and processes. An ``IQLearnCallback`` is attached, or moved to the
    front. TRL's own metrics are kept ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
    and come from the pass of the loss; a label counts as correct where no logit is larger.

    In training no logits are stored, as TRL's own loss stores none: ``outputs.logits`` is None. It
    takes ``apply_iqlearn(model, fused_linear=False)`` to keep them; they are kept as well where the
    head is no plain ``nn.Linear``, or has hooks.

    TRL's collators make a batch of tokens and labels alone. For ``token_weights`` and the other
    keys that the model takes, give a collator of your own and ``remove_unused_columns=False``.

    Raises:
        TypeError: when subclassed behind a class that computes the loss.
        ValueError: when made, for a model without ``apply_iqlearn``, a ``loss_type`` other than
            "nll", a ``compute_loss_func``, label smoothing, or sequences that are spread over
            ranks; at the first step, for padding on the left that would be trained, and for labels
            that are shifted already.
        NotImplementedError: when made, for data with images.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: D105
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        for base in order[: order.index(IQLearnMixin)]:
            if not issubclass(base, IQLearnMixin) and "compute_loss" in vars(base):
                raise TypeError(
                    f"{cls.__name__}: {base.__name__} comes before IQLearnMixin, and its loss "
                    f"would train; accepted: class {cls.__name__}(IQLearnMixin, ...)"
                )

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._check_model(model)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: the loss is that of apply_iqlearn(model, ...); accepted: None"
            )
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        context.refuse(type(self).__name__, context.sizes())
        if trainer.args.loss_type != "nll":
            raise ValueError(
                f"loss_type={trainer.args.loss_type!r} would be ignored; accepted: 'nll', in whose "
                "place IQLearn comes"
            )
        if trainer.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={trainer.args.label_smoothing_factor} would be ignored; "
                "accepted: 0"
            )
        if isinstance(trainer.data_collator, DataCollatorForVisionLanguageModeling):
            raise NotImplementedError(
                "DataCollatorForVisionLanguageModeling: images were never tried; accepted: text"
            )
        self._iqlearn = loss = self._apply()
        self._padding_seen = False
        if loss.fused_linear is None:  # only now is it known whether an adapter is on the head
            loss.choose(fits(transformers_model(trainer.model)))
        given = [c for c in trainer.callback_handler.callbacks if isinstance(c, IQLearnCallback)]
        (given[0] if given else IQLearnCallback()).attach(trainer)

    def _check_model(self, model: Any) -> None:
        """Before TRL sees the model."""
        if isinstance(model, str):
            raise ValueError(
                f"model={model!r}; accepted: a loaded model, after apply_iqlearn(model, ...), or "
                "IQLearnSFTTrainer"
            )
        if applied_loss(transformers_model(model)) is None:
            raise ValueError(
                f"model={type(model).__name__} without IQLearn; accepted: one after "
                "apply_iqlearn(model, ...), or IQLearnSFTTrainer"
            )

    def _apply(self) -> ModelLoss:
        """What ``apply_iqlearn`` has put on the model that TRL has made of the one given."""
        trainer: Any = self
        loss = applied_loss(transformers_model(trainer.model))
        assert loss is not None
        return loss

    def _check_padding(self, inputs: dict[str, Any]) -> None:
        """Once: a padding row that scores a document's first token, as Transformers has it too."""
        mask, self._padding_seen = inputs.get("attention_mask"), True
        if mask is None or mask.ndim != 2:
            return
        scored = (mask[:, 1:] != 0) & (mask[:, :-1] == 0) & (inputs["labels"][:, 1:] != -100)
        if scored.any():
            raise ValueError(
                "the batch is padded on the left, and its padding would be trained to predict the "
                "first token; accepted: padding on the right, as of TRL's collator, or a label of "
                "-100 at the first token of each document"
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, as a plain Trainer takes it, and TRL's metrics."""
        trainer: Any = self
        if not self._padding_seen:
            self._check_padding(inputs)
        inputs["use_cache"] = False
        if trainer.aux_loss_enabled:  # some models read it here alone, and not in their config
            inputs["output_router_logits"] = True
        counts: list[Tensor] = []
        self._iqlearn.router_apart = trainer.aux_loss_enabled
        self._iqlearn.observe = partial(_count, counts)
        try:
            loss, outputs = Trainer.compute_loss(
                trainer, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        finally:
            self._iqlearn.router_apart, self._iqlearn.observe = False, None
        aux_loss = None
        if trainer.aux_loss_enabled:
            aux_loss = outputs["aux_loss"]
            steps = 1 if num_items_in_batch is None else trainer.current_gradient_accumulation_steps
            loss = loss + trainer.router_aux_loss_coef * aux_loss / steps
        self._log_as_trl(inputs, counts, aux_loss)
        return (loss, outputs) if return_outputs else loss

    def _log_as_trl(
        self, inputs: dict[str, Any], counts: list[Tensor], aux_loss: Tensor | None
    ) -> None:
        trainer: Any = self
        mask = inputs.get("attention_mask")  # a padding-free batch has none, and no padding
        tokens = inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        local = [
            *torch.stack(counts).sum(0),
            (tokens if mask is None else mask.sum()).float(),
            tokens.new_zeros((), dtype=torch.float32) if aux_loss is None else aux_loss.detach(),
        ]
        gathered = trainer.accelerator.gather(torch.stack(local)[None])  # [processes, 5]
        *totals, aux_total = gathered.double().sum(0).tolist()
        labelled, entropy, correct, tokens_seen = totals
        mode = "train" if trainer.model.training else "eval"
        metrics = trainer._metrics[mode]
        metrics["entropy"].append(entropy / labelled if labelled else 0.0)
        metrics["mean_token_accuracy"].append(correct / labelled if labelled else 0.0)
        if aux_loss is not None:
            metrics["aux_loss"].append(aux_total / len(gathered))
        if mode == "train":
            trainer._total_train_tokens += int(tokens_seen) // trainer._tp_size
        metrics["num_tokens"] = [trainer._total_train_tokens]


def _count(counts: list[Tensor], metrics: dict[str, Tensor]) -> None:
    """Appends the number of labelled rows, their summed entropy, and how many labels are top."""
    labelled = metrics["tokens"]
    means = torch.stack([torch.ones_like(labelled), metrics["entropy"], metrics["accuracy"]])
    counts.append(torch.where(labelled > 0, means * labelled, 0.0))
