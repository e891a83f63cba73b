"""``apply_iqlearn``: the model's own loss becomes IQLearn."""

from __future__ import annotations

from typing import TypeVar, Unpack

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from irl_ops.integrations.transformers.forward import IQLearnForward, ModelLoss
from irl_ops.integrations.transformers.fused import last_layer
from irl_ops.integrations.transformers.loss import DATA_PARALLEL, IQLearnOptions, checked
from irl_ops.integrations.transformers.value_head import add_value_head

Model = TypeVar("Model", bound=torch.nn.Module)


def apply_iqlearn(
    model: Model,
    *,
    fused_linear: bool | None = None,
    value_head: bool = False,
    **iqlearn_loss_options: Unpack[IQLearnOptions],
) -> Model:
    """Makes IQLearn the loss of a language model: ``model(**batch).loss`` and all built on it.

    A decoder's labels are shifted (logits[t] scores labels[t+1]), those of an encoder-decoder are
    aligned, as in Transformers. Packed batches are understood by what marks them: ``seq_idx``,
    ``cu_seq_lens_q`` or ``position_ids``; ``shift_labels`` are taken as they come. A forward
    without labels, ``generate``, ``save_pretrained``, ``copy.deepcopy``, pickling and
    ``torch.save`` work as before. A second call replaces the options of the first.

    With labels, the forward also takes ``segment_ids``, ``token_weights``, ``where``, ``values``
    [B, T] and ``truncated`` [B] or [B, T], as ``iqlearn_loss`` does; as columns of a data set they
    pass the Trainer. With a decoder's unshifted labels, entry t belongs to the row that scores
    ``labels[t + 1]``. ``num_items_in_batch`` knows nothing of them: the Trainer counts labels.

    A router's auxiliary loss is kept. Where ``num_items_in_batch`` is given, it is weighted by the
    share of those labels that the batch has, so that it is a mean over micro-batches and processes,
    as the rest of the loss; Transformers alone adds it up.

    Call it before the model is wrapped (DDP, FSDP, ``torch.compile``), before or after PEFT. With
    packed batches outside a Trainer pass ``use_cache=False``: the attention of Transformers reads
    ``position_ids`` as packing only where it keeps no cache.

    With ``fused_linear=True`` no logits are stored in training: the loss is
    ``irl_ops.torch.linear_iqlearn_loss`` of the last layer's input and weight, computed within that
    layer's own forward, where FSDP2 and ZeRO-3 have gathered the weight. ``outputs.logits`` is then
    None. Evaluation mode and forwards without labels compute logits as before. What the model does
    with its logits is read off at every forward: scales, soft caps, and biases before them are
    passed on to the loss; anything else is refused, and so is a loss that is given other logits.

    With ``value_head=True`` the model gets a submodule ``value_head``, one number for each last
    hidden state, which is V in the TD term (A.1.1): the loss is given ``values=value_head(hidden)``
    wherever a batch holds none. It is 0 at first, trained and saved with the model, and read from
    the checkpoint again when ``from_pretrained`` and ``apply_iqlearn(model, value_head=True)``
    follow each other. Under PEFT it needs ``modules_to_save=["value_head"]``, and this call first.

    Args:
        model: a Transformers model with a language-modelling head, or a PEFT model around one. It
            is changed in place.
        fused_linear: True: no logits are stored while ``model.training``. False: they are. None:
            trainers decide, and they are stored elsewhere: in a Trainer to which an
            ``IQLearnCallback`` was attached, and in those of ``irl_ops.integrations.trl``, they are
            not, where the model allows it.
        value_head: V is that of a linear head on the last hidden state, not of the logits. A head
            that the model has stays in use when it is called again.
        **iqlearn_loss_options: ``lam``, ``gamma``, ``entropy_coef``, ``ignore_index``,
            ``eos_token_id``, ``boundary``, ``detach_next``, ``inplace`` and ``backend`` of
            ``irl_ops.torch.iqlearn_loss``, with its defaults; ``z_loss`` where it has that.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is something else, or an option is unknown or belongs to a batch.
        ValueError: an option's value, ``nn.DataParallel``, a value head after PEFT or one that the
            checkpoint has lost, or a model whose labels are neither shifted nor those of an
            encoder-decoder.
        NotImplementedError: ``fused_linear=True`` where the output embeddings are not ``nn.Linear``
            (or PEFT's ``modules_to_save`` copy of one; LoRA on it is refused), or have hooks.

    The forward then raises RuntimeError where IQLearn would not be used and nobody would notice:
    the Trainer withholds the labels (``label_smoothing_factor``, a ``compute_loss_func``), or the
    forward, or one that has taken its place, computes a loss of its own. It raises TypeError for
    what a batch holds that neither model nor loss takes, and NotImplementedError for the routers'
    losses of an encoder-decoder and for logits that ``fused_linear=True`` cannot leave out.
    """
    base = transformers_model(model)
    options = checked("apply_iqlearn", dict(iqlearn_loss_options))
    loss_type = getattr(base, "loss_type", None)
    shifts = loss_type is None or LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    if not (base.can_generate() and (base.config.is_encoder_decoder or shifts)):
        raise ValueError(
            f"model={type(base).__name__} with loss_type={loss_type!r}; accepted: models that "
            "generate and are encoder-decoders or have the loss of ForCausalLM"
        )
    if fused_linear:
        last_layer(base)
    if value_head:
        add_value_head(base)
    loss = applied_loss(base)
    if loss is None:
        loss = ModelLoss(options)
        # The Trainer asks this before it passes num_items_in_batch on.
        vars(base)["accepts_loss_kwargs"] = True
        IQLearnForward(base, loss).install()
    elif getattr(vars(base)["forward"], "__func__", None) is type(base).forward:
        # What accelerate's wrapper of a mixed-precision forward becomes when it is pickled.
        vars(base)["forward"] = vars(base)["_iqlearn"]
    loss.options, loss.fused_linear, loss.chosen = options, fused_linear, False
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
    forward: IQLearnForward | None = vars(base).get("_iqlearn")
    return None if forward is None else forward.loss
