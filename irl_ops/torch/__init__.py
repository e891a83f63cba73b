"""The losses for PyTorch. ``import irl_ops.torch as irl``, then ``irl.iqlearn_loss(...)``."""

from irl_ops.torch import sft as sft
from irl_ops.torch.backends import available_backends
from irl_ops.torch.linear import (
    linear_iqlearn_loss,
    linear_mle_loss,
    linear_online_iqlearn_loss,
    linear_token_stats,
)
from irl_ops.torch.losses import iqlearn_loss, mle_loss, online_iqlearn_loss
from irl_ops.torch.modules import IQLearnLoss, LinearIQLearnLoss
from irl_ops.torch.tokens import TokenStats, token_stats
from irl_ops.torch.value_loss import iq_value_loss

__all__ = [
    "IQLearnLoss",
    "LinearIQLearnLoss",
    "TokenStats",
    "available_backends",
    "iq_value_loss",
    "iqlearn_loss",
    "linear_iqlearn_loss",
    "linear_mle_loss",
    "linear_online_iqlearn_loss",
    "linear_token_stats",
    "mle_loss",
    "online_iqlearn_loss",
    "token_stats",
]
