"""A whole loss call on the CPU: the algebra on NumPy views of the tensors, the C++ kernels inside.

On [B, T] arrays torch spends more on dispatch than on arithmetic, all the more with caches that the
logits have just emptied; NumPy spends about half of that.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch import arguments, native
from irl_ops.torch.call import Call, Outcome

Array = NDArray[Any]


def loss_and_grad(call: Call, logits: Tensor, dlogits: Tensor) -> Outcome:
    """The outcome of ``call``; writes the gradient into ``dlogits``, which may be ``logits``."""
    seen = Call(*map(_view, call))
    labels = np.asarray(seen.labels, dtype=np.int64)
    with np.errstate(all="ignore"):  # tensors do not warn of NaN either
        rows = algebra.rows_of(xp, labels, logits.shape[-1], **seen.sequence)
        if (rows.labels == algebra.BAD_LABEL).any():
            aligned = torch.from_numpy(rows.labels)
            ignore_index, shift = call.sequence["ignore_index"], call.sequence["shift"]
            arguments.refuse_label(aligned, call.labels, logits.shape[-1], ignore_index, shift)
        loss = seen.weights(xp, rows.kind)
        out = algebra.single_pass(
            xp,
            Kernels(dlogits),
            logits,
            rows,
            loss,
            next_values=seen.next_values,
            values=seen.values,
            detach_next=call.detach_next,
        )
        metrics = None
        if call.metrics:
            metrics = algebra.metrics(xp, rows.kind, loss, out.stats, out.step)
    return Outcome(
        torch.as_tensor(out.loss),
        None if out.dvalues is None else torch.as_tensor(out.dvalues),
        None if out.dnext_values is None else torch.as_tensor(out.dnext_values),
        metrics and {name: torch.as_tensor(x) for name, x in metrics.items()},
    )


class Kernels:
    """The row kernels as ``algebra.single_pass`` calls them: logits are tensors, rows arrays."""

    def __init__(self, dlogits: Tensor) -> None:
        self.dlogits = dlogits

    def label_logit(self, logits: Tensor, labels: Array) -> Array:
        """``q[label]``, before anything is overwritten."""
        return native.label_logit(logits, torch.from_numpy(labels)).numpy()

    def row_stats_grad(
        self, logits: Tensor, alpha: Array, beta: Array, entropy_weight: Array | None
    ) -> tuple[Array, Array, Array | None, Tensor]:
        """The gradient goes where the call wants it."""
        weight = None if entropy_weight is None else torch.from_numpy(entropy_weight)
        row_max, logsum, entropy = native.row_stats_grad(
            logits, torch.from_numpy(alpha), torch.from_numpy(beta), weight, self.dlogits
        )
        h = None if entropy is None else entropy.numpy()
        return row_max.numpy(), logsum.numpy(), h, self.dlogits

    def set_label(self, dlogits: Tensor, labels: Array, elements: Array) -> Tensor:
        """In place."""
        native.set_label_(dlogits, torch.from_numpy(labels), torch.from_numpy(elements))
        return dlogits


def _view(x: Any) -> Any:
    """The same with an array over the storage of each tensor; float32 where it holds numbers."""
    if isinstance(x, Tensor):
        number = x.is_floating_point() or (x.ndim == 0 and x.dtype != torch.bool)
        return (x.detach().float() if number else x).numpy()
    if isinstance(x, dict):
        return {name: _view(option) for name, option in x.items()}
    return tuple(map(_view, x)) if isinstance(x, tuple) else x
