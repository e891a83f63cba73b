"""Log-probabilities for reinforcement learning in JAX: of ``tunix.rl.common``.

The lines that put it in the place of Tunix's own::

    python -m irl_ops.integrations.rl tunix
"""

from __future__ import annotations

import jax

from irl_ops.jax import token_stats

__all__ = ["selective_log_softmax"]


def selective_log_softmax(logits: jax.Array, input_ids: jax.Array) -> jax.Array:
    """Log-probabilities ``[...]`` of the tokens ``[...]``, from logits ``[..., V]``.

    float32 (of float64 logits, float64), from one read of the logits; one more and one write in the
    backward pass. A label of -100 is none: its log-probability is 0. Any other one out of range is
    NaN, where the original takes the nearest, or one counted from the end.
    """
    return token_stats(logits, input_ids, entropy=False).logprob
