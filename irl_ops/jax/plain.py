"""The reference row kernels in JAX: any platform, and XLA decides what is fused."""

from __future__ import annotations

from irl_ops.kernels import reference
from irl_ops.kernels.reference import measures

row_stats = reference.row_stats
row_grad = reference.row_grad
row_stats_grad = reference.row_stats_grad
label_logit = reference.label_logit
set_label = reference.set_label
row_measures = measures.row_measures
row_measures_grad = measures.row_measures_grad


def unavailable(platform: str) -> str | None:
    """Why this backend cannot serve ``platform``, or None: it serves all."""
    return None
