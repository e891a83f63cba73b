"""The losses of hidden states and a last layer's weight, whose logits are never stored."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from torch import Tensor

from irl_ops import terms
from irl_ops.call import read_loss, read_stats
from irl_ops.options import signature
from irl_ops.torch import linear_ops, sharded_linear
from irl_ops.torch.backends import choose
from irl_ops.torch.forward import Loss, is_plain
from irl_ops.torch.gradients import asks_for_gradient
from irl_ops.torch.linear_arguments import arguments
from irl_ops.torch.linear_loss import LinearAtOnce
from irl_ops.torch.options import (
    LinearIQLearnOptions,
    LinearMLEOptions,
    LinearOnlineOptions,
    LinearStatsOptions,
)
from irl_ops.torch.parallel import is_dtensor, is_parallel
from irl_ops.torch.token_fields import TokenStats


@overload
def linear_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearIQLearnOptions[Tensor]],
) -> Tensor: ...


@overload
def linear_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearIQLearnOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def linear_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LinearIQLearnOptions[Tensor]],
) -> Loss: ...


@signature(LinearIQLearnOptions)
def linear_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearIQLearnOptions[Tensor]],
) -> Loss:
    r"""``iqlearn_loss`` of the logits hidden weight^T + bias, which are never stored.

    .. math:: q = c \tanh(s x / c), \qquad x = h W^T + b

    with s = ``logit_scale`` and c = ``softcap`` (q = s x without it). Chunks of rows go from the
    last to the first: the logits of one are computed, read once, overwritten by their gradient and
    multiplied back. The gradients are computed with the loss, in three matrix products. With
    reduction "none", and under ``torch.compile``, the logits are computed again in the backward
    pass.

    Args:
        hidden: float32, bfloat16 or float16 ``[..., T, D]``, or float64 as in ``iqlearn_loss``.
            Logits are rounded to this dtype; under ``torch.autocast`` to that one. All other
            arithmetic is float32.
        weight: ``[V, D]`` in hidden's dtype; tied or frozen as well.
        labels: int32 or int64 ``[..., T]``.
        bias: ``[V]`` in hidden's dtype, or None.
        chunk_size: rows per chunk; what is stored beside inputs and gradients is about one chunk of
            logits. By default 64 MiB of logits on a CPU (256 to 4096 rows), elsewhere 2048 rows.
        accumulate: the dtype in which chunks are added up for the gradient of weight: "float32",
            which takes 4 V D bytes until the gradient is rounded, or "weight", which rounds the sum
            after every chunk. By default "weight" on a CPU, "float32" elsewhere. Or a tensor of
            weight's shape, contiguous, in float32 (float64 for a float64 weight), such as
            Megatron's ``weight.main_grad``: every backward pass adds the gradient to it, unrounded
            and times the factor from above, and ``weight.grad`` gets nothing. Where the gradients
            come with the loss, chunks are added up in 4 V D bytes of their own until then; where
            the backward pass computes the logits again, in the tensor itself. Weight must require
            a gradient.
        logit_scale: factor of the logits, as in ``iqlearn_loss``.
        softcap: bound of the logits, or None, as in ``iqlearn_loss``.
        temperature: divides q, as in ``iqlearn_loss``.
        drop_rows: whether rows that have no label and that no row bootstraps from (prompts,
            padding) are left out of the products, with or without gradients. Their number has to be
            known for that: on a GPU the host waits for it once a pass. None does so on a CPU alone;
            False makes no shape depend on the labels. The result is the same.
        vocab_group: the processes that hold the other rows of weight, ``[V / r, D]`` each; hidden
            is the same on all of them, and its gradient comes summed over them. Each chunk has a
            collective of its own then, and ``chunk_size`` is the same on all of them. Under
            ``sequence_group`` the logits are computed again in the backward pass.
        return_metrics: as all that follow: see ``iqlearn_loss``. ``inplace`` changes nothing: the
            logits are nobody's.

    Returns:
        The loss, or ``(loss, metrics)``. Differentiable by hidden, weight, bias, ``values`` and
        ``next_values``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``iqlearn_loss``.

    Example:
        >>> hidden = torch.randn(2, 8, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> linear_iqlearn_loss(hidden, weight, torch.randint(100, (2, 8))).backward()
    """
    given = dict(options)
    return _loss(
        "linear_iqlearn_loss", LinearIQLearnOptions, terms.iqlearn, hidden, weight, labels, given,
        return_metrics,
    )  # fmt: skip


@overload
def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearMLEOptions[Tensor]],
) -> Tensor: ...


@overload
def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearMLEOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LinearMLEOptions[Tensor]],
) -> Loss: ...


@signature(LinearMLEOptions)
def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearMLEOptions[Tensor]],
) -> Loss:
    """``mle_loss`` of logits that are never stored; see ``linear_iqlearn_loss``.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 16), torch.randn(100, 16, requires_grad=True)
        >>> linear_mle_loss(hidden, weight, torch.randint(100, (2, 8))).backward()
    """
    given = dict(options)
    return _loss(
        "linear_mle_loss", LinearMLEOptions, terms.mle, hidden, weight, labels, given,
        return_metrics,
    )  # fmt: skip


@overload
def linear_online_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOnlineOptions[Tensor]],
) -> Tensor: ...


@overload
def linear_online_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearOnlineOptions[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def linear_online_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[LinearOnlineOptions[Tensor]],
) -> Loss: ...


@signature(LinearOnlineOptions)
def linear_online_iqlearn_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearOnlineOptions[Tensor]],
) -> Loss:
    """``online_iqlearn_loss`` of logits that are never stored; see ``linear_iqlearn_loss``.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 16), torch.randn(100, 16, requires_grad=True)
        >>> labels, is_expert = torch.randint(100, (2, 8)), torch.tensor([True, False])
        >>> linear_online_iqlearn_loss(hidden, weight, labels, is_expert).backward()
    """
    given = dict(options)
    return _loss(
        "linear_online_iqlearn_loss", LinearOnlineOptions, terms.online_iqlearn, hidden, weight,
        labels, given, return_metrics, is_expert,
    )  # fmt: skip


@signature(LinearStatsOptions)
def linear_token_stats(
    hidden: Tensor, weight: Tensor, labels: Tensor, **options: Unpack[LinearStatsOptions[Tensor]]
) -> TokenStats:
    """``token_stats`` of logits that are never stored; see ``linear_iqlearn_loss``.

    Differentiable by hidden, weight, bias, ``values`` and ``next_values``: the backward pass
    computes the logits once more, chunk by chunk. Value and entropy are those of every row, so that
    there is no ``drop_rows``.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 16), torch.randn(100, 16)
        >>> linear_token_stats(hidden, weight, torch.randint(100, (2, 8)), gamma=0.99).reward.shape
        torch.Size([2, 8])
    """
    given: dict[str, Any] = dict(options)
    if is_parallel(hidden, given) or is_dtensor(weight):
        return sharded_linear.stats_of_shards(
            "linear_token_stats", LinearStatsOptions, hidden, weight, labels, given
        )
    layer = arguments.layer(hidden, weight, given)
    call = read_stats(
        "linear_token_stats", LinearStatsOptions, arguments, _Logits(layer), labels, given
    )
    layer = layer._replace(scale=call.readout.logit_scale, softcap=call.readout.softcap)
    backend = choose(call.backend, layer.hidden, not call.measures.plain)
    return linear_ops.token_stats(call, layer, labels, backend)


def _loss(
    caller: str,
    group: type,
    terms_of: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Tensor | None = None,
) -> Loss:
    if is_parallel(hidden, options) or is_dtensor(weight):
        return sharded_linear.loss_of_shards(
            caller, group, terms_of, hidden, weight, labels, options, return_metrics, is_expert
        )
    layer = arguments.layer(hidden, weight, options)
    drop = arguments.drop_rows(layer.hidden, options)
    call = read_loss(
        caller, group, arguments, terms_of, _Logits(layer), labels, options, return_metrics,
        is_expert,
    )  # fmt: skip
    layer = layer._replace(scale=call.readout.logit_scale, softcap=call.readout.softcap)
    backend = choose(call.backend, layer.hidden)
    heads = call.heads
    inputs = (layer.hidden, layer.weight, layer.bias, heads.values, heads.next_values)
    wanted = asks_for_gradient(*inputs)
    summed = call.weighting.reduction != "none"
    if not (wanted and summed and is_plain(layer.hidden, labels)):
        return linear_ops.loss(call, layer, labels, drop, backend)
    box: list[Any] = []
    loss: Tensor = LinearAtOnce.apply(*inputs, labels, layer, call, drop, backend, None, box)  # type: ignore[no-untyped-call]
    (metrics,) = box
    return loss if metrics is None else (loss, metrics)


class _Logits:
    """The shape and place of logits that are never there."""

    def __init__(self, layer: Any) -> None:
        self.shape = (*layer.hidden.shape[:-1], layer.weight.shape[0])
        self.ndim, self.dtype, self.device = (
            len(self.shape),
            layer.hidden.dtype,
            layer.hidden.device,
        )
