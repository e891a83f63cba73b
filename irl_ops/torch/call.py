"""One call of a loss, with its arguments checked: what is needed to do all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from irl_ops import algebra

KNOWN = (algebra.mle_objective, algebra.iqlearn_objective, algebra.online_iqlearn_objective)
"""The objectives of backends that have a scalar algebra of their own."""


class Call(NamedTuple):
    """The arguments of ``online_iqlearn_loss``, or of those losses that are a part of it."""

    objective: Callable[..., algebra.Objective]  # algebra.mle_objective, iqlearn_objective, ...
    labels: Tensor  # int32 or int64 [..., T], as the user gave them
    terms: dict[str, Any]  # the objective's own: lam, gamma; online also alpha, is_expert
    sequence: dict[str, Any]  # the options of algebra.rows_of, from ignore_index to truncated
    entropy_coef: float | Tensor
    token_weights: Tensor | None
    num_items: Any  # a number or a 0-d tensor; a pair of them for online_iqlearn
    reduction: str
    detach_next: bool
    next_values: Tensor | None
    values: Tensor | None
    metrics: bool  # whether they are wanted

    def weights(self, xp: Any, kind: Any) -> algebra.Objective:
        """The weights of the loss's terms, by the algebra."""
        given = self.token_weights
        return self.objective(
            xp,
            kind,
            xp.ones_like(kind, dtype=xp.float32) if given is None else xp.astype(given, xp.float32),
            reduction=self.reduction,
            num_items=self.num_items,
            entropy_coef=self.entropy_coef,
            **self.terms,
        )


class Outcome(NamedTuple):
    """What a call gives; the gradient of the logits is written into ``dlogits``."""

    loss: Tensor  # 0-d float32
    dvalues: Tensor | None  # float32 [..., T], where ``values`` were given
    dnext_values: Tensor | None
    metrics: dict[str, Tensor] | None  # as algebra.metrics
