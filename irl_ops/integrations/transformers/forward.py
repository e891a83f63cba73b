"""The forward of a model whose loss is IQLearn, and what watches that it stays so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderModel, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from irl_ops.integrations.batches import check_alignment, segment_ids
from irl_ops.integrations.transformers import context
from irl_ops.integrations.transformers.fused import (
    ACCEPTED,
    LinearLogits,
    UnstoredLogits,
    input_of,
    unstored_logits,
    without_logits,
)
from irl_ops.integrations.transformers.loss import BATCH_OPTIONS, Loss
from irl_ops.integrations.transformers.value_head import NAME, values_of

# What no forward names and Transformers still understands, beside ``labels``.
EVERYWHERE = {*TransformersKwargs.__annotations__, "shift_labels", "return_dict", "use_cache"}


class ModelLoss(Loss):
    """What ``model.loss_function`` becomes.

    Attributes:
        batch: during a forward, what the model does not pass on to its loss.
        split: during a forward of a mixture, keep ``total``, to which the model adds in place.
        total: the losses of this forward, without a router's.
        router_apart: the caller adds the router's loss; the forward leaves it out of its own.
        fused_linear: forwards with labels store no logits while the model trains; None leaves that
            to a trainer.
        chosen: a trainer has said so, and takes it back where the model does more with them.
        unstored: this forward stores none.
        aligned: a batch has shown that its labels are not shifted yet.
        values: during a forward, the values of a value head, where the model has one.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.batch: dict[str, Any] | None = None
        self.split = False
        self.total: Tensor | None = None
        self.router_apart = False
        self.fused_linear: bool | None = False
        self.chosen = False
        self.unstored = False
        self.aligned = False
        self.values: Callable[[], Tensor | None] | None = None

    def choose(self, fused_linear: bool) -> None:
        """What a trainer thinks best, where the user has not said."""
        self.fused_linear, self.chosen = fused_linear, True

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The loss of a decoder."""
        batch = {"num_items": num_items_in_batch} if self.batch is None else self.batch
        shift = shift_labels is None
        given = labels if shift_labels is None else shift_labels
        loss = self.compute(logits, given, shift=shift, **batch)
        if not self.split:
            return loss
        self.total = loss if self.total is None else self.total + loss
        return loss.clone()

    def compute(
        self, logits: Tensor | LinearLogits, labels: Tensor, num_items: Any, **batch: Any
    ) -> Tensor:
        """The loss of a batch, within the last layer where that makes no logits."""
        if isinstance(logits, UnstoredLogits):
            return logits.within_layer(lambda x: self.compute(x, labels, num_items, **batch))
        if self.unstored and not isinstance(logits, LinearLogits):
            raise NotImplementedError(
                "fused_linear=True: the loss was given logits that the module of "
                f"model.get_output_embeddings() has not made; {ACCEPTED}"
            )
        if self.values is not None and batch.get("values") is None:
            batch["values"] = self.values()
        return super().compute(logits, labels, num_items, **batch)


def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``model.forward`` as a function of the model, for those who wrap that and bind it again."""
    return vars(self)["_iqlearn"](*args, **kwargs)


class IQLearnForward:
    """What ``model.forward`` becomes: an object, so that a pickled model finds its class again.

    It keeps the signature, which Trainer and ``generate`` read, and adds what the loss takes from a
    batch, so that the Trainer keeps such columns. It has no ``__wrapped__``, along which accelerate
    unwraps models: IQLearn would be gone.
    """

    __func__ = staticmethod(forward)  # accelerate looks for it, as in a method

    def __init__(self, model: PreTrainedModel, loss: ModelLoss) -> None:
        self.model = model
        self.loss = loss
        self.running = 0
        self.ran = False
        self.earlier = vars(model).get("forward")  # of another patch; the class's where None
        self.names = list(inspect.signature(model.forward).parameters)
        self.known = frozenset(EVERYWHERE).union(
            *(
                inspect.signature(kind.forward).parameters
                for kind in {type(module) for module in model.modules()}
                if issubclass(kind, PreTrainedModel)  # they hand on what they do not name
            )
        )

    def install(self) -> None:
        """Puts this in the place of the model's forward, and watches over it."""
        vars(self.model).update(_iqlearn=self, forward=self)
        self.model.register_forward_pre_hook(self.before, with_kwargs=True)
        self.model.register_forward_hook(self.after, with_kwargs=True)
        if self.model.base_model is not self.model:
            self.model.base_model.register_forward_pre_hook(self.before_backbone)

    @property
    def __signature__(self) -> inspect.Signature:  # noqa: D105
        signature = inspect.signature(self.earlier or type(self.model).forward)
        parameters = list(signature.parameters.values())
        if self.earlier is None:
            del parameters[0]  # self
        rest = parameters[-1:] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        own = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
            for n in BATCH_OPTIONS
        ]
        parameters = [*parameters[: len(parameters) - len(rest)], *own, *rest]
        return signature.replace(parameters=parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, with IQLearn as their loss where there are labels."""
        inputs = dict(**self._positional(args), **kwargs)
        num_items = inputs.pop("num_items_in_batch", None)
        batch = {name: inputs.pop(name) for name in BATCH_OPTIONS if name in inputs}
        self.running += 1
        self.ran = True
        try:
            if inputs.get("labels") is None:
                if num_items is not None:
                    raise RuntimeError(
                        "the Trainer withheld the labels from the model, so it would not train "
                        "IQLearn; accepted: label_smoothing_factor=0, and no compute_loss_func "
                        "beside apply_iqlearn"
                    )
                return self._inner(**inputs)
            for name in inputs:
                if name not in self.known:
                    raise TypeError(
                        f"{type(self.model).__name__} with IQLearn takes no {name!r}; accepted: "
                        f"what its forward takes, and {', '.join(BATCH_OPTIONS)}"
                    )
            batch = {name: value for name, value in batch.items() if value is not None}
            batch["num_items"] = num_items
            self.loss.unstored = bool(self.loss.fused_linear) and self.model.training
            if not self.loss.unstored:
                return self._with_labels(inputs, batch)
            try:
                with unstored_logits(self.model):
                    return without_logits(self._with_labels(dict(inputs), dict(batch)))
            except NotImplementedError as error:
                if not self.loss.chosen:
                    raise
                warnings.warn(
                    f"the logits of {type(self.model).__name__} are stored after all: {error}",
                    stacklevel=2,
                )
                self.loss.fused_linear = self.loss.unstored = False
                return self._with_labels(inputs, batch)
        finally:
            self.running -= 1
            self.loss.unstored = False

    def _with_labels(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        run = self._aligned if self.model.config.is_encoder_decoder else self._shifted
        with self._value_head():
            return run(inputs, batch)

    def _positional(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names[: len(args)], args, strict=True))

    @contextmanager
    def _value_head(self) -> Iterator[None]:
        """While it lasts, the loss can ask for the values of the states that it is computed of."""
        if getattr(self.model, NAME, None) is None:
            yield
            return
        layer: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        with input_of(layer) as seen:
            self.loss.values = lambda: values_of(self.model, seen[0])
            try:
                yield
            finally:
                self.loss.values = None

    def _inner(self, **inputs: Any) -> Any:
        if self.earlier is not None:
            return self.earlier(**inputs)
        return type(self.model).forward(self.model, **inputs)

    # ---------------------------------------------------------------------------------------------
    # Decoders, and encoder-decoders
    # ---------------------------------------------------------------------------------------------

    def _shifted(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        """A decoder: it calls ``model.loss_function``, and adds a router's loss to that."""
        loss = self.loss
        part = context.part_of(inputs["labels"], self.model.training)
        if part is not None:
            batch = {name: part.local(x) for name, x in batch.items()}
        batch["part"] = part
        if "segment_ids" not in batch:
            batch["segment_ids"] = (
                segment_ids(inputs) if part is None else context.segment_ids(inputs, part)
            )
        ids = inputs.get("input_ids")
        told = part is not None or inputs.get("shift_labels") is not None
        if not (loss.aligned or told) and isinstance(ids, Tensor):
            check_alignment(
                ids,
                inputs["labels"].to(ids.device),
                shift=True,
                ignore_index=loss.options.get("ignore_index", -100),
            )
            loss.aligned = True
        config = self.model.config.get_text_config()
        routes = inputs.get("output_router_logits")
        if routes is None:
            routes = getattr(config, "output_router_logits", False)
        loss.split = bool(routes) and (loss.router_apart or batch["num_items"] is not None)
        loss.called, loss.total, loss.batch = False, None, batch
        try:
            outputs = self._inner(**inputs)
        finally:
            loss.batch, total, loss.total = None, loss.total, None
        self._check_called()
        if not loss.split or total is None:
            return outputs
        if not loss.router_apart:
            # The caller adds up micro-batches and processes, whose share of the labels sums to 1.
            total = total + loss.share * (outputs[0] - total)
        if isinstance(outputs, tuple):
            return (total, *outputs[1:])
        outputs["loss"] = total
        return outputs

    def _aligned(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        """An encoder-decoder: most compute a loss inline, so the labels are kept from it."""
        model = self.model
        labels = inputs.pop("labels")
        return_dict = inputs.pop("return_dict", None)
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = False
        if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
            prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is not None:
                # a copy: FSMT's fills what is ignored in place, and would train the padding
                decoder_ids = inputs["decoder_input_ids"] = prepare(labels=labels.clone())
                masked = inputs.get("decoder_attention_mask") is not None
                if isinstance(model, EncoderDecoderModel) and not masked:  # as its forward does
                    mask = decoder_ids != model.config.pad_token_id
                    inputs["decoder_attention_mask"] = mask.to(decoder_ids.dtype)
            else:  # the forward alone knows how; the loss it computes on the way is thrown away
                inputs["labels"] = labels.clone()
        outputs = self._inner(**inputs, return_dict=True)
        if any(key.endswith("router_logits") for key in outputs):
            raise NotImplementedError(
                f"output_router_logits=True with {type(model).__name__}: the routers' losses of an "
                "encoder-decoder would be dropped; accepted: False"
            )
        total = self.loss.compute(outputs.logits, labels, shift=False, **batch)
        outputs = type(outputs)(**{**outputs, "loss": total})
        if return_dict is None:
            return_dict = model.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    # ---------------------------------------------------------------------------------------------
    # The watch: others replace the forward as well, and compute a loss of their own
    # ---------------------------------------------------------------------------------------------

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the model, which runs whatever has become of its forward."""
        if self._labels(args, kwargs) is not None:
            self.loss.called = self.ran = False

    def after(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """The model was given labels: have they reached IQLearn?"""
        if self._labels(args, kwargs) is not None:
            self._check_called()

    def before_backbone(self, backbone: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """PEFT calls ``model.forward`` itself, around the hooks; a backbone has its own."""
        tuned = getattr(self.model, "peft_config", None) is not None
        if not tuned or self.running or not (backbone.training and torch.is_grad_enabled()):
            return
        inner = vars(self.model).get("forward")
        while inner is not None and inner is not self and inner is not forward:
            inner = getattr(inner, "__func__", getattr(inner, "__wrapped__", None))
        if inner is None:
            self._refuse()

    def _labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs.get("labels", self._positional(args).get("labels"))

    def _check_called(self) -> None:
        if not (self.loss.called and self.ran):
            self._refuse()

    def _refuse(self) -> None:
        raise RuntimeError(
            f"{type(self.model).__name__}.forward computes a loss of its own and does not call "
            "model.loss_function, so it would not train IQLearn. TRL's SFTTrainer and Liger's "
            "fused cross-entropy replace a forward in this way: put "
            "irl_ops.integrations.trl.IQLearnMixin before SFTTrainer, turn Liger's loss off"
        )
