"""A whole call by the array algebra around the row kernels of any backend, step by step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import Coefficients, Finished, Heads, Rows, Weighting
from irl_ops.call import Call
from irl_ops.readout import Readout
from irl_ops.torch.arguments import arguments
from irl_ops.torch.outcome import Outcome


class Dense:
    """The pass over whole logits; the gradient goes into storage that is given."""

    def __init__(
        self, kernels: ModuleType, logits: Tensor, dlogits: Tensor, readout: Readout
    ) -> None:
        self.kernels, self.logits, self.dlogits = kernels, logits, dlogits
        self.readout = readout.keywords

    def label_logit(self, labels: Tensor) -> Tensor:
        """``q[label]``, also kept for ``stats_grad``."""
        picked: Tensor = self.kernels.label_logit(self.logits, labels, **self.readout)
        self.picked = picked
        return picked

    def stats_grad(self, labels: Tensor, given: Coefficients, finish: Any) -> tuple[None, Finished]:
        """The gradient goes into ``dlogits``; all rows are one window."""
        stats = self.kernels.row_stats_grad(self.logits, *given, self.dlogits, **self.readout)
        row_max, logsum, entropy = stats
        done: Finished = finish(lambda x: x, row_max, logsum, self.picked, entropy, 0.0)
        self.kernels.set_label_(self.dlogits, labels, done.element, self.picked, **self.readout)
        return None, done


def loss(
    kernels: ModuleType,
    call: Call,
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor | None,
    above: Tensor | None,
) -> Outcome:
    """See ``irl_ops.torch.whole``; ``kernels`` is a module of ``irl_ops.torch.backends``."""
    rows = aligned(call.sequence, labels, logits.shape[-1])
    heads, weighting = in_dtype(call, logits)
    per_row = call.weighting.reduction == "none"
    with torch.no_grad():
        loss = algebra.weigh(xp, rows.kind, call.terms, weighting, above)
        if dlogits is not None:
            out = algebra.loss_and_grad(
                xp, Dense(kernels, logits, dlogits, call.readout), rows, loss, heads
            )
            metrics = out.metrics if call.metrics else None
            return Outcome(out.loss, out.dvalues, out.dnext_values, metrics)
        stats = algebra.statistics(
            xp,
            rows.labels,
            *kernels.row_stats(
                logits, rows.labels, loss.entropy_coef is not None, **call.readout.keywords
            ),
        )
        step = algebra.transition(xp, rows.kind, stats, loss.gamma, heads)
        total: Tensor = algebra.row_losses(xp, loss, stats, step)
        metrics = algebra.metrics(xp, rows.kind, loss, stats, step) if call.metrics else None
        return Outcome(total if per_row else total.sum(), None, None, metrics)


def aligned(sequence: algebra.Sequence, labels: Tensor, vocab: int) -> Rows:
    """Labels and kinds; on a CPU a label out of range raises."""
    rows = algebra.align(xp, labels.long(), vocab, sequence)
    if labels.device.type == "cpu" and (rows.labels == algebra.BAD_LABEL).any():
        arguments.refuse_label(rows.labels, labels, vocab, sequence)
    return rows


def in_dtype(call: Call, logits: Tensor) -> tuple[Heads, Weighting]:
    """Values and weights in float32, of float64 logits in float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = call.weighting.token_weights
    if weights is None:
        weights = torch.ones(logits.shape[:-1], dtype=dtype, device=logits.device)
    return heads_in(call.heads, dtype), call.weighting._replace(token_weights=weights.to(dtype))


def heads_in(heads: Heads, dtype: torch.dtype) -> Heads:
    """The values of heads in that dtype."""
    values, next_values = (
        None if x is None else x.to(dtype) for x in (heads.values, heads.next_values)
    )
    return heads._replace(values=values, next_values=next_values)
