"""The row kernels as torch.library custom operators.

They are opaque to torch.compile, which traces the algebra around them. ``backend`` is a name of
``irl_ops.torch.backends``; gradients are allocated here, so that every backend gets its output.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import BACKENDS


@torch.library.custom_op("irl_ops::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, labels: Tensor, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, logsum, label_logit, entropy)``, float32; entropy is empty unless asked for."""
    row_max, logsum, label_logit, h = BACKENDS[backend].row_stats(logits, labels, entropy)
    return row_max, logsum, label_logit, _or_empty(logits, h)


@row_stats.register_fake
def _(
    logits: Tensor, labels: Tensor, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_max, logsum, label_logit = (_row_vector(logits) for _ in range(3))
    return row_max, logsum, label_logit, _or_empty(logits, None, entropy)


@torch.library.custom_op("irl_ops::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    backend: str,
) -> Tensor:
    """``p_j (A + B log p_j) + C 1{j = label}`` in the logits' dtype."""
    dlogits = torch.empty_like(logits)
    BACKENDS[backend].row_grad(logits, labels, row_max, logsum, a, b, c, dlogits)
    return dlogits


@row_grad.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("irl_ops::row_stats_grad", mutates_args=())
def row_stats_grad(
    logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, logsum, entropy, dlogits)`` in one read and one write of ``[..., T, V]``."""
    dlogits = torch.empty_like(logits)
    row_max, logsum, h = BACKENDS[backend].row_stats_grad(
        logits, alpha, beta, entropy_weight, dlogits
    )
    return row_max, logsum, _or_empty(logits, h), dlogits


@row_stats_grad.register_fake
def _(
    logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = _or_empty(logits, None, entropy_weight is not None)
    return _row_vector(logits), _row_vector(logits), h, torch.empty_like(logits)


@torch.library.custom_op("irl_ops::row_stats_grad_", mutates_args={"logits"})
def row_stats_grad_(
    logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(row_max, logsum, entropy)``; the gradient takes the place of the logits."""
    row_max, logsum, h = BACKENDS[backend].row_stats_grad(
        logits, alpha, beta, entropy_weight, logits
    )
    return row_max, logsum, _or_empty(logits, h)


@row_stats_grad_.register_fake
def _(
    logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    h = _or_empty(logits, None, entropy_weight is not None)
    return _row_vector(logits), _row_vector(logits), h


@torch.library.custom_op("irl_ops::label_logit", mutates_args=())
def label_logit(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
    """``q[label]`` in float32: 0 without a label, NaN for a bad one, never out of bounds.

    Opaque, since a compiler may otherwise read it again after the logits have been overwritten.
    """
    picked: Tensor = BACKENDS[backend].label_logit(logits, labels)
    return picked


@label_logit.register_fake
def _(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
    return _row_vector(logits)


@torch.library.custom_op("irl_ops::set_label_", mutates_args={"dlogits"})
def set_label_(dlogits: Tensor, labels: Tensor, elements: Tensor, backend: str) -> None:
    """Writes one element a row, rounded once; rows without a good label keep what they have."""
    BACKENDS[backend].set_label_(dlogits, labels, elements)


@torch.library.custom_op("irl_ops::scale_", mutates_args={"dlogits"})
def scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """``dlogits *= factor``; the 0-d factor is looked at where the gradient lives."""
    BACKENDS[backend].scale_(dlogits, factor)


@torch.library.custom_op("irl_ops::check_labels", mutates_args=())
def check_labels(
    labels: Tensor, given: Tensor, vocab: int, ignore_index: int, shift: bool
) -> Tensor:
    """``labels`` again, or an IndexError that names the label in ``given`` and its position."""
    if (labels >= vocab).any():
        arguments.refuse_label(labels, given, vocab, ignore_index, shift)
    return labels.clone()


@check_labels.register_fake
def _(labels: Tensor, given: Tensor, vocab: int, ignore_index: int, shift: bool) -> Tensor:
    return torch.empty_like(labels)


def _save_row_stats(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, labels, ctx.with_entropy, ctx.backend = inputs
    row_max, logsum, _, entropy = output
    ctx.save_for_backward(logits, labels, row_max, logsum, entropy)


def _row_stats_backward(ctx, _, dlogsum, dlabel_logit, dentropy):  # type: ignore[no-untyped-def]
    """p_j (A + B log p_j) + C 1{j = label} with A = dlogsum - H dentropy, B = -dentropy.

    ``row_max`` is the reference point that logsum is measured from, a constant: the whole
    derivative of row_max + logsum comes in through logsum.
    """
    refuse_second_derivative()
    logits, labels, row_max, logsum, entropy = ctx.saved_tensors
    a, b = dlogsum, torch.zeros_like(dlogsum)
    if ctx.with_entropy:
        a, b = a - torch.where(dentropy != 0, dentropy * entropy, 0.0), -dentropy
    dlogits = row_grad(logits, labels, row_max, logsum, a, b, dlabel_logit, ctx.backend)
    return dlogits, None, None, None


row_stats.register_autograd(_row_stats_backward, setup_context=_save_row_stats)


def rows_of(labels: Tensor, vocab: int, sequence: dict[str, Any]) -> algebra.Rows:
    """Aligned labels and the kind of every row; on a CPU a bad label raises."""
    rows = algebra.rows_of(xp, labels.long(), vocab, **sequence)
    if labels.device.type != "cpu":
        return rows
    ignore_index, shift = sequence["ignore_index"], sequence["shift"]
    return rows._replace(labels=check_labels(rows.labels, labels, vocab, ignore_index, shift))


def refuse_second_derivative() -> None:
    """Called in a backward pass, which runs with gradients enabled under create_graph alone."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "irl_ops: second derivatives are not implemented (create_graph=True); they would be "
            "silently zero"
        )


def _row_vector(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def _or_empty(logits: Tensor, x: Tensor | None, wanted: bool = False) -> Tensor:
    """An operator returns tensors, never None: what was not asked for is empty."""
    if x is not None:
        return x
    return _row_vector(logits) if wanted else logits.new_empty(0, dtype=torch.float32)
