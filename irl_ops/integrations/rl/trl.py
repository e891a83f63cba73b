"""The log-probabilities of TRL 1.16: of ``trl.trainer.utils`` and ``trl.kernels``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from irl_ops.integrations.rl.rows import entropy_of
from irl_ops.torch import linear_token_stats, token_stats


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the tokens in ``index``.

    Args:
        logits: ``[..., V]``.
        index: ``[...]``, or ``[..., K]`` for K tokens per row, of which one may be there twice.
        temperature: divides the logits; a number above 0.
        row_mask: of index's shape, or None: where it is 0, the result is 0 without a gradient, and
            for one token per row the logits are not looked at.

    Returns:
        Tensor: of index's shape.

    Raises:
        ValueError: a temperature of 0 or below, or shapes that do not match.
    """
    _check(temperature)
    if index.ndim < logits.ndim:
        where = None if row_mask is None else row_mask != 0
        return token_stats(
            logits, index, temperature=temperature, where=where, entropy=False
        ).logprob
    none = torch.full(logits.shape[:-1], -100, device=logits.device)
    stats = token_stats(logits, none, temperature=temperature, extra_ids=index, entropy=False)
    assert stats.extra_logprob is not None
    if row_mask is None:
        return stats.extra_logprob
    return stats.extra_logprob.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each row, ``[...]`` of logits ``[..., V]``.

    ``chunk_size`` changes nothing: no row of probabilities is stored.
    """
    return entropy_of(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both, from one read of the logits; as ``selective_log_softmax`` for one token per row.

    Both results are 0 without a gradient where ``row_mask`` is 0.
    """
    _check(temperature)
    where = None if row_mask is None else row_mask != 0
    stats = token_stats(
        logits, index, temperature=temperature, where=where, entropy_grad=entropy_requires_grad
    )
    assert stats.entropy is not None
    if where is None:
        return stats.logprob, stats.entropy
    return stats.logprob, stats.entropy.masked_fill(~where, 0.0)


OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """What TRL's fused heads call, and so GRPO, RLOO, DPO, KTO and SFT with their defaults."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Statistics of the logits hidden weight^T + bias, which are never stored.

        Args:
            hidden: ``[N, D]``.
            weight: ``[V, D]``; brought into the dtype of hidden, or that of autocast.
            bias: ``[V]``, or None.
            targets: ``[N]``.
            temperature: divides the logits, after the soft cap.
            chunk_size: changes nothing: TRL cuts the vocabulary, ``linear_token_stats`` the rows.
            final_logit_softcapping: bound of the logits, or None.
            logit_scale: factor of the logits, above 0.
            outputs: which of the others are computed.

        Returns:
            Log-probabilities, entropies, log sum_j p_j^2, the logits' means, and whether the target
            is the first of the largest logits: ``[N]`` each, None where it is not in ``outputs``.
            The first two can be differentiated.

        Raises:
            RuntimeError: DeepSpeed's ZeRO-3, which takes the weight away until the backward pass.
        """
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "irl_ops: weight is partitioned by DeepSpeed's ZeRO-3; accepted: a whole one, as "
                "with ZeRO-2, FSDP2 or DDP"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = (None if x is None else x.to(hidden.dtype) for x in (weight, bias))  # type: ignore[assignment]
        names = {"log_sum_sq_probs": "log_sum_sq", "mean_logits": "mean_logit", "is_top1": "top1"}
        extras: Any = tuple(ours for theirs, ours in names.items() if theirs in outputs)
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            entropy="entropy" in outputs,
            extras=extras,
        )
        square, mean = (
            None if x is None else x.detach() for x in (stats.log_sum_sq, stats.mean_logit)
        )
        top1 = None if stats.top1 is None else stats.top1 == targets
        return stats.logprob, stats.entropy, square, mean, top1


def _check(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; accepted: a number above 0")
