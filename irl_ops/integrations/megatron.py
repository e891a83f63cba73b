"""IQLearn in Megatron-Core: the per-token loss of a ``GPTModel``, in Megatron-LM, Bridge and NeMo.

In the model provider, around the model that is returned::

    return apply_iqlearn(model, lam=0.1, eos_token_id=tokenizer.eod, vocab_size=50257)
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, TypeVar, Unpack

import torch
from torch import Tensor

from irl_ops.integrations.batches import check_alignment, segment_ids
from irl_ops.integrations.options import try_options
from irl_ops.options import IQLearnOptions
from irl_ops.torch import iqlearn_loss

Model = TypeVar("Model", bound=torch.nn.Module)

# What the model is given with each batch, or what Megatron's loss function does afterwards.
DECIDED = (
    *("shift", "where", "segment_ids", "position_ids", "cu_seqlens", "truncated", "ignore_index"),
    *("token_weights", "num_items", "reduction", "next_values", "values", "inplace"),
    *("vocab_group", "vocab_start", "sequence_group", "sequence_order"),
)


def apply_iqlearn(
    model: Model,
    *,
    vocab_size: int | None = None,
    without_loss_mask: Literal["raise", "all"] = "raise",
    **options: Unpack[IQLearnOptions[Tensor]],
) -> Model:
    """Makes IQLearn what ``compute_language_model_loss`` of a ``GPTModel`` returns, token by token.

    Megatron multiplies the result [B, S] by its ``loss_mask``, adds it up and divides it, by
    ``calculate_per_token_loss`` over the whole batch or else over each micro-batch; a row's TD term
    belongs to that row, so this is right for it as for cross-entropy. Labels come shifted. What
    the method is not given is taken from the model's own ``forward``: ``loss_mask`` (rows outside
    it have no label), ``packed_seq_params`` or ``position_ids`` (which rows are neighbours).

    Documents of a pre-training data set follow each other without new positions: give
    ``eos_token_id``, or a bootstrap runs on into the next.

    Under tensor parallelism each process reads its own columns, as with Megatron's cross-entropy.

    Args:
        model: a ``GPTModel``, before Megatron wraps it; changed in place. A pipeline stage without
            the last layer is left as it is.
        vocab_size: the columns of the logits that are tokens; those beyond, by which Megatron pads
            the vocabulary, are left out of V. None: all.
        without_loss_mask: what a forward without ``loss_mask`` is: "raise" for an error, "all"
            where every label counts.
        **options: of ``irl_ops.torch.iqlearn_loss``, those that hold for a whole run.

    Returns:
        The model.

    Raises:
        TypeError: an option that belongs to a batch, or that Megatron decides.
        ValueError: an option's value; at the first step, labels that are not shifted.
        NotImplementedError: context parallelism, multi-token prediction, tensor parallelism with
            gathered logits.
        RuntimeError: a forward with labels in which IQLearn was not called.
    """
    for name in DECIDED:
        if name in options:
            raise TypeError(f"apply_iqlearn has no option {name!r}, which Megatron decides")
    try_options({name: v for name, v in options.items() if not isinstance(v, Tensor)})
    if without_loss_mask not in ("raise", "all"):
        raise ValueError(f"without_loss_mask={without_loss_mask!r}; accepted: 'raise', 'all'")
    config: Any = model.config
    if getattr(config, "context_parallel_size", 1) > 1:
        raise NotImplementedError(
            f"context_parallel_size={config.context_parallel_size}: each process has a part of the "
            "rows; accepted: 1"
        )
    if getattr(config, "mtp_num_layers", None):
        raise NotImplementedError(
            f"mtp_num_layers={config.mtp_num_layers}: the heads that predict further tokens would "
            "get the TD term; accepted: None"
        )
    if getattr(model, "post_process", True):
        loss = TokenLoss(model, dict(options), vocab_size, without_loss_mask)
        if getattr(config, "tensor_model_parallel_size", 1) > 1:
            loss.vocab_group = _group(model)
        vars(model)["compute_language_model_loss"] = loss
        vars(model)["forward"] = loss.forward
    return model


def _group(model: Any) -> Any:
    """The processes that have the other columns of the logits."""
    if not getattr(model, "parallel_output", True):
        raise NotImplementedError(
            "parallel_output=False with tensor parallelism: each process has all logits, and would "
            "differentiate them anew; accepted: parallel_output=True"
        )
    return model.pg_collection.tp


class TokenLoss:
    """What ``model.compute_language_model_loss`` becomes.

    Attributes:
        batch: during a forward, its arguments.
        vocab_group: the processes of tensor parallelism, or None.
    """

    def __init__(
        self, model: Any, options: dict[str, Any], vocab_size: int | None, without_mask: str
    ) -> None:
        self.inner = model.forward
        self.signature = inspect.signature(self.inner)
        self.options, self.vocab_size, self.without_mask = options, vocab_size, without_mask
        self.batch: dict[str, Any] | None = None
        self.vocab_group: Any = None
        self.called = self.aligned = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, whose arguments the loss needs."""
        batch = self.signature.bind(*args, **kwargs).arguments
        self.batch, self.called = batch, False
        try:
            outputs = self.inner(*args, **kwargs)
        finally:
            self.batch = None
        if batch.get("labels") is not None and not self.called:
            raise RuntimeError(
                "the model computed a loss without compute_language_model_loss, so it would not "
                "train IQLearn; accepted: a GPTModel whose forward calls it"
            )
        return outputs

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss of each token [B, S], of shifted labels [B, S] and logits [S, B, V]."""
        if self.batch is None:
            raise RuntimeError(
                "compute_language_model_loss was called outside the model's forward, where nobody "
                "knows its loss_mask; accepted: model(..., labels=..., loss_mask=...)"
            )
        self.called = True
        mask = self.batch.get("loss_mask")
        if mask is None and self.without_mask == "raise":
            raise ValueError(
                "loss_mask=None: which labels count is unknown, and the TD term reads the next "
                "row; accepted: model(..., loss_mask=loss_mask), or without_loss_mask='all'"
            )
        where = None if mask is None else mask.reshape(labels.shape) != 0
        self._check_alignment(labels, where)
        logits = logits.transpose(0, 1)  # a view, which the kernels read as it is
        parallel = {}
        if self.vocab_group is not None:  # padding is behind the last columns of all
            parallel = {"vocab_group": self.vocab_group, "vocab_size": self.vocab_size}
        elif self.vocab_size is not None:
            if not 0 < self.vocab_size <= logits.shape[-1]:
                raise ValueError(
                    f"logits of {logits.shape[-1]} columns; accepted: at least vocab_size="
                    f"{self.vocab_size}"
                )
            logits = logits[..., : self.vocab_size]
        loss = iqlearn_loss(
            logits,
            labels,
            where=where,
            segment_ids=self._segments(labels),
            reduction="none",
            **parallel,
            **self.options,
        )
        assert isinstance(loss, Tensor)
        return loss

    def _segments(self, labels: Tensor) -> Tensor | None:
        assert self.batch is not None
        packed = self.batch.get("packed_seq_params")
        if packed is None:
            return segment_ids({"labels": labels, "position_ids": self.batch.get("position_ids")})
        padded = packed.cu_seqlens_q_padded  # where documents lie, if they do not touch
        ends = packed.cu_seqlens_q if padded is None else padded
        return segment_ids({"labels": labels, "cu_seq_lens_q": ends.to(labels.device)})

    def _check_alignment(self, labels: Tensor, where: Tensor | None) -> None:
        assert self.batch is not None
        ids = self.batch.get("input_ids")
        if self.aligned or ids is None:
            return
        given = labels if where is None else labels.masked_fill(~where, -100)
        check_alignment(ids, given, shift=False)
        self.aligned = True
