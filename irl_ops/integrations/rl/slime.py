"""The log-probabilities of slime: of ``slime.utils.ppo_utils``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from irl_ops.integrations.rl.rows import columns, entropy_of
from irl_ops.torch import token_stats


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of tokens, and entropies on request.

    Args:
        logits: ``[T, V]``; of the columns, this process has an equal part.
        tokens: ``[T]``, of the whole vocabulary.
        tp_group: the processes that share the vocabulary; None for all that were started.
        with_entropy: whether entropies are computed.
        chunk_size: changes nothing: no row of probabilities is stored.
        log_prob_keep_mask: bool of the logits' shape, or None: the columns that the sampler could
            draw. The token itself always counts as one. Entropies are of all columns, for which
            the logits are read once more.
        with_entropy_grad: whether the entropies can be differentiated.

    Returns:
        Log-probabilities ``[T, 1]``, and entropies ``[T]`` or None; both ``[0]`` for no rows.
    """
    if logits.shape[0] == 0:
        empty = logits.new_zeros((0,))
        return empty, empty.clone() if with_entropy else None
    shared = columns(tp_group)
    if log_prob_keep_mask is None:
        stats = token_stats(
            logits, tokens, entropy=with_entropy, entropy_grad=with_entropy_grad, **shared
        )
        return stats.logprob[:, None], stats.entropy
    kept = _with_tokens(log_prob_keep_mask, tokens, shared)
    logprob = token_stats(logits, tokens, keep_mask=kept, entropy=False, **shared).logprob
    if not with_entropy:
        return logprob[:, None], None
    whole = logits if with_entropy_grad else logits.detach()
    return logprob[:, None], entropy_of(whole, **shared)


def _with_tokens(keep: Tensor, tokens: Tensor, shared: dict[str, Any]) -> Tensor:
    """The mask, in which each row's own token is kept, where its column is in this process."""
    width = keep.shape[-1]
    start = shared["vocab_group"].rank() * width if shared else 0
    column = tokens.long() - start
    here = (column >= 0) & (column < width)
    column = column.clamp(0, width - 1)[:, None]
    own = keep.gather(-1, column) | here[:, None]
    return keep.scatter(-1, column, own)
