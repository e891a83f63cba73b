"""Which arguments the losses accept, as arrays of JAX or NumPy. Bad ones raise when traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from irl_ops.arguments import Arguments
from irl_ops.jax.rows import constant

Array = jax.Array | np.ndarray[Any, Any]


class JaxArguments(Arguments):
    """The checks for arrays, traced or not; what they are differentiated by shows later."""

    array, noun = "jax.Array", "array"
    floats = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16", "float64")))
    integers = (jnp.dtype("int32"), jnp.dtype("int64"))
    weights = floats
    flags = (jnp.dtype("bool"),)

    def is_array(self, x: Any) -> bool:
        """Whether ``x`` is an array; a scalar of NumPy is a number."""
        return isinstance(x, jax.Array | np.ndarray)

    def is_real(self, x: Any) -> bool:
        """Whether an array holds floats or integers."""
        return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))

    def check_logits(self, logits: Any, labels: Any) -> None:
        """The checks of all frameworks, and ``check_wide``."""
        self.check_wide("logits", logits)
        super().check_logits(logits, labels)

    def check_wide(self, name: str, x: Any) -> None:
        """float64 needs JAX's 64-bit types, without which it would be rounded."""
        wide = self.is_array(x) and x.dtype == np.float64
        if wide and not jax.config.read("jax_enable_x64"):  # type: ignore[no-untyped-call]
            raise TypeError(
                f"{name} is float64 and JAX's 64-bit types are off; accepted: float32, bfloat16, "
                "float16, or jax_enable_x64"
            )

    def peek(self, x: Any) -> float | None:
        """The value of a 0-d array, where it lies in this machine's memory and is not traced."""
        return float(np.asarray(x)) if _at_hand(x) else None

    def known(self, name: str, x: Any) -> float:
        """The value of a 0-d array that a kernel is made for, which tracing hides."""
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"{name} is traced, and kernels are made for its value; accepted: a number, or an "
                "array outside of jit and its like (name it in static_argnames, or close over it)"
            )
        return float(x)

    def peek_list(self, x: Any) -> list[int] | None:
        """The values of an array, under the conditions of ``peek``."""
        listed: list[int] | None = np.asarray(x).tolist() if _at_hand(x) else None
        return listed

    def number(self, name: str, x: Any, *args: Any, **options: Any) -> Any:
        """A number or a 0-d array, which refuses to be differentiated by."""
        checked = super().number(name, x, *args, **options)
        return constant(name, checked) if isinstance(checked, jax.core.Tracer) else checked


def _at_hand(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, jax.core.Tracer):
        return False
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())


arguments = JaxArguments()
