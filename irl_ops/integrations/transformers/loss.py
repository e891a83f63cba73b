"""``iqlearn_loss`` as Transformers calls losses, with running metrics."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.profiler import record_function

from irl_ops.integrations.options import try_options
from irl_ops.integrations.transformers.context import Part, part_of, refuse, share_of, sizes
from irl_ops.integrations.transformers.fused import LinearLogits
from irl_ops.integrations.transformers.ranges import LOSS
from irl_ops.torch import iqlearn_loss


class IQLearnOptions(TypedDict, total=False):
    """The options of ``irl_ops.torch.iqlearn_loss`` that hold for a whole run."""

    lam: float | Tensor
    gamma: float | Tensor
    entropy_coef: float | Tensor
    z_loss: float | Tensor
    ignore_index: int
    eos_token_id: int | Sequence[int] | None
    boundary: Literal["terminal", "bootstrap", "drop"]
    detach_next: bool
    inplace: bool
    backend: str


OPTIONS = [
    name
    for name in IQLearnOptions.__annotations__
    if name in inspect.signature(iqlearn_loss).parameters
]

# The options that belong to a batch and that a forward takes beside its own, in the labels' shape
# [B, T] ("truncated" also [B]). The rest says itself what it is (``shift``), or has another name in
# Transformers (``position_ids``, ``cu_seqlens``, ``num_items``).
BATCH_OPTIONS = ("segment_ids", "token_weights", "truncated", "where", "values")

DATA_PARALLEL = (
    "nn.DataParallel (n_gpu > 1 in one process) would scale the loss by n_gpu; accepted: one "
    "process for each GPU (torchrun), or one visible GPU"
)


def iqlearn_loss_func(
    *, shift: bool = True, **options: Unpack[IQLearnOptions]
) -> Callable[..., Tensor]:
    """A ``compute_loss_func`` for the Trainer; the model stays as it is.

    It sees logits and labels and nothing else: packed documents are told apart by the labels alone,
    so each document's first label must be -100. Label smoothing and a router's auxiliary loss do
    not reach it. ``apply_iqlearn`` knows more.

    Args:
        shift: True for decoders. False for encoder-decoders, whose collator must then provide
            ``decoder_input_ids`` (``DataCollatorForSeq2Seq(tokenizer, model=model)``), and for
            labels that were shifted beforehand.
        **options: as for ``apply_iqlearn``.

    Returns:
        ``f(outputs, labels, num_items_in_batch=None)``, the loss as a 0-d float32 tensor:
        sum / num_items_in_batch (a number, or a tensor that holds it once or repeats it), or the
        mean over the labelled rows where that is None.

    Raises:
        TypeError: an unknown option, or one that belongs to a batch.
        ValueError: an option's value. The function itself raises it for the outputs of an
            encoder-decoder with ``shift=True``, for those with a router's auxiliary loss, and
            without logits or labels.
    """
    return OutputsLoss(shift, checked("iqlearn_loss_func", dict(options)))


def checked(caller: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options``, once the loss has accepted their values on two rows."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{caller} has no option {name!r}; accepted: {' '.join(OPTIONS)}")
    plain = {
        name: value
        for name, value in options.items()
        if name not in ("inplace", "backend") and not isinstance(value, Tensor)  # device-bound
    }
    try_options(plain)
    return options


class Loss:
    """``iqlearn_loss`` with its options, and sums of its metrics that stay on the device.

    Attributes:
        observe: called with the metrics of each loss, the entropy among them.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.observe: Callable[[dict[str, Tensor]], None] | None = None
        self.called = False
        self.share: Tensor | None = None  # of the labels in num_items, that the batch has
        self._names: list[str] = []
        self._sums: dict[bool, Tensor] = {}  # by whether gradients were recorded
        self._masked_ends: list[int] = []

    def compute(
        self, logits: Tensor | LinearLogits, labels: Tensor, num_items: Any, **batch: Any
    ) -> Tensor:
        """The loss of a batch; ``batch`` holds its ``shift`` and what ``BATCH_OPTIONS`` names.

        With a ``part`` of ``irl_ops.integrations.transformers.context`` it is what this rank
        returns of the loss of the whole; None says that the rows are whole.
        """
        if "part" not in batch and part_of(labels, torch.is_grad_enabled()) is not None:
            refuse("a loss that is told nothing of it", sizes())
        part: Part | None = batch.pop("part", None)
        if isinstance(num_items, Tensor):
            # The Trainer repeats the number, [n_gpu, 1], for the GPUs of an nn.DataParallel.
            if num_items.ndim > 1 and torch.accelerator.device_count() > 1:
                raise ValueError(DATA_PARALLEL)
            num_items = num_items.to(logits.device).flatten()[0]
        labels = labels.to(logits.device)  # a model spread over devices has its head elsewhere
        whole = part is None  # a part of a sequence may well hold no end
        if self._masked_ends and whole and not torch.compiler.is_compiling():
            self._warn_of_masked_ends(labels)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.to(logits.device)
        batch |= self.options | {"num_items": num_items}
        if part is not None:
            batch |= part.options
        coef = batch.get("entropy_coef", 0.0)
        no_term = not isinstance(coef, Tensor) and coef == 0
        if self.observe is not None and no_term:
            # computed in the same pass, since the 0 of a tensor is not looked at
            batch["entropy_coef"] = torch.zeros((), device=logits.device)
        loss: Tensor
        with record_function(LOSS):
            if isinstance(logits, LinearLogits):
                loss, metrics = logits.iqlearn_loss(labels, **batch)
            else:
                loss, metrics = iqlearn_loss(logits, labels, return_metrics=True, **batch)
        self.called = True
        if num_items is not None:
            tokens = metrics["tokens"]
            self.share = torch.where(tokens > 0, tokens / num_items, 0.0)
            if part is not None:
                self.share = self.share / part.ranks
        if self.observe is not None:
            self.observe(metrics)
        self._record({k: v for k, v in metrics.items() if not (no_term and k == "entropy")})
        return loss if part is None else share_of(loss, part, summed=num_items is not None)

    def _record(self, metrics: dict[str, Tensor]) -> None:
        tokens = metrics.pop("tokens")
        self._names = list(metrics)
        means = torch.stack([*metrics.values(), torch.ones_like(tokens)])
        sums = torch.where(tokens > 0, means * tokens, 0.0)
        training = torch.is_grad_enabled()
        if training in self._sums:
            sums = self._sums[training] + sums
        self._sums[training] = sums

    def drain(self, prefix: str) -> dict[str, float]:
        """The means since the last call, of training ("") or of an evaluation ("eval_")."""
        sums = self._sums.pop(prefix == "", None)
        if sums is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, tokens = sums.tolist()
        if tokens == 0:
            return {}
        named = zip(self._names, totals, strict=True)
        return {prefix + name: total / tokens for name, total in named}

    def reset(self) -> None:
        """Forgets what was recorded."""
        self.called = False
        self._sums.clear()

    def watch_ends(self, config: Any) -> None:
        """Looks once for end tokens in the labels, if padding with one may have masked them all."""
        ends = self.options.get("eos_token_id")
        if ends is None:
            ends = getattr(config, "eos_token_id", None)
        ids = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        self._masked_ends = ids if getattr(config, "pad_token_id", None) in ids else []

    def _warn_of_masked_ends(self, labels: Tensor) -> None:
        ends, self._masked_ends = self._masked_ends, []  # once: it waits for the device
        if not torch.isin(labels, torch.tensor(ends, device=labels.device)).any():
            warnings.warn(
                f"the labels hold no end token ({ends}), and pad_token_id is one: masking the "
                "padding has masked the ends as well, so the model does not learn to stop, and the "
                "TD term takes the token before for the last one. Use a pad token of its own, or "
                "mask labels by attention_mask",
                stacklevel=3,
            )


class OutputsLoss(Loss):
    """What ``iqlearn_loss_func`` returns.

    Attributes:
        alive: all of them, for callbacks, which do not see the Trainer's ``compute_loss_func``.
    """

    alive: ClassVar[weakref.WeakSet[OutputsLoss]] = weakref.WeakSet()

    def __init__(self, shift: bool, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.shift = shift
        self.alive.add(self)

    def __call__(
        self, outputs: Mapping[str, Any], labels: Tensor | None, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of the model's outputs."""
        if labels is None:
            raise ValueError("labels=None; accepted: the labels of the batch")
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):  # Unsloth has an object that stands for none
            raise ValueError(
                f"outputs={type(outputs).__name__} without logits; accepted: a ModelOutput with "
                "them, which a fused loss (Liger, Unsloth) leaves out where it sees labels"
            )
        if self.shift and "encoder_last_hidden_state" in outputs:
            raise ValueError(
                "shift=True with the outputs of an encoder-decoder, whose labels are aligned; "
                "accepted: iqlearn_loss_func(shift=False, ...)"
            )
        for key in outputs:
            if key.endswith(("aux_loss", "z_loss")):
                raise ValueError(
                    f"outputs.{key}: a router's loss would be dropped; accepted: "
                    "apply_iqlearn(model, ...), which keeps it, or output_router_logits=False"
                )
        part = part_of(labels, training=logits.requires_grad)
        return self.compute(logits, labels, num_items_in_batch, part=part, shift=self.shift)
