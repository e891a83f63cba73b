"""Offline IQLearn as it is written down, in plain torch: the peer that a user would start from."""

import torch
from torch import Tensor


def iqlearn_loss(logits: Tensor, labels: Tensor, lam: float = 0.1, gamma: float = 1.0) -> Tensor:
    """Every row labelled, the last one of each sequence terminal; float32 arithmetic."""
    q = logits.float()
    value = torch.logsumexp(q, -1)
    picked = q.gather(-1, labels[..., None])[..., 0]
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    td = picked - gamma * next_value
    return (value - picked + lam * td**2).mean()
