"""Which arguments the linear losses accept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from irl_ops.jax.arguments import JaxArguments
from irl_ops.jax.chunks import Chunk, Layer
from irl_ops.jax.linear_loss import Form
from irl_ops.options import LAYER

CHUNK = 1024  # rows; a chunk's logits are a sixteenth of those of 16384


class Given(NamedTuple):
    """The layer of one call, checked."""

    layer: Layer
    form: Form
    logits: Any  # their shape and dtype


class LinearArguments(JaxArguments):
    """The checks for logits that are never there."""

    def check_logits(self, logits: Any, labels: Any) -> None:
        """The labels of rows; the layer was checked before."""
        self._check_array("labels", labels, self.integers)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; accepted: {list(logits.shape[:-1])}, the "
                "shape of hidden without its last axis"
            )

    def layer(self, hidden: Any, weight: Any, options: dict[str, Any]) -> Given:
        """The layer; takes its options out of the others."""
        bias, chunk, accumulate = (options.pop(name, default) for name, default in LAYER.items())
        self._check_array("hidden", hidden, self.floats)
        self._check_array("weight", weight, (hidden.dtype,))
        if hidden.ndim < 2 or 0 in hidden.shape:
            raise ValueError(
                f"hidden has shape {list(hidden.shape)}; accepted: [..., T, D], no axis of 0"
            )
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
            raise ValueError(
                f"weight has shape {list(weight.shape)}; accepted: [V, {hidden.shape[-1]}], with "
                "hidden's last axis"
            )
        if bias is not None:
            self._check_array("bias", bias, (hidden.dtype,))
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"bias has shape {list(bias.shape)}; accepted: [{weight.shape[0]}], one per "
                    "row of weight"
                )
        whole = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk > 0
        if chunk is not None and not whole:
            raise ValueError(f"chunk_size is {chunk!r}; accepted: an int of 1 or more, None")
        if self.is_array(accumulate):
            raise TypeError(
                "accumulate is an array, which JAX cannot add to in place; accepted: 'float32', "
                "'weight', None"
            )
        if accumulate not in (None, "float32", "weight"):
            raise ValueError(f"accumulate is {accumulate!r}; accepted: 'float32', 'weight', None")
        logits = jax.ShapeDtypeStruct((*hidden.shape[:-1], weight.shape[0]), hidden.dtype)  # type: ignore[no-untyped-call]
        self.check_wide("hidden", hidden)
        rows = math.prod(hidden.shape[:-1])
        form = Form(Chunk(min(chunk or CHUNK, rows)), accumulate or "float32", "auto")
        return Given(Layer(hidden, weight, bias), form, logits)

    def drop_rows(self, options: dict[str, Any]) -> bool:
        """Whether chunks that nobody needs are left out; takes the option out of the others."""
        given: bool | None = options.pop("drop_rows", None)
        self.check_choice_or_none(drop_rows=given)
        return given is not False


arguments = LinearArguments()
