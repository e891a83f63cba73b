"""A whole loss call on the CPU, as one call of the C++ code.

Beside a row kernel that leaves nothing in the caches, sixty operations on [B, T] tensors would take
up to half as long as the kernel itself, nearly all of it on the way to their arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irl_ops.algebra import Terms
from irl_ops.call import Call
from irl_ops.torch import native
from irl_ops.torch.native_call import contiguous, fields_of, readout_of, refuse_label, row_vector
from irl_ops.torch.outcome import Outcome

METRICS = ("nll", "value", "entropy", "td", "reward", "accuracy", "z", "tokens")


def loss(
    call: Call, logits: Tensor, labels: Tensor, dlogits: Tensor | None, above: Tensor | None
) -> Outcome:
    """See ``irl_ops.torch.whole``."""
    fields, rows = fields_of(call, labels), contiguous(labels, torch.int64)
    factor, factors = 1.0, None
    if above is not None and above.ndim:
        factors = contiguous(above, torch.float32)
    elif above is not None:
        factor = above.item()
    dvalues = dnext_values = None
    if dlogits is not None and call.heads.values is not None:
        dvalues = row_vector(labels)
    if dlogits is not None and call.heads.next_values is not None:
        dnext_values = row_vector(labels)
    per_row = row_vector(labels) if call.weighting.reduction == "none" else None
    found = native._native.loss(
        *native._rows(logits),
        fields.call,
        rows.data_ptr(),
        factor,
        native._address(factors),
        native._address(dlogits),
        () if dlogits is None else dlogits.stride()[:-1],
        native._address(per_row),
        native._address(dvalues),
        native._address(dnext_values),
        torch.get_num_threads(),
        *readout_of(call),
    )
    if isinstance(found, int):
        refuse_label(found, labels, logits, call.sequence)
    total, *means = found
    loss = torch.scalar_tensor(total, dtype=torch.float32) if per_row is None else per_row
    metrics = _metrics(call.terms, means) if call.metrics else None
    return Outcome(loss, dvalues, dnext_values, metrics)


def metric_names(terms: Terms) -> tuple[str, ...]:
    """The metrics that a loss has, in their order."""
    absent = set()
    if terms.entropy_coef is None:
        absent.add("entropy")
    if terms.td is None:
        absent |= {"td", "reward"}
    if terms.z_loss is None:
        absent.add("z")
    return tuple(name for name in METRICS if name not in absent)


def _metrics(terms: Terms, means: list[float]) -> dict[str, Tensor]:
    found = zip(METRICS, torch.tensor(means, dtype=torch.float32).unbind(), strict=True)
    named = dict(found)
    return {name: named[name] for name in metric_names(terms)}
