"""``apply_iqlearn``: the model's own loss becomes IQLearn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from irl_ops.integrations.transformers.loss import DATA_PARALLEL, Loss, checked

Model = TypeVar("Model", bound=torch.nn.Module)


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

    Call it before the model is wrapped (DDP, FSDP, ``torch.compile``), before or after PEFT. With
    packed batches outside a Trainer pass ``use_cache=False``: the attention of Transformers reads
    ``position_ids`` as packing only where it keeps no cache.

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
        ValueError: an option's value, ``nn.DataParallel``, or a model whose labels are neither
            shifted nor those of an encoder-decoder.
        NotImplementedError: ``fused_linear=True``.

    The forward then raises RuntimeError where IQLearn would not be used and nobody would notice:
    the Trainer withholds the labels (``label_smoothing_factor``, a ``compute_loss_func``), or the
    forward computes a loss of its own. It raises NotImplementedError for the routers' losses of an
    encoder-decoder.
    """
    if fused_linear:
        raise NotImplementedError(
            "fused_linear=True comes with irl_ops 0.3.0; accepted: False, which computes the logits"
        )
    base = transformers_model(model)
    options = checked("apply_iqlearn", iqlearn_loss_options)
    loss_type = getattr(base, "loss_type", None)
    shifts = loss_type is None or LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    if not (base.can_generate() and (base.config.is_encoder_decoder or shifts)):
        raise ValueError(
            f"model={type(base).__name__} with loss_type={loss_type!r}; accepted: models that "
            "generate and are encoder-decoders or have the loss of ForCausalLM"
        )
    loss = applied_loss(base)
    if loss is None:
        loss = ModelLoss(options)
        # The Trainer asks accepts_loss_kwargs before it passes num_items_in_batch on.
        vars(base).update(_iqlearn=loss, forward=_patched(base), accepts_loss_kwargs=True)
    loss.options = options
    loss.watch_ends(base.config)
    base.loss_function = loss
    return model


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The model itself, or the one inside a PEFT model, whose attributes its wrapper only reads."""
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError(DATA_PARALLEL)
    get_base_model = getattr(model, "get_base_model", None)
    base = model if get_base_model is None else get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model={type(model).__name__}; accepted: a Transformers PreTrainedModel or a PEFT "
            "model around one, before DDP, FSDP or torch.compile wrap it"
        )
    return base


def applied_loss(base: PreTrainedModel) -> ModelLoss | None:
    """What ``apply_iqlearn`` has put on the model."""
    return vars(base).get("_iqlearn")


class ModelLoss(Loss):
    """What ``model.loss_function`` becomes; ``batch`` is what a forward does not pass on to it."""

    batch: tuple[Any, Tensor | None] | None = None  # num_items and segment_ids, during a forward

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
        num_items, segments = self.batch or (num_items_in_batch, None)
        if segments is not None:
            segments = segments.to(logits.device)
        shift = shift_labels is None
        given = labels if shift_labels is None else shift_labels
        return self.compute(logits, given, num_items, shift=shift, segment_ids=segments)


def _patched(model: PreTrainedModel) -> MethodType:
    """The forward with IQLearn as its loss, as a method, so that a deepcopy binds its own.

    The signature is kept: Trainer and ``generate`` read it. ``functools.wraps`` would also set
    ``__wrapped__``, along which accelerate unwraps models, and IQLearn would be gone.
    """
    forward = model.forward
    unbound = getattr(forward, "__func__", None) or (lambda self, **inputs: forward(**inputs))
    signature = inspect.signature(forward)
    names = list(signature.parameters)

    def iqlearn_forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(**dict(zip(names[: len(args)], args, strict=True)), **kwargs)
        num_items = inputs.pop("num_items_in_batch", None)
        if inputs.get("labels") is not None:
            run = _aligned if self.config.is_encoder_decoder else _shifted
            return run(self, partial(unbound, self), inputs, num_items)
        if num_items is not None:
            raise RuntimeError(
                "the Trainer withheld the labels from the model, so it would not train IQLearn; "
                "accepted: label_smoothing_factor=0, and no compute_loss_func beside apply_iqlearn"
            )
        return unbound(self, **inputs)

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [this, *signature.parameters.values()]
    vars(iqlearn_forward)["__signature__"] = signature.replace(parameters=parameters)
    return MethodType(iqlearn_forward, model)


def _shifted(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], num_items: Any
) -> Any:
    """A decoder: its forward calls ``model.loss_function``, and adds a router's loss to that."""
    loss: ModelLoss = vars(model)["_iqlearn"]
    loss.called, loss.batch = False, (num_items, segment_ids(inputs))
    try:
        outputs = forward(**inputs)
    finally:
        loss.batch = None
    if not loss.called:
        raise RuntimeError(
            f"{type(model).__name__}.forward computes a loss of its own and does not call "
            "model.loss_function, so it would not train IQLearn. Liger's fused cross-entropy and "
            "TRL's SFTTrainer replace the forward in this way"
        )
    return outputs


def _aligned(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], num_items: Any
) -> Any:
    """An encoder-decoder: most compute a cross-entropy inline, so the labels are kept from it."""
    loss: ModelLoss = vars(model)["_iqlearn"]
    labels = inputs.pop("labels")
    return_dict = inputs.pop("return_dict", None)
    if inputs.get("use_cache") is None:
        inputs["use_cache"] = False
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None:
            inputs["decoder_input_ids"] = prepare(labels=labels)
        else:  # the forward alone knows how; the loss it computes on the way is thrown away
            inputs["labels"] = labels
    outputs = forward(**inputs, return_dict=True)
    if any(key.endswith("router_logits") for key in outputs):
        raise NotImplementedError(
            f"output_router_logits=True with {type(model).__name__}: the routers' losses of an "
            "encoder-decoder would be dropped; accepted: False"
        )
    total = loss.compute(outputs.logits, labels, num_items, shift=False)
    outputs = type(outputs)(**{**outputs, "loss": total})
    if return_dict is None:
        return_dict = model.config.return_dict
    return outputs if return_dict else outputs.to_tuple()


def segment_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """What marks the documents of a packed batch, as ids [B, T]; None if nothing does.

    Positions that do not increase by one start a document, but not beside padding: a left-padded
    row has positions 1 1 1 0 1 2, and in Transformers its last padding predicts the first token.
    """
    labels, mask, seq_idx = inputs["labels"], inputs.get("attention_mask"), inputs.get("seq_idx")
    if isinstance(seq_idx, Tensor):
        return seq_idx
    if (ends := inputs.get("cu_seq_lens_q")) is not None:
        rows = torch.arange(labels.shape[-1], device=ends.device, dtype=ends.dtype)
        return torch.searchsorted(ends[1:].contiguous(), rows, right=True)[None]
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2:  # 3-d: time, height and width, for images
        return None
    starts = positions.diff() != 1
    if mask is not None and mask.ndim == 2:
        starts = starts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return torch.nn.functional.pad(starts.cumsum(-1), (1, 0)).expand(labels.shape[0], -1)
