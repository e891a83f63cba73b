"""The log-probabilities of OpenRLHF: of ``openrlhf.models.utils``."""

from __future__ import annotations

from torch import Tensor

from irl_ops.integrations.rl.rows import entropy_of
from irl_ops.torch import token_stats


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``[...]`` of labels ``[...]``, from logits ``[..., V]``.

    The original divides the logits in place; here they stay what they are.
    """
    return token_stats(logits, labels.long(), temperature=temperature, entropy=False).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    """The entropy of each row, ``[...]`` of logits ``[..., V]``."""
    return entropy_of(logits)
