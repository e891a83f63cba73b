"""``q = softcap tanh(logit_scale x / softcap)``: from what lies in memory to the logits of a row.

-inf stays -inf under a cap, so that what is masked gets no mass, and has the slope 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Softcap(NamedTuple):
    """Constants of a kernel; the default costs nothing."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, x: jax.Array) -> jax.Array:
        """q of a float32 x."""
        if self.softcap is not None:
            q = self.softcap * jnp.tanh(x * (self.logit_scale / self.softcap))
            return jnp.where(x == -jnp.inf, x, q)
        return x if self.logit_scale == 1.0 else x * self.logit_scale

    def behind(self, gradient: jax.Array, q: jax.Array) -> jax.Array:
        """dL/dx of dL/dq: ``logit_scale (1 - (q / softcap)^2)`` times it; 0 stays 0, NaN or not."""
        if self.softcap is None:
            return gradient if self.logit_scale == 1.0 else gradient * self.logit_scale
        tanh = q * (1.0 / self.softcap)
        slope = self.logit_scale * (1.0 - tanh * tanh)
        return jnp.where((gradient == 0.0) | (q == -jnp.inf), 0.0, gradient * slope)
