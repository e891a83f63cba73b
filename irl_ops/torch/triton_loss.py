"""Placeholder."""

from irl_ops.torch.plain_loss import loss as loss
