"""The reference row kernels on torch tensors: any device, no compiler, several passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.kernels import reference
from irl_ops.kernels.reference import measures
from irl_ops.kernels.reference.measures import Slopes

row_stats = reference.row_stats
label_logit = reference.label_logit
row_measures = measures.row_measures


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, or None: it serves all."""
    return None


def row_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dlogits: Tensor,
    **readout: Any,
) -> None:
    """Writes ``(p_j (A + B log p_j) + C 1{j = label}) dq/dx`` into ``dlogits``."""
    dlogits.copy_(reference.row_grad(logits, labels, row_max, logsum, a, b, c, **readout))


def row_stats_grad(
    logits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    entropy_weight: Tensor | None,
    dlogits: Tensor,
    **readout: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, entropy)``; writes the gradient into ``dlogits``, which may be logits."""
    *stats, gradient = reference.row_stats_grad(logits, alpha, beta, entropy_weight, **readout)
    dlogits.copy_(gradient)
    return tuple(stats)


def row_measures_grad(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    slopes: Slopes,
    dlogits: Tensor,
    **view: Any,
) -> None:
    """Writes the gradient into ``dlogits``, which may be logits."""
    dlogits.copy_(measures.row_measures_grad(logits, ids, row_max, logsum, slopes, **view))


def set_label_(
    dlogits: Tensor,
    labels: Tensor,
    elements: Tensor,
    label_logit: Tensor | None = None,
    **readout: Any,
) -> None:
    """Writes one element per row, rounded once; a row without a valid label stays as it is."""
    dlogits.copy_(reference.set_label(dlogits, labels, elements, label_logit, **readout))


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor`` with one rounding."""
    dlogits.copy_(dlogits.float() * factor)
