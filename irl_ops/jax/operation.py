"""Operations that become a program only when lowered, for the devices at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

Function = Callable[..., Any]


def operation(plain: Function, **chosen: Callable[[Any], Function]) -> Any:
    """A primitive of the arrays that ``plain`` takes, which returns its results but for None.

    Args:
        plain: gives the types.
        **chosen: by platform, the function of the same arguments to lower, given jax's context of
            the lowering.
    """
    made: Any = Primitive("irl_" + plain.__name__.strip("_"))
    made.multiple_results = True

    def types(*given: Any, **static: Any) -> list[Any]:
        out: list[Any] = jax.make_jaxpr(functools.partial(plain, **static))(*given).out_avals
        return out

    def eager(*given: Any, **static: Any) -> list[jax.Array]:
        out: list[jax.Array] = jax.jit(functools.partial(made.bind, **static))(*given)
        return out

    def lower(choose: Callable[[Any], Function], ctx: Any, *given: Any, **static: Any) -> Any:
        run = functools.partial(_listed, choose(ctx), **static)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *given)

    made.def_abstract_eval(types)
    made.def_impl(eager)
    for platform, choose in chosen.items():
        mlir.register_lowering(made, functools.partial(lower, choose), platform=platform)
    return made


def device(ctx: Any, platform: str) -> Any:
    """The first device that is lowered for, None where a program is exported without devices.

    Of a topology that is compiled for ahead of time, its first.
    """
    backend = ctx.module_context.backend
    if backend is None or backend.platform != platform:
        return None
    return backend.devices()[0]


def _listed(run: Function, *given: Any, **static: Any) -> list[Any]:
    out = run(*given, **static)
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
