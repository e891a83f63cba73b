"""What the projects have in common: rows of logits without a sequence, and process groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from irl_ops.torch import linear_token_stats, token_stats


def entropy_of(logits: Tensor, **options: Any) -> Tensor:
    """The entropy of each row, ``[...]`` of logits ``[..., V]``."""
    if logits.ndim == 1:
        return entropy_of(logits[None], **options)[0]
    none = torch.full(logits.shape[:-1], -100, device=logits.device)
    entropy = token_stats(logits, none, **options).entropy
    assert entropy is not None
    return entropy


def of_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, entropy: bool = True, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of labels ``[...]`` and entropies, from hidden states ``[..., D]``.

    A weight in another dtype is brought into that of the hidden states, as the originals do.
    """
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        if options.get("bias") is not None:
            options["bias"] = options["bias"].to(hidden.dtype)
    stats = linear_token_stats(hidden, weight, labels.long(), entropy=entropy, **options)
    return stats.logprob, stats.entropy


def columns(group: Any, start: int | None = None) -> dict[str, Any]:
    """The options for logits whose columns are spread over the processes of a group.

    None where the group is one process, or where no processes were started. ``start`` is the first
    column of this process, which for shards of one width is known without.
    """
    if size_of(group) == 1:
        return {}
    whole = dist.group.WORLD if group is None else group
    return {"vocab_group": whole} | ({} if start is None else {"vocab_start": start})


def size_of(group: Any) -> int:
    """The number of processes in a group; of all of them for None."""
    if group is not None and hasattr(group, "size"):
        return int(group.size())
    started = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if started else 1
