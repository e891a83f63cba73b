"""What this package takes from inside JAX, which may rename it in any release: here, and only here.

Where a name is gone, ``missing()`` says so. Then the backends that make operations of their own,
"pallas", "triton" and "native", say it as their reason; "reference" needs none of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import mlir


def missing() -> str | None:
    """Why operations cannot be made with the JAX that runs, or None."""
    return _missing


def callback_missing() -> str | None:
    """Why a program cannot call Python through ``emit_callback``, or None."""
    if hasattr(mlir, "emit_python_callback"):
        return None
    return _gone("jax.interpreters.mlir.emit_python_callback")


def lower_with_devices(primitive: Any) -> None:
    """Lower ``primitive`` only once the devices of its program are known."""
    _requires_devices.add(primitive)


def platforms(ctx: Any) -> tuple[str, ...]:
    """The names of the platforms that a program is lowered for."""
    names: Sequence[str] = ctx.module_context.platforms
    return tuple(names)


def client(ctx: Any) -> Any:
    """What knows the devices of a lowering; None where a program is exported without devices."""
    return ctx.module_context.backend


def partitions(ctx: Any) -> int:
    """How many devices XLA partitions the program for; 1 inside ``shard_map``, and if unknown."""
    axes = ctx.module_context.axis_context
    if getattr(axes, "manual_axes", None):
        return 1
    return getattr(axes, "num_devices", None) or 1


def emit_callback(ctx: Any, call: Callable[..., Any], given: Sequence[Any]) -> Any:
    """The lowering of ``call``, without side effects, on NumPy arrays."""
    results, _, _ = mlir.emit_python_callback(
        ctx, call, None, given, ctx.avals_in, ctx.avals_out, has_side_effect=False
    )
    return results


def checks_varying(axis: Any) -> bool:
    """Whether the ``shard_map`` of this axis follows which arrays vary over it (``check_vma``)."""
    return bool(_varies_over(jax.lax.axis_index(axis)))


def gather(x: jax.Array, axis: Any) -> jax.Array:
    """``x`` of all devices of the axis, stacked on a new first one; the same on all of them.

    JAX's types know that it is the same, where they are checked.
    """
    if not checks_varying(axis):
        every: jax.Array = jax.lax.all_gather(x, axis)
    elif hasattr(jax.lax, "all_gather_invariant"):
        every = jax.lax.all_gather_invariant(x, axis)
    else:
        every = jax.lax.all_gather(x, axis, to="invarying")
    return every


def varying(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x``, whose type varies over the axes that ``like`` varies over too.

    In reverse that is the sum over those axes of which ``x`` was the same.
    """
    more = tuple(sorted(_varies_over(like) - _varies_over(x), key=str))
    if not more:
        return x
    if hasattr(jax.lax, "pcast"):
        wider: jax.Array = jax.lax.pcast(x, more, to="varying")
    else:
        wider = jax.lax.pvary(x, more)  # type: ignore[attr-defined]
    return wider


def _varies_over(x: Any) -> frozenset[Any]:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def _gone(name: str) -> str:
    return f"JAX {jax.__version__} has no {name}, which this backend is built on"


def _first_missing() -> str | None:
    named = {
        "jax.interpreters.mlir.LoweringRuleContext": ("module_context", "avals_in", "avals_out"),
        "jax.interpreters.mlir.ModuleContext": ("platforms", "backend", "axis_context"),
    }
    for path, attributes in named.items():
        fields = getattr(getattr(mlir, path.rpartition(".")[2], None), "__annotations__", {})
        for attribute in attributes:
            if attribute not in fields:
                return _gone(f"{path}.{attribute}")
    for name in ("register_lowering", "lower_fun"):
        if not hasattr(mlir, name):
            return _gone(f"jax.interpreters.mlir.{name}")
    return None


_missing: str | None
try:
    # has no public name; custom_partitioning's own primitive is in it
    from jax._src.dispatch import prim_requires_devices_during_lowering as _requires_devices
except ImportError:
    _requires_devices = set()
    _missing = _gone("jax._src.dispatch.prim_requires_devices_during_lowering")
else:
    _missing = _first_missing()
