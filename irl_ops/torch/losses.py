"""The losses, their arguments and what they promise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from irl_ops import algebra
from irl_ops.arguments import Boundary, Reduction
from irl_ops.torch.arguments import arguments
from irl_ops.torch.forward import Loss, loss_of


def iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    lam: float | Tensor = 0.1,
    gamma: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.0,
    ignore_index: int = -100,
    where: Tensor | None = None,
    shift: bool = False,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: Boundary = "terminal",
    truncated: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "mean",
    detach_next: bool = False,
    next_values: Tensor | None = None,
    values: Tensor | None = None,
    return_metrics: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Loss:
    r"""Offline IQLearn: maximum likelihood with a temporal-difference penalty (Eq. 14).

    The logits are read as Q-values, V_t = logsumexp(q_t), and

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t
              + \lambda\,(q_t[a_t] - \gamma V'_t)^2\right]

    with V' = V_{t+1} where row t bootstraps from the next row and 0 after a terminal token.
    ``lam=0`` is MLE. The gradient is computed in the forward pass: one read and one write of the
    logits.

    Args:
        logits: float32, bfloat16 or float16 ``[..., T, V]``, any strides (a last axis that is not
            contiguous is copied). The gradient has the same dtype; all arithmetic is float32.
        labels: int32 or int64 ``[..., T]``; logits[t] scores labels[t].
        lam: weight of the TD term, 0 or more; a number or a 0-d tensor, which can be annealed
            without recompiling.
        gamma: discount in [0, 1]; a number or a 0-d tensor.
        entropy_coef: weight kappa of the entropy bonus; a number or a 0-d tensor.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``; False says as well that the row carries no label. Applied after
            the shift.
        shift: Hugging Face's convention, logits[t] scores labels[t + 1], without slicing; the last
            row of each segment then carries no label.
        segment_ids: integers ``[..., T]``, packed sequences: a row's next row has the same id.
        position_ids: integers ``[..., T]``, packed sequences: a segment starts wherever the
            position does not increase by one.
        cu_seqlens: integers ``[S + 1]``, packed sequences, with logits ``[N, V]``.
        eos_token_id: token or tokens that end an episode: their rows have V' = 0, and all others
            bootstrap where a next row exists.
        boundary: what a labelled row without a labelled next row does when nothing else decides:
            "terminal" (V' = 0), "bootstrap" from the next row if one exists, or "drop" its TD term.
        truncated: bool ``[...]`` or ``[..., T]``: the sequence was cut off there, not ended.
        token_weights: float ``[..., T]``, w_t; 1 by default.
        num_items: N for reduction "mean", e.g. the number of labels in all accumulated batches; a
            number or a 0-d tensor. By default the sum of w over the labelled rows.
        reduction: "mean", "sum" (N = 1) or "none": the loss of every row, ``[..., T]``.
        detach_next: no gradient flows through V'.
        next_values: float ``[..., T]``, replaces V_{t+1} in rows that bootstrap (target network).
        values: float ``[..., T]``, a separate value head v (A.1.1): Q_t = v_t + log pi_t, V = v.
        return_metrics: also return a dict of 0-d float32 tensors without gradient: "nll", "value"
            and, where ``entropy_coef`` is not 0, "entropy" (means over labelled rows), "td" =
            delta^2 and "reward" = delta (means over rows with a TD term), "tokens" (their count).
        inplace: the gradient takes the logits' storage; they must not be used again.
            A float16 gradient is then rounded before the factor of a GradScaler reaches it.
        backend: a name of ``available_backends()``; "auto" is the fastest that serves the device.

    Returns:
        The loss, a 0-d float32 tensor (``[..., T]`` for reduction "none"), or
        ``(loss, metrics)``. N = 0 gives 0, with gradients of 0.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a shape, device or option value that is not accepted.
        IndexError: on a CPU, a label outside [0, V) other than ``ignore_index``; elsewhere the
            loss is NaN then.
        RuntimeError: second derivatives, forward-mode derivatives, or a second backward pass
            through the same loss.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> iqlearn_loss(logits, labels, lam=0.1).backward()
    """
    arguments.check_scalar("lam", lam, logits, 0.0, math.inf)
    arguments.check_scalar("gamma", gamma, logits, 0.0, 1.0)
    return loss_of(
        algebra.iqlearn_objective,
        logits,
        labels,
        terms=dict(lam=lam, gamma=gamma),
        sequence=dict(
            ignore_index=ignore_index,
            where=where,
            shift=shift,
            segment_ids=segment_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            eos_token_id=eos_token_id,
            boundary=boundary,
            truncated=truncated,
        ),
        entropy_coef=entropy_coef,
        token_weights=token_weights,
        num_items=num_items,
        reduction=reduction,
        detach_next=detach_next,
        next_values=next_values,
        values=values,
        return_metrics=return_metrics,
        inplace=inplace,
        backend=backend,
    )


def mle_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    entropy_coef: float | Tensor = 0.0,
    ignore_index: int = -100,
    where: Tensor | None = None,
    shift: bool = False,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: Boundary = "terminal",
    truncated: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Loss:
    r"""Maximum likelihood, with ``entropy_coef`` > 0 entropy-regularised (Eq. 18).

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t\right]

    Arguments, result and errors are those of ``iqlearn_loss``, less the ones of the TD term. Those
    that describe the sequences are all accepted, so that one call can be put for the other; here
    the segments matter with ``shift=True`` (a label never crosses them), and ``eos_token_id``,
    ``boundary`` and ``truncated`` change nothing.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> mle_loss(logits, labels, entropy_coef=0.01).backward()
    """
    return loss_of(
        algebra.mle_objective,
        logits,
        labels,
        terms={},
        sequence=dict(
            ignore_index=ignore_index,
            where=where,
            shift=shift,
            segment_ids=segment_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            eos_token_id=eos_token_id,
            boundary=boundary,
            truncated=truncated,
        ),
        entropy_coef=entropy_coef,
        token_weights=token_weights,
        num_items=num_items,
        reduction=reduction,
        return_metrics=return_metrics,
        inplace=inplace,
        backend=backend,
    )


def online_iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    lam: float | Tensor = 0.1,
    gamma: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.0,
    ignore_index: int = -100,
    where: Tensor | None = None,
    shift: bool = False,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    boundary: Boundary = "terminal",
    truncated: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: tuple[float | Tensor, float | Tensor] | None = None,
    reduction: Reduction = "mean",
    detach_next: bool = False,
    next_values: Tensor | None = None,
    values: Tensor | None = None,
    return_metrics: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Loss:
    r"""Online IQLearn: expert and agent samples in one batch (Eqs. 15-17).

    .. math:: L = \frac{1}{N_E} \sum_{t \in E} w_t \left[-\log \pi_t - \kappa H_t
              + \tfrac{\lambda}{1-\alpha}\,\delta_t^2\right]
              + \frac{1}{N_B} \sum_{t \in B} w_t \tfrac{\lambda\alpha}{(1-\alpha)^2}\,\delta_t^2

    Agent rows are regularised, never imitated. The other arguments, the result and the errors are
    those of ``iqlearn_loss``.

    Args:
        logits: ``[..., T, V]``.
        labels: ``[..., T]``.
        is_expert: bool ``[...]`` (one a sequence) or ``[..., T]``.
        alpha: strength of the mix-in in [0, 1); a number or a 0-d tensor.
        lam: weight of the TD term.
        gamma: discount.
        entropy_coef: weight of the entropy bonus, on expert rows.
        ignore_index: see ``iqlearn_loss``, as for all that follow.
        where: bool ``[..., T]``.
        shift: logits[t] scores labels[t + 1].
        segment_ids: ``[..., T]``.
        position_ids: ``[..., T]``.
        cu_seqlens: ``[S + 1]``.
        eos_token_id: tokens that end an episode.
        boundary: "terminal", "bootstrap" or "drop".
        truncated: bool ``[...]`` or ``[..., T]``.
        token_weights: ``[..., T]``.
        num_items: the pair (N_E, N_B). An empty group contributes 0.
        reduction: "mean", "sum" or "none".
        detach_next: no gradient flows through V'.
        next_values: ``[..., T]``.
        values: ``[..., T]``.
        return_metrics: also return the metrics, means over expert and agent rows together.
        inplace: the gradient takes the logits' storage.
        backend: a name of ``available_backends()``, or "auto".

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> online_iqlearn_loss(logits, labels, torch.tensor([True, False])).backward()
    """
    arguments.check_scalar("alpha", alpha, logits, 0.0, 1.0, open_end=True)
    arguments.check_scalar("lam", lam, logits, 0.0, math.inf)
    arguments.check_scalar("gamma", gamma, logits, 0.0, 1.0)
    arguments.check_pair(num_items)
    arguments.check_logits(logits, labels)
    arguments.check_flags("is_expert", is_expert, labels)
    return loss_of(
        algebra.online_iqlearn_objective,
        logits,
        labels,
        terms=dict(is_expert=is_expert, alpha=alpha, lam=lam, gamma=gamma),
        sequence=dict(
            ignore_index=ignore_index,
            where=where,
            shift=shift,
            segment_ids=segment_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            eos_token_id=eos_token_id,
            boundary=boundary,
            truncated=truncated,
        ),
        entropy_coef=entropy_coef,
        token_weights=token_weights,
        num_items=None if num_items is None else tuple(num_items),
        reduction=reduction,
        detach_next=detach_next,
        next_values=next_values,
        values=values,
        return_metrics=return_metrics,
        inplace=inplace,
        backend=backend,
    )
