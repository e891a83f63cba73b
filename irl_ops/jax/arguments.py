"""Which arguments the losses accept, as arrays of JAX or NumPy. Bad ones raise when traced."""

from __future__ import annotations

import copy
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from irl_ops.algebra import BAD_LABEL, Sequence
from irl_ops.arguments import Arguments
from irl_ops.call import Parallel
from irl_ops.jax.rows import constant

Array = jax.Array | np.ndarray[Any, Any]


class JaxArguments(Arguments):
    """The checks for arrays, traced or not; what they are differentiated by shows later."""

    array, noun = "jax.Array", "array"
    floats = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16", "float64")))
    integers = (jnp.dtype("int32"), jnp.dtype("int64"))
    weights = floats
    flags = (jnp.dtype("bool"),)
    parallel = Parallel()

    def over(self, options: dict[str, Any]) -> Self:
        """The checks for a device's part of rows and columns; takes its options out of the others.

        Raises:
            TypeError, ValueError: an axis that no ``shard_map`` has, or what needs one without it.
        """
        names = {
            "vocab_axis": ("vocab_start", "vocab_size"),
            "sequence_axis": ("sequence_order",),
        }
        found: list[Any] = []
        for name, others in names.items():
            axis = options.pop(name, None)
            _check_axis(name, axis)
            found.append(axis)
            for other in others:
                found.append(options.pop(other, None))
                if axis is None and found[-1] is not None:
                    raise ValueError(f"{other} is given without {name}; accepted: both, or neither")
        made = copy.copy(self)
        made.parallel = given = Parallel(*found)
        if set(_names(given.vocab_group)) & set(_names(given.sequence_group)):
            raise ValueError(
                f"vocab_axis is {given.vocab_group!r} and sequence_axis {given.sequence_group!r}; "
                "accepted: different axes"
            )
        return made

    def sequence(self, labels: Any, vocab: int, given: Sequence) -> Sequence:
        """Those of whole sequences and of the whole vocabulary."""
        return super().sequence(labels, self._vocabulary(labels, vocab), given)

    def _vocabulary(self, labels: Any, width: int) -> int:
        """Its size, of which ``width`` columns are here."""
        given: Any = self.parallel
        axis, start, size, _, order = given
        if order is not None:
            self._check_array("sequence_order", order, self.integers)
            if order.shape not in (labels.shape[-1:], labels.shape):
                raise ValueError(
                    f"sequence_order has shape {list(order.shape)}; accepted: "
                    f"{list(labels.shape[-1:])}, or {list(labels.shape)}: an index for each row "
                    "that is here"
                )
        if axis is None:
            return width
        if start is not None:
            self.number("vocab_start", start, labels, 0, BAD_LABEL)
            whole = start.dtype in self.integers if self.is_array(start) else start == int(start)
            if not whole:
                what = start.dtype if self.is_array(start) else repr(start)
                raise TypeError(f"vocab_start is {what}; accepted: an int, or a 0-d int32 or int64")
        most = width * jax.lax.axis_size(axis)
        if size is None:
            return int(most)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise ValueError(
                f"vocab_size is {size!r}; accepted: an int from 1 to the {most} columns of all "
                "devices, None"
            )
        return size

    def _check_offsets(self, cu_seqlens: Any, labels: Any) -> None:
        """Offsets of the whole's rows, of which the labels' are a part."""
        axis = self.parallel.sequence_group
        if axis is not None and labels.ndim == 1:
            rows = labels.shape[0] * jax.lax.axis_size(axis)
            labels = jax.ShapeDtypeStruct((rows,), labels.dtype)  # type: ignore[no-untyped-call]
        super()._check_offsets(cu_seqlens, labels)

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


def _names(axis: Any) -> tuple[Any, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _check_axis(name: str, axis: Any) -> None:
    if not all(isinstance(x, str) for x in _names(axis)) or axis == ():
        raise TypeError(f"{name} is {axis!r}; accepted: a name, a tuple of names, None")
    for x in _names(axis):
        try:
            jax.lax.axis_size(x)
        except NameError:
            raise ValueError(
                f"{name} is {axis!r}, and {x!r} is no axis here; accepted: a manual axis of the "
                "shard_map that the loss is called in"
            ) from None


def _at_hand(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, jax.core.Tracer):
        return False
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())


arguments = JaxArguments()
