"""A forward that hands its logits to a function, and returns what that makes of them.

``model(**inputs, read=f)`` returns ``f(readout)``: called inside the outermost module's forward, so
that DDP and FSDP see the loss's parameters used there. Hooks do it, which leave the forward as it
is: for a call without ``read``, and for ``generate``, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.profiler import record_function

import irl_ops.torch as irl
from irl_ops.integrations.transformers.fused import (
    LinearLogits,
    UnstoredLogits,
    input_of,
    last_layer,
    unstored_logits,
)
from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.integrations.transformers.ranges import LOSS
from irl_ops.integrations.transformers.value_head import values_of


class Readout(NamedTuple):
    """What a forward ends in: logits [B, T, V], stored or not, and the states they are made of."""

    logits: Tensor | LinearLogits
    hidden: Tensor  # [B, T, D]
    values: Tensor | None = None  # [B, T], of a value head

    def __call__(
        self, name: str, labels: Tensor, *more: Tensor, temperature: float = 1.0, **options: Any
    ) -> Any:
        """The function of that name in ``irl_ops.torch`` or its linear twin, of q / temperature."""
        logits = self.logits
        if isinstance(logits, LinearLogits):
            twin: Callable[..., Any] = getattr(irl, f"linear_{name}")
            scale, cap = logits.layer["logit_scale"], logits.layer["softcap"]
            bent = {
                "bias": logits.layer["bias"],
                "logit_scale": scale / temperature,
                "softcap": None if cap is None else cap / temperature,
            }
            labels = labels.to(logits.hidden.device)
            with record_function(LOSS):
                return twin(logits.hidden, logits.weight, labels, *more, **bent, **options)
        dense: Callable[..., Any] = getattr(irl, name)
        labels = labels.to(logits.device)
        with record_function(LOSS):
            return dense(logits, labels, *more, logit_scale=1 / temperature, **options)


Read = Callable[[Readout], Any]


class Reader:
    """The hooks; ``Reader(model).attach()`` before DDP or FSDP wraps the model.

    Args:
        model: a Transformers model, or a PEFT model around one.
        fused_linear: no logits are stored where they are read; ``generate`` has them as before.

    Raises:
        NotImplementedError: ``fused_linear`` with a last layer that is no plain ``nn.Linear``, or a
            mixture of experts whose routers' loss would be dropped.
    """

    def __init__(self, model: torch.nn.Module, fused_linear: bool) -> None:
        self.model, self.base = model, transformers_model(model)
        self.fused_linear = fused_linear
        if fused_linear:
            last_layer(self.base)
        if getattr(self.base.config.get_text_config(), "output_router_logits", False):
            raise NotImplementedError(
                "model.config.output_router_logits=True: the routers' loss would be dropped; "
                "accepted: False"
            )
        self.read: Read | None = None
        self.during: ExitStack | None = None

    def attach(self) -> None:
        """Registers the hooks."""
        self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.read = kwargs.pop("read", None)
        if self.read is not None:
            kwargs["use_cache"] = False
            self.during = ExitStack()
            layer = cast(Any, self.base).get_output_embeddings()
            self.seen = self.during.enter_context(input_of(layer))
            if self.fused_linear:
                self.during.enter_context(unstored_logits(self.base))
        return args, kwargs

    def _after(self, model: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        if self.during is not None:
            self.during.close()
        read, self.read, self.during = self.read, None, None
        if read is None or outputs is None:  # None: the forward has raised
            return outputs
        logits = outputs["logits"]
        if isinstance(logits, UnstoredLogits):
            return logits.within_layer(lambda x: read(self._readout(x, x.hidden)))
        return read(self._readout(logits, self.seen.pop()))

    def _readout(self, logits: Tensor | LinearLogits, hidden: Tensor) -> Readout:
        return Readout(logits, hidden, values_of(self.base, hidden))
