"""Which arguments the losses accept, as arrays of JAX or NumPy. Bad ones raise when traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from irl_ops.arguments import Arguments


class JaxArguments(Arguments):
    """The checks for arrays, traced or not; what they are differentiated by shows later."""

    array, noun = "jax.Array", "array"
    floats = (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16"))
    integers = (jnp.dtype("int32"), jnp.dtype("int64"))
    weights = (*floats, jnp.dtype("float64"))
    flags = (jnp.dtype("bool"),)

    def is_array(self, x: Any) -> bool:
        """Whether ``x`` is an array; a ``numpy.float64`` is a number."""
        return isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(x, float)

    def is_real(self, x: Any) -> bool:
        """Whether an array holds floats or integers."""
        return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))


arguments = JaxArguments()
