"""The losses, their arguments and what they promise."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from torch import Tensor

from irl_ops import terms
from irl_ops.call import read_loss
from irl_ops.options import signature
from irl_ops.torch.arguments import arguments
from irl_ops.torch.forward import Loss, loss_of
from irl_ops.torch.options import IQLearnOptions, MLEOptions, OnlineOptions
from irl_ops.torch.parallel import is_parallel
from irl_ops.torch.sharded_dense import loss_of_shards


@overload
def iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[IQLearnOptions[Tensor]],
) -> Tensor: ...


@overload
def iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[IQLearnOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[IQLearnOptions[Tensor]],
) -> Loss: ...


@signature(IQLearnOptions)
def iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[IQLearnOptions[Tensor]],
) -> Loss:
    r"""Offline IQLearn: maximum likelihood with a temporal-difference penalty (Eq. 14).

    The logits are read as Q-values, V_t = logsumexp(q_t), and

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t + \zeta V_t^2
              + \lambda\,(q_t[a_t] - \gamma V'_t)^2\right]

    with V' = V_{t+1} where row t bootstraps from the next row and 0 after a terminal token.
    ``lam=0`` is MLE. The gradient is computed in the forward pass: one read and one write of the
    logits.

    Args:
        logits: float32, bfloat16 or float16 ``[..., T, V]``, any strides (a last axis that is not
            contiguous is copied). The gradient has the same dtype; all arithmetic is float32.
            float64 is served by the backend "reference", in float64 throughout.
        labels: int32 or int64 ``[..., T]``; logits[t] scores labels[t].
        lam: weight of the TD term, 0 or more; a number or a 0-d tensor, which can be annealed
            without recompiling.
        gamma: discount in [0, 1]; a number or a 0-d tensor.
        entropy_coef: weight kappa of the entropy bonus; a number or a 0-d tensor.
        z_loss: weight zeta of V_t^2 on labelled rows (PaLM's z-loss), 0 by default; a number or a
            0-d tensor. It anchors the offset of the logits, which log pi does not see.
        logit_scale: factor s of the logits, above 0; a number or a 0-d tensor, whose value is read
            at once (a device is waited for). Kernels are made for it, and it has no gradient.
        softcap: bound c of the logits, above 0, or None; a number or a 0-d tensor, likewise. Then
            q = c tanh(s x / c), where x are the given logits, and the gradient is that of x; an x
            of -inf stays -inf. Not for logits that a model has capped already.
        temperature: number above 0 that divides q, after the soft cap: the inverse of
            ``logit_scale`` where there is none. A number or a 0-d tensor, likewise.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``; False says as well that the row carries no label. Applied after
            the shift.
        shift: Hugging Face's convention, logits[t] scores labels[t + 1], without slicing; the last
            row of each segment then carries no label.
        segment_ids: integers ``[..., T]``, packed sequences: a row's next row has the same id.
        position_ids: integers ``[..., T]``, packed sequences: a segment starts wherever the
            position does not increase by one.
        cu_seqlens: integers ``[S + 1]``, packed sequences, offsets from 0 to N, with logits
            ``[N, V]``.
        eos_token_id: token or tokens that end an episode: their rows have V' = 0, and all others
            bootstrap where a next row exists.
        boundary: what a labelled row without a labelled next row does when nothing else decides:
            "terminal" (V' = 0), "bootstrap" from the next row if one exists, or "drop" its TD term.
        truncated: bool ``[...]`` (one per sequence) or ``[..., T]``: cut off there, not ended.
        token_weights: float ``[..., T]``, w_t; 1 by default.
        num_items: N for reduction "mean", e.g. the number of labels in all accumulated batches; a
            number or a 0-d tensor. By default the sum of w over the labelled rows.
        reduction: "mean", "sum" (N = 1) or "none": the loss of every row, ``[..., T]``.
        detach_next: no gradient flows through V'.
        next_values: float ``[..., T]``, replaces V_{t+1} in rows that bootstrap (target network).
        values: float ``[..., T]``, a separate value head v (A.1.1): Q_t = v_t + log pi_t, V = v.
        return_metrics: also return a dict of 0-d float32 tensors without gradient: "nll", "value"
            and, where ``entropy_coef`` is not 0, "entropy" (means over labelled rows), "td" =
            delta^2 and "reward" = delta (means over rows with a TD term), "accuracy" (no logit is
            larger than the label's; mean over labelled rows), where ``z_loss`` is not 0 "z" = V^2,
            and "tokens" (the count of labelled rows).
        inplace: the gradient takes the logits' storage; they must not be used again, and read as
            NaN afterwards. (Views of the same storage, made before, see the gradient.) Compilers
            decide about storage themselves, and ignore this.
        vocab_group: the processes that hold the other columns of these logits (``[..., T, V / r]``
            each, 0 columns or more): a ProcessGroup, or a DeviceMesh of one dimension. Labels are
            global. This and what follows: docs/parallel.md. DTensor logits, sharded on the last
            axis or on those of rows, need none of it.
        vocab_start: the first column here; by default all shards are equally wide.
        vocab_size: the columns that count; those behind them are padding.
        sequence_group: the processes that hold the other rows of these sequences. Arrays with a
            number per row have the rows that are here, of which every process has as many.
        sequence_order: integers ``[T]`` or ``[..., T]``, the index in the whole sequence of every
            row that is here; by default shards are contiguous, in the order of the ranks.
        backend: a name of ``available_backends()``; "auto" is the fastest that serves the device.

    Returns:
        The loss, a 0-d float32 tensor (``[..., T]`` for reduction "none"), or
        ``(loss, metrics)``. N = 0 gives 0, with gradients of 0. Over groups they are those of the
        whole batch, on every rank (for "none": of the rows here), and the gradient is that of the
        logits that are here.

    Raises:
        TypeError: a wrong dtype or type, or an unknown option.
        ValueError: a shape, device or option value that is not accepted.
        IndexError: on a CPU, a label outside [0, V) other than ``ignore_index``; elsewhere the
            loss is NaN then. Likewise, with a ValueError, ``cu_seqlens`` that are no
            offsets.
        RuntimeError: second derivatives, forward-mode derivatives, or a second backward pass
            through the same loss.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> iqlearn_loss(logits, labels, lam=0.1).backward()
    """
    given = dict(options)
    return _loss(
        "iqlearn_loss", IQLearnOptions, terms.iqlearn, logits, labels, given, return_metrics
    )


@overload
def mle_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[MLEOptions[Tensor]],
) -> Tensor: ...


@overload
def mle_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[MLEOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def mle_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[MLEOptions[Tensor]],
) -> Loss: ...


@signature(MLEOptions)
def mle_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[MLEOptions[Tensor]],
) -> Loss:
    r"""Maximum likelihood, with ``entropy_coef`` > 0 entropy-regularised (Eq. 18).

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t + \zeta V_t^2\right]

    Arguments, result and errors are those of ``iqlearn_loss``, without the options of the TD
    term. Those that describe the sequences are all accepted, so that the two calls are
    interchangeable; here
    the segments matter with ``shift=True`` (a label never crosses them), and ``eos_token_id``,
    ``boundary`` and ``truncated`` change nothing.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> mle_loss(logits, labels, entropy_coef=0.01).backward()
    """
    given = dict(options)
    return _loss("mle_loss", MLEOptions, terms.mle, logits, labels, given, return_metrics)


@overload
def online_iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[OnlineOptions[Tensor]],
) -> Tensor: ...


@overload
def online_iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[OnlineOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def online_iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[OnlineOptions[Tensor]],
) -> Loss: ...


@signature(OnlineOptions)
def online_iqlearn_loss(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[OnlineOptions[Tensor]],
) -> Loss:
    r"""Online IQLearn: expert and agent samples in one batch (Eqs. 15-17).

    .. math:: L = \frac{1}{N_E} \sum_{t \in E} w_t \left[-\log \pi_t - \kappa H_t + \zeta V_t^2
              + \tfrac{\lambda}{1-\alpha}\,\delta_t^2\right]
              + \frac{1}{N_B} \sum_{t \in B} w_t \tfrac{\lambda\alpha}{(1-\alpha)^2}\,\delta_t^2

    Agent rows are regularised, never imitated. The other arguments, the result and the errors are
    those of ``iqlearn_loss``.

    Args:
        logits: ``[..., T, V]``.
        labels: ``[..., T]``.
        is_expert: bool ``[...]`` (one per sequence) or ``[..., T]``.
        alpha: strength of the mix-in in [0, 1); a number or a 0-d tensor.
        lam: weight of the TD term.
        gamma: discount.
        entropy_coef: weight of the entropy bonus, on expert rows.
        z_loss: weight of V_t^2, on expert rows.
        logit_scale: see ``iqlearn_loss``, as for all that follow.
        softcap: bound of the logits.
        temperature: number above 0 that divides q.
        ignore_index: label of rows that carry none.
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
        vocab_group: the processes that hold the other columns.
        vocab_start: the first column here.
        vocab_size: the columns that count.
        sequence_group: the processes that hold the other rows.
        sequence_order: the index in the whole sequence of every row here.
        backend: a name of ``available_backends()``, or "auto".

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> online_iqlearn_loss(logits, labels, torch.tensor([True, False])).backward()
    """
    given = dict(options)
    return _loss(
        "online_iqlearn_loss", OnlineOptions, terms.online_iqlearn, logits, labels, given,
        return_metrics, is_expert,
    )  # fmt: skip


def _loss(
    caller: str,
    group: type,
    terms_of: Any,
    logits: Tensor,
    labels: Tensor,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Tensor | None = None,
) -> Loss:
    if is_parallel(logits, options):
        return loss_of_shards(
            caller, group, terms_of, logits, labels, options, return_metrics, is_expert
        )
    call = read_loss(
        caller, group, arguments, terms_of, logits, labels, options, return_metrics, is_expert
    )
    return loss_of(call, logits, labels)
