"""One call of a loss, with its arguments checked: what a backend needs to do all of it at once.

A backend may offer ``loss_and_grad(call, logits, dlogits) -> Outcome | None`` beside its row kernels:
the whole of ``algebra.rows_of``, the objective and ``algebra.single_pass`` in a few launches. Eager
calls take it where it exists and does not answer None, which says that it does not know the
objective; a compiler sees the algebra itself, which it fuses better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The arguments of ``online_iqlearn_loss``, or of those losses that are a part of it."""

    objective: Callable[..., Any]  # algebra.mle_objective, iqlearn_objective, ...: which loss it is
    labels: Tensor  # int32 or int64 [..., T], as the user gave them
    terms: dict[str, Any]  # the objective's own: lam, gamma; online also alpha, is_expert
    sequence: dict[str, Any]  # the options of algebra.rows_of, from ignore_index to truncated
    entropy_coef: float | Tensor
    token_weights: Tensor | None
    num_items: Any  # a number or a 0-d tensor; a pair of them for online_iqlearn
    reduction: str  # "mean" or "sum"
    detach_next: bool
    next_values: Tensor | None
    values: Tensor | None
    metrics: bool  # whether they are wanted


class Outcome(NamedTuple):
    """What a call gives; the gradient of the logits is written into ``dlogits``."""

    loss: Tensor  # 0-d float32
    dvalues: Tensor | None  # float32 [..., T], where ``values`` were given
    dnext_values: Tensor | None
    metrics: dict[str, Tensor] | None  # as algebra.metrics
