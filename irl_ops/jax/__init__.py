"""The losses for JAX. ``import irl_ops.jax as irl``, then ``irl.iqlearn_loss(...)``."""

from irl_ops.jax import sft as sft
from irl_ops.jax.backends import available_backends
from irl_ops.jax.linear import (
    linear_iqlearn_loss,
    linear_mle_loss,
    linear_online_iqlearn_loss,
    linear_token_stats,
)
from irl_ops.jax.losses import iqlearn_loss, mle_loss, online_iqlearn_loss
from irl_ops.jax.tokens import TokenStats, token_stats
from irl_ops.jax.value_loss import iq_value_loss

__all__ = [
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
