"""IQLearn as a loss of torchtitan: ``loss=IQLearnLoss.Config(lam=0.1, eos_token_id=2)``.

``loss=LinearIQLearnLoss.Config(loss_fn=IQLearnLoss.Config(...))`` stores no logits, and takes the
place of ``ChunkedLossWrapper``.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from irl_ops.integrations.options import try_options
from irl_ops.torch import iqlearn_loss, linear_iqlearn_loss

if TYPE_CHECKING or importlib.util.find_spec("torchtitan") is None:

    class BaseLoss:
        """The shape of torchtitan's, where that is not installed."""

        @dataclass(kw_only=True, slots=True)
        class Config:
            """What ``build`` makes a loss of."""

            def build(self: Any, **kwargs: Any) -> Any:
                """The loss."""
                return IQLearnLoss(self, **kwargs)

    class ChunkedLossWrapper(BaseLoss):
        """The shape of torchtitan's, whose trainer gives it hidden states and the last layer."""

        lm_head: nn.Module | None

        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            """Of which the loss below reads ``loss_fn`` alone."""

            num_chunks: int = 8
            loss_fn: Any = None

            def build(self: Any, **kwargs: Any) -> Any:
                """The loss."""
                return LinearIQLearnLoss(self, **kwargs)

        def set_lm_head(self, lm_head: nn.Module) -> None:
            """Called once by the trainer."""
            self.lm_head = lm_head

else:
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper


class IQLearnLoss(BaseLoss):
    """Offline IQLearn in the place of ``CrossEntropyLoss``.

    Labels come shifted within their documents, and the trainer passes ``positions``: a document's
    last row has a label, and the row after it belongs to the next. Give ``eos_token_id``, or a
    document that a row cuts off counts as ended.

    It must not be the ``loss_fn`` of a ``ChunkedLossWrapper``, the default of most configurations:
    the next row is missing at each cut. ``LinearIQLearnLoss`` takes its place. Of
    logits that loss parallelism leaves as DTensors each process reads its columns. They must not be
    split along the sequence by context parallelism, which a loss cannot see.

    Raises:
        TypeError: an option's type; an input that it does not know.
        ValueError: an option's value; a batch without positions, which pipeline parallelism and
            torchtitan's validation pass on to no loss; logits of another width than ``vocab_size``.
        RuntimeError: made or called by a ``ChunkedLossWrapper``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """The options of ``irl_ops.torch.iqlearn_loss``, and two more.

        Attributes:
            vocab_size: what the logits' last axis must have; None for no check.
            without_positions: what a batch without positions is: "raise" for an error, "documents"
                where each row is one document, "nll" to leave out the TD term, so that validation
                reports the NLL.
        """

        lam: float = 0.1
        gamma: float = 1.0
        entropy_coef: float = 0.0
        z_loss: float = 0.0
        eos_token_id: int | tuple[int, ...] | None = None
        boundary: Literal["terminal", "bootstrap", "drop"] = "terminal"
        detach_next: bool = False
        backend: str = "auto"
        vocab_size: int | None = None
        without_positions: Literal["raise", "documents", "nll"] = "raise"

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        _refuse_chunks()
        self.config = config
        if config.without_positions not in ("raise", "documents", "nll"):
            raise ValueError(
                f"without_positions={config.without_positions!r}; accepted: 'raise', "
                "'documents', 'nll'"
            )
        self.options = {
            name: getattr(config, name)
            for name in (
                *("lam", "gamma", "entropy_coef", "z_loss", "eos_token_id", "boundary"),
                "detach_next",
            )
        }
        # The kernels are compiled already, so compile_config has nothing to do.
        try_options(self.options)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over ``labels`` [B, T], divided by ``global_valid_tokens`` where it is given.

        The metrics ("nll_mean", "td_mean", ...) are scaled as the loss is, so that their sum over
        micro-batches and ranks is the mean over all tokens.
        """
        _refuse_chunks()
        if inputs:
            raise TypeError(f"inputs {sorted(inputs)}; accepted: positions")
        width = self.config.vocab_size
        if width is not None and pred.shape[-1] != width:
            raise ValueError(f"pred has {pred.shape[-1]} columns; accepted: vocab_size={width}")
        options = self._call(labels, global_valid_tokens, positions)
        loss, metrics = iqlearn_loss(pred, labels, return_metrics=True, **options)
        return _scaled(loss, metrics, global_valid_tokens)

    def _call(
        self, labels: Tensor, global_valid_tokens: Tensor | None, positions: Tensor | None
    ) -> dict[str, Any]:
        """The options of a call."""
        options = dict(self.options)
        if positions is None:
            if self.config.without_positions == "raise":
                raise ValueError(
                    "positions=None: where documents start is unknown; accepted: positions [B, T], "
                    "or without_positions='documents' or 'nll' in IQLearnLoss.Config"
                )
            if self.config.without_positions == "nll":
                options |= {"lam": 0.0, "entropy_coef": 0.0, "z_loss": 0.0}
        else:
            positions = positions.expand(labels.shape)
        return options | {
            "position_ids": positions,
            "num_items": global_valid_tokens,
            "reduction": "sum" if global_valid_tokens is None else "mean",
            "backend": self.config.backend,
        }


class LinearIQLearnLoss(ChunkedLossWrapper):
    """``IQLearnLoss`` of hidden states and the last layer, whose logits are never stored.

    It stands where a configuration has ``ChunkedLossWrapper.Config(...)``, and is one of them to
    the trainer, which hands it hidden states and the last layer; chunks are cut within the loss
    (``irl_ops.torch.linear_iqlearn_loss``), where the next row is known. ``num_chunks`` is not
    read. The last layer's own forward is called, in which FSDP has gathered its weight.

    Raises:
        TypeError: ``loss_fn`` is no ``IQLearnLoss.Config``; a last layer that is no ``nn.Linear``;
            tensor-parallel hidden states or weights; an input that it does not know.
        ValueError: as ``IQLearnLoss``.
        RuntimeError: called before ``set_lm_head``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """Those of torchtitan's wrapper.

        Attributes:
            loss_fn: the options of the loss.
        """

        loss_fn: Any = field(default_factory=lambda: IQLearnLoss.Config())

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        if not isinstance(config.loss_fn, IQLearnLoss.Config):
            raise TypeError(
                f"loss_fn={type(config.loss_fn).__qualname__}; accepted: IQLearnLoss.Config(...)"
            )
        self.loss_fn = IQLearnLoss(config.loss_fn)
        self.lm_head = None

    def __call__(  # noqa: D102
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        layer = self.lm_head
        if layer is None:
            raise RuntimeError("lm_head=None; accepted: after set_lm_head(lm_head)")
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"lm_head={type(layer).__name__}; accepted: nn.Linear")
        if inputs:
            raise TypeError(f"inputs {sorted(inputs)}; accepted: positions")
        _refuse_shards("hidden states", pred)
        options = self.loss_fn._call(labels, global_valid_tokens, positions)
        width = self.loss_fn.config.vocab_size
        found: list[dict[str, Tensor]] = []

        def forward(hidden: Tensor) -> Tensor:
            _refuse_shards("the weight of lm_head", layer.weight)
            if width is not None and layer.weight.shape[0] != width:
                raise ValueError(
                    f"lm_head has {layer.weight.shape[0]} columns; accepted: vocab_size={width}"
                )
            loss: Tensor
            loss, metrics = linear_iqlearn_loss(
                hidden, layer.weight, labels, return_metrics=True, bias=layer.bias, **options
            )
            found.append(metrics)
            return loss.clone()  # FSDP hangs a hook on it, which a view would lose

        earlier = vars(layer).get("forward")
        vars(layer)["forward"] = forward
        try:
            loss = layer(pred)
        finally:
            if earlier is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = earlier
        return _scaled(loss, found[-1], global_valid_tokens)


def _scaled(
    loss: Tensor, metrics: dict[str, Tensor], global_valid_tokens: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and metrics that add up as it does."""
    tokens = metrics["tokens"]
    share = tokens if global_valid_tokens is None else tokens / global_valid_tokens
    return loss, {
        f"{name}_mean": value * share for name, value in metrics.items() if name != "tokens"
    }


def _refuse_shards(what: str, tensor: Tensor) -> None:
    if isinstance(tensor, DTensor):
        raise TypeError(
            f"{what}: a DTensor with placements {tensor.placements}; accepted: plain tensors, "
            "which tensor parallelism leaves whole without loss parallelism"
        )


def _refuse_chunks() -> None:
    """A wrapper of torchtitan's builds its inner loss, and calls it on chunks, in its own frame."""
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    for _ in range(8):  # __init__, build, its log span, the wrapper
        if frame is None:
            return
        owner = frame.f_locals.get("self")
        if isinstance(owner, LinearIQLearnLoss):
            return
        if any(kind.__name__ == "ChunkedLossWrapper" for kind in type(owner).__mro__):
            raise RuntimeError(
                "IQLearnLoss inside ChunkedLossWrapper: at each cut the next row is missing, and "
                "the loss would be another; accepted: in the place of the wrapper, "
                "loss=LinearIQLearnLoss.Config(loss_fn=IQLearnLoss.Config(...)), which stores no "
                "logits either, or loss=IQLearnLoss.Config(...)"
            )
        frame = frame.f_back  # type: ignore[assignment]
