"""The Pallas row kernels as operations that are lowered for the TPU generation at hand.

Which kernel an operation becomes is decided when a program is lowered, by the kind of the devices
that it is lowered for: those of the running backend, or of a topology that is compiled for ahead of
time. A program exported without devices gets what fits every generation. On a CPU the kernels are
interpreted, as they would be compiled for ``INTERPRETED_AS``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from irl_ops.kernels import reference
from irl_ops.kernels.pallas.generations import GENERATIONS, SMALLEST, Generation, generation

INTERPRETED_AS = GENERATIONS[-1]


def unavailable(platform: str) -> str | None:
    """Why this backend cannot serve ``platform``, or None."""
    if platform in ("tpu", "cpu"):
        return None
    return "the Pallas kernels are compiled for TPUs, and interpreted on a CPU"


def row_stats(
    logits: jax.Array, labels: jax.Array, entropy: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``."""
    row_max, logsum, picked, *h = _row_stats.bind(_widened(logits), labels, entropy=entropy)
    return row_max, logsum, picked, h[0] if entropy else None


def row_grad(
    logits: jax.Array,
    labels: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
) -> jax.Array:
    """``p_j (A + B log p_j) + C 1{j = label}``: by XLA where it fuses that into its readers.

    XLA computes an elementwise gradient inside the two matmuls that read it, if the logits come from
    a matmul, and then the gradient never lies in memory. By the compiler's own count that moves
    fewer bytes than a kernel on v4 to v6e, and more on v7x.
    """
    vectors = (labels, row_max, logsum, a, b, c)
    (dlogits,) = _row_grad.bind(_widened(logits), *vectors)
    return dlogits.astype(logits.dtype)


def row_stats_grad(
    logits: jax.Array, alpha: jax.Array, beta: jax.Array, entropy_weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """``(row_max, logsum, entropy, dlogits)`` in one read and one write."""
    weights = () if entropy_weight is None else (entropy_weight,)
    *stats, dlogits = _row_stats_grad.bind(_widened(logits), alpha, beta, *weights)
    h = stats[2] if weights else None
    return stats[0], stats[1], h, dlogits.astype(logits.dtype)


def _widened(logits: jax.Array) -> jax.Array:
    """TPUs have no float16; it is computed on in a float32 copy."""
    return logits.astype(jnp.float32) if logits.dtype == jnp.float16 else logits


# --- Operations: their types come from the reference, their programs from the tables ---


def _operation(
    name: str, plain: Callable[..., Any], kernel: Callable[[Generation, Any], Callable[..., Any]]
) -> Primitive:
    operation = Primitive(f"irl_{name}")
    operation.multiple_results = True

    def types(*given: Any, **static: Any) -> list[Any]:
        return jax.make_jaxpr(functools.partial(plain, **static))(*given).out_avals

    def eager(*given: Any, **static: Any) -> list[jax.Array]:
        return jax.jit(functools.partial(operation.bind, **static))(*given)

    def lower(interpret: bool, ctx: Any, *given: Any, **static: Any) -> Any:
        of = INTERPRETED_AS if interpret else _target(ctx)
        run = functools.partial(kernel(of, interpret), **static)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *given)

    operation.def_abstract_eval(types)
    operation.def_impl(eager)
    mlir.register_lowering(operation, functools.partial(lower, False), platform="tpu")
    mlir.register_lowering(operation, functools.partial(lower, True), platform="cpu")
    return operation


def _target(ctx: Any) -> Generation:
    """The generation that a program is lowered for."""
    backend = ctx.module_context.backend
    if backend is None or backend.platform != "tpu":
        return SMALLEST
    return generation(backend.devices()[0].device_kind)


def _listed(kernel: Callable[..., Any]) -> Callable[..., list[Any]]:
    def run(*given: Any, **static: Any) -> list[Any]:
        out = kernel(*given, **static)
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]

    return run


def _stats_kernel(of: Generation, interpret: bool) -> Callable[..., Any]:
    from irl_ops.kernels.pallas.row_stats import row_stats

    return _listed(functools.partial(row_stats, of=of, interpret=interpret))


def _grad_kernel(of: Generation, interpret: bool) -> Callable[..., Any]:
    from irl_ops.kernels.pallas.row_grad import row_grad

    if of.gradient_in_xla:
        return _listed(reference.row_grad)
    return _listed(functools.partial(row_grad, of=of, interpret=interpret))


def _stats_grad_kernel(of: Generation, interpret: bool) -> Callable[..., Any]:
    from irl_ops.kernels.pallas.row_stats_grad import row_stats_grad

    def run(logits: Any, alpha: Any, beta: Any, entropy_weight: Any = None) -> Any:
        return row_stats_grad(logits, alpha, beta, entropy_weight, of, interpret)

    return _listed(run)


_row_stats = _operation("row_stats", _listed(reference.row_stats), _stats_kernel)
_row_grad = _operation("row_grad", _listed(reference.row_grad), _grad_kernel)
_row_stats_grad = _operation(
    "row_stats_grad", _listed(reference.row_stats_grad), _stats_grad_kernel
)
