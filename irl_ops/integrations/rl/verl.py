"""The log-probabilities of verl: of ``verl.utils.torch_functional`` and its fused heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.integrations.rl.rows import columns, of_hidden
from irl_ops.torch import token_stats


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities ``[...]`` of labels ``[...]``, from logits ``[..., V]``.

    ``inplace_backward`` changes nothing: the gradient gets storage of its own.
    """
    return token_stats(logits, labels.long(), entropy=False).logprob


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the logits hidden weight^T / temperature, never stored.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``; of its rows, this process has an equal part where a group is given.
        labels: integers of hidden's shape without its last axis, of the whole vocabulary.
        temperature: a number above 0.
        reduction: "none", "sum" or "mean" of the log-probabilities; entropies are not reduced.
        dist_process_group: the processes that share the vocabulary, or None.

    Returns:
        ``(logprobs, entropy)``, flattened to ``[N]``; logprobs 0-d for "sum" and "mean".

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'sum', 'mean'")
    shared = {} if dist_process_group is None else columns(dist_process_group)
    logprobs, entropy = of_hidden(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        **shared,
    )
    assert entropy is not None
    if reduction == "none":
        return logprobs, entropy
    return logprobs.sum() if reduction == "sum" else logprobs.mean(), entropy


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropies from hidden states, in chunks of ``chunk_size`` rows.

    ``impl_backend``, which verl 0.9 has, changes nothing.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """``(log_probs, entropy)`` of input_ids' shape.

        Args:
            hidden_states: ``[..., T, D]``.
            vocab_weights: ``[V, D]``.
            input_ids: integers ``[..., T]``.
            temperature: a number above 0.
        """
        log_probs, entropy = of_hidden(
            hidden_states,
            vocab_weights,
            input_ids,
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        assert entropy is not None
        return log_probs, entropy
