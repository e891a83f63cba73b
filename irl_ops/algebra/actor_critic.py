"""What a policy gradient is made of, on ``[..., T]`` arrays whose row t takes action a_t."""

from __future__ import annotations

from typing import Any

Array = Any
Scalar = Any


def advantages(
    xp: Any,
    reward: Array,
    value: Array,
    next_value: Array,
    follows: Array,
    gamma: Scalar,
    decay: Scalar,
) -> Array:
    """Generalised advantages A_t = delta_t + gamma decay A_{t+1}, delta_t = r_t + gamma V'_t - V_t.

    The recurrence is unrolled by doubling: as many passes over the rows as log2 T.

    Args:
        xp: the namespace of the arrays.
        reward: r_t; 0 in rows that are no step of an episode.
        value: V_t; likewise.
        next_value: V'_t; 0 behind the end of an episode.
        follows: bool, whether row t + 1 is the episode's next step.
        gamma: discount.
        decay: the lambda of the average over horizons; 1 takes the whole return, 0 one step.

    Returns:
        A_t, ``[..., T]``; A_t + V_t is what V_t is to predict.
    """
    total = reward + gamma * next_value - value
    factor = gamma * decay * xp.astype(follows, total.dtype)
    step = 1
    while step < total.shape[-1]:
        total = total + factor * _ahead(xp, total, step)
        factor = factor * _ahead(xp, factor, step)
        step *= 2
    return total


def policy_rows(
    xp: Any, logprob: Array, old_logprob: Array, advantage: Array, clip: float | None
) -> Array:
    """-A log pi (A2C), or with ``clip`` PPO's -min(rho A, clip(rho, 1 - clip, 1 + clip) A).

    rho = pi / pi_old. Where rho is 1, both have the same gradient.
    """
    if clip is None:
        return -advantage * logprob
    ratio = xp.exp(logprob - old_logprob)
    return -xp.minimum(ratio * advantage, xp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def _ahead(xp: Any, x: Array, step: int) -> Array:
    """``x[..., t + step]`` at t, 0 beyond the last row."""
    return xp.concat([x[..., step:], xp.zeros_like(x[..., :step])], axis=-1)
