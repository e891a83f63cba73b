"""The row kernels as torch.library custom operators.

They are opaque to torch.compile, which traces the algebra around them. ``backend`` is a name of
``irl_ops.torch.backends``; gradients are allocated here, so that every backend gets its output.
"""

from __future__ import annotations

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import Sequence
from irl_ops.readout import Readout
from irl_ops.torch import pool
from irl_ops.torch.arguments import arguments
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.refusals import refuse_second_derivative


@torch.library.custom_op("irl_ops::row_stats", mutates_args=())
def row_stats(
    logits: Tensor,
    labels: Tensor,
    entropy: bool,
    backend: str,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, logsum, label_logit, entropy)``, float32; entropy is empty unless asked for."""
    readout = Readout(logit_scale, softcap).keywords
    row_max, logsum, label_logit, h = BACKENDS[backend].row_stats(
        logits, labels, entropy, **readout
    )
    return row_max, logsum, label_logit, _or_empty(logits, h)


@row_stats.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    entropy: bool,
    backend: str,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_max, logsum, label_logit = (row_vector(logits) for _ in range(3))
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``(p_j (A + B log p_j) + C 1{j = label}) dq/dx`` in the logits' dtype."""
    dlogits, readout = pool.empty_like(logits), Readout(logit_scale, softcap).keywords
    BACKENDS[backend].row_grad(logits, labels, row_max, logsum, a, b, c, dlogits, **readout)
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("irl_ops::check_labels", mutates_args=())
def check_labels(
    labels: Tensor,
    given: Tensor,
    cu_seqlens: Tensor | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
) -> Tensor:
    """``labels`` again, or an error that names the bad one in ``given`` and its position."""
    if (labels >= vocab).any():
        sequence = Sequence(ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
        arguments.refuse_label(labels, given, vocab, sequence)
    return labels.clone()


@check_labels.register_fake
def _(
    labels: Tensor,
    given: Tensor,
    cu_seqlens: Tensor | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
) -> Tensor:
    return torch.empty_like(labels)


def _save_row_stats(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, labels, ctx.with_entropy, *ctx.how = inputs
    row_max, logsum, _, entropy = output
    ctx.save_for_backward(logits, labels, row_max, logsum, entropy)


def _row_stats_backward(ctx, _, dlogsum, dlabel_logit, dentropy):  # type: ignore[no-untyped-def]
    """p_j (A + B log p_j) + C 1{j = label} with A = dlogsum - H dentropy, B = -dentropy.

    ``row_max`` is the reference point that logsum is measured from, a constant: the whole
    derivative of row_max + logsum comes in through logsum.
    """
    refuse_second_derivative()
    logits, labels, row_max, logsum, entropy = ctx.saved_tensors
    a, b = row_coefficients(entropy if ctx.with_entropy else None, dlogsum, dentropy)
    dlogits = row_grad(logits, labels, row_max, logsum, a, b, dlabel_logit, *ctx.how)
    return dlogits, *[None] * 5


row_stats.register_autograd(_row_stats_backward, setup_context=_save_row_stats)


def align(labels: Tensor, vocab: int, sequence: Sequence) -> algebra.Rows:
    """Aligned labels and the kind of every row; on a CPU a bad label raises."""
    rows = algebra.align(xp, labels.long(), vocab, sequence)
    if labels.device.type != "cpu":
        return rows
    offsets, ignore_index, shift = sequence.cu_seqlens, sequence.ignore_index, sequence.shift
    checked = check_labels(rows.labels, labels, offsets, vocab, ignore_index, shift)
    return rows._replace(labels=checked)


def row_coefficients(
    entropy: Tensor | None, dlogsum: Tensor, dentropy: Tensor
) -> tuple[Tensor, Tensor]:
    """``(A, B)`` of ``row_grad`` from the statistics' gradients: dH/dq_j = -p_j (log p_j + H)."""
    if entropy is None:
        return dlogsum, torch.zeros_like(dlogsum)
    return dlogsum - torch.where(dentropy != 0, dentropy * entropy, 0.0), -dentropy


def row_vector(logits: Tensor) -> Tensor:
    """Room for one number per row: float32, of float64 rows float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1], dtype=dtype)


def _or_empty(logits: Tensor, x: Tensor | None, wanted: bool = False) -> Tensor:
    """An operator returns tensors, never None: what was not asked for is empty."""
    if x is not None:
        return x
    return row_vector(logits) if wanted else row_vector(logits[:0])
