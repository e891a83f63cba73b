"""Which arguments the linear losses accept, as torch tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from irl_ops.options import LAYER
from irl_ops.torch.arguments import TorchArguments


class Layer(NamedTuple):
    """q = softcap tanh(scale x / softcap), x = hidden weight^T + bias; and the chunks' form.

    ``scale`` and ``softcap`` are those of the call's ``Readout``, which is read with its others.
    """

    hidden: Tensor  # [..., T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    chunk: int  # rows
    accumulate: str | Tensor  # a dtype's name, or the sum itself
    scale: float = 1.0
    softcap: float | None = None

    @property
    def total(self) -> Tensor | None:
        """The user's sum, to which the weight's gradient is added instead of being returned."""
        return self.accumulate if isinstance(self.accumulate, Tensor) else None

    @property
    def sums(self) -> str:
        """The name of the dtype in which chunks are added up."""
        return self.accumulate if isinstance(self.accumulate, str) else "float32"


class LinearArguments(TorchArguments):
    """The checks for logits that are never there."""

    def check_logits(self, logits: Any, labels: Any) -> None:
        """The labels of rows; the layer was checked before."""
        self._check_array("labels", labels, self.integers)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; accepted: {list(logits.shape[:-1])}, the "
                "shape of hidden without its last axis"
            )
        self.check_place("labels", labels, logits)

    def layer(self, hidden: Any, weight: Any, options: dict[str, Any], *, least: int = 1) -> Layer:
        """The layer, with ``least`` columns; takes its options out of the others."""
        bias, chunk, accumulate = (options.pop(name, default) for name, default in LAYER.items())
        self._check_array("hidden", hidden, self.floats)
        self._check_array("weight", weight, self.floats)
        trained = weight.requires_grad
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if isinstance(bias, Tensor) else bias
        if weight.dtype != hidden.dtype:
            raise TypeError(
                f"weight is {weight.dtype}; accepted: {hidden.dtype}, the dtype of hidden, or "
                "torch.autocast around the call"
            )
        if hidden.ndim < 2 or hidden.shape[-1] == 0:
            raise ValueError(
                f"hidden has shape {list(hidden.shape)}; accepted: [..., T, D], D of 1 or more"
            )
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < least:
            raise ValueError(
                f"weight has shape {list(weight.shape)}; accepted: [V, {hidden.shape[-1]}], with "
                "hidden's last axis"
            )
        self.check_place("weight", weight, hidden)
        if bias is not None:
            self._check_array("bias", bias, (hidden.dtype,))
            self.check_place("bias", bias, hidden)
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"bias has shape {list(bias.shape)}; accepted: [{weight.shape[0]}], one per "
                    "row of weight"
                )
        whole = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk > 0
        if chunk is not None and not whole:
            raise ValueError(f"chunk_size is {chunk!r}; accepted: an int of 1 or more, None")
        if isinstance(accumulate, Tensor):
            self._check_sum(accumulate, weight, trained)
        elif accumulate not in (None, "float32", "weight"):
            raise ValueError(
                f"accumulate is {accumulate!r}; accepted: 'float32', 'weight', a tensor, None"
            )
        return Layer(
            hidden,
            weight,
            bias,
            chunk or default_chunk(weight),
            _default_sum(hidden) if accumulate is None else accumulate,
        )

    def drop_rows(self, hidden: Tensor, options: dict[str, Any]) -> bool:
        """Whether rows that nobody needs are left out; takes the option out of the others."""
        given: bool | None = options.pop("drop_rows", None)
        self.check_choice_or_none(drop_rows=given)
        return hidden.device.type == "cpu" if given is None else given

    def _check_sum(self, total: Tensor, weight: Tensor, trained: bool) -> None:
        """A tensor to which the gradient of ``weight`` can be added in place."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._check_array("accumulate", total, (wide,))
        self.check_place("accumulate", total, weight)
        if total.shape != weight.shape:
            raise ValueError(
                f"accumulate has shape {list(total.shape)}; accepted: {list(weight.shape)}, the "
                "shape of weight"
            )
        if not total.is_contiguous():
            raise ValueError(
                f"accumulate has strides {list(total.stride())}; accepted: a contiguous tensor"
            )
        if total.requires_grad:
            raise ValueError(
                "accumulate requires a gradient; accepted: a tensor that does not, for it is "
                "written in place"
            )
        if not trained:
            raise ValueError(
                "accumulate is a tensor and weight requires no gradient, so that nothing would be "
                "added; accepted: a weight that requires one, or accumulate=None"
            )


def _default_sum(hidden: Tensor) -> str:
    return "weight" if hidden.device.type == "cpu" else "float32"


def default_chunk(weight: Tensor) -> int:
    """Rows whose logits take 64 MiB on a CPU, from 256 to 4096; elsewhere 2048.

    A chunk moves the weight and the sum of its gradient once more: few rows are slow, and each
    rounding of that sum costs digits. Many rows take the memory that chunks are there to save.
    """
    if weight.device.type != "cpu":
        return 2048
    return min(4096, max(256, 2**26 // max(1, weight.shape[0] * weight.itemsize)))


arguments = LinearArguments()
