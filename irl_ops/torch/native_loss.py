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

Kept = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``row_max``, ``logsum`` and ``entropy`` of every row; the last without an entropy term None."""
NOTHING: Kept = (None, None, None)

METRICS = ("nll", "value", "entropy", "td", "reward", "accuracy", "z", "tokens")


def loss(
    call: Call,
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor | None,
    above: Tensor | None,
    kept: Kept = NOTHING,
) -> Outcome:
    """See ``irl_ops.torch.whole``; without ``dlogits`` it writes what is to be ``kept``."""
    fields, rows = fields_of(call, labels), contiguous(labels, torch.int64)
    factor, factors = _factors(above)
    dvalues, dnext_values = (None, None) if dlogits is None else _head_gradients(call, labels)
    per_row = row_vector(labels) if call.weighting.reduction == "none" else None
    found = native._native.loss(
        *native._rows(logits),
        fields.call,
        rows.data_ptr(),
        factor,
        native._address(factors),
        tuple(map(native._address, kept)),
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


def loss_keeping(call: Call, logits: Tensor, labels: Tensor) -> tuple[Outcome, Kept]:
    """The loss without a gradient, and the row statistics that ``gradient`` takes."""
    row_max = row_vector(labels)
    entropy = None if call.terms.entropy_coef is None else torch.empty_like(row_max)
    kept = (row_max, torch.empty_like(row_max), entropy)
    return loss(call, logits, labels, None, None, kept), kept


def gradient(
    call: Call, logits: Tensor, labels: Tensor, dlogits: Tensor, above: Tensor, kept: Kept
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradient of ``above`` times the loss that left what was ``kept``.

    Returns those of ``values`` and ``next_values``.
    """
    fields, rows = fields_of(call, labels), contiguous(labels, torch.int64)
    factor, factors = _factors(above)
    dvalues, dnext_values = _head_gradients(call, labels)
    native._native.loss_grad(
        *native._rows(logits),
        fields.call,
        rows.data_ptr(),
        factor,
        native._address(factors),
        tuple(map(native._address, kept)),
        native._address(dlogits),
        dlogits.stride()[:-1],
        native._address(dvalues),
        native._address(dnext_values),
        torch.get_num_threads(),
        *readout_of(call),
    )
    return dvalues, dnext_values


def _factors(above: Tensor | None) -> tuple[float, Tensor | None]:
    """A gradient from above as one number, or as one per row."""
    if above is None:
        return 1.0, None
    return (1.0, contiguous(above, torch.float32)) if above.ndim else (above.item(), None)


def _head_gradients(call: Call, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients of ``values`` and ``next_values``, where they are given."""
    heads = call.heads
    dvalues = None if heads.values is None else row_vector(labels)
    return dvalues, None if heads.next_values is None else row_vector(labels)


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
