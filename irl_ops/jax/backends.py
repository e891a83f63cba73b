"""Which row kernels serve a program.

A backend is a module with the functions of ``irl_ops.kernels.reference`` on JAX arrays, and
``unavailable(platform)``: None, or why it cannot serve that platform. By default it is chosen when
a program is lowered, so that one program can be compiled for another platform than the one at hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax import lax

from irl_ops.jax import native, pallas, plain, triton

BACKENDS: dict[str, ModuleType] = {  # fastest first
    "pallas": pallas,
    "triton": triton,
    "native": native,
    "reference": plain,
}
PLATFORMS = ("tpu", "cuda", "cpu")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first.

    Any of them can be given as ``backend=`` to the functions of this package. "pallas" works on a
    CPU too, interpreted, for tests.
    """
    here = {"cpu", jax.default_backend()}
    return tuple(
        name
        for name, backend in BACKENDS.items()
        if any(backend.unavailable(platform) is None for platform in here)
    )


def check_backend(name: str, logits: Any) -> str:
    """``name``, or what the environment variable IRL_OPS_BACKEND says in the place of "auto";
    an empty one says nothing.

    Raises:
        ValueError: the backend is unknown, or cannot serve the device that holds the logits; says
            why. Of traced logits no device is known before the program is lowered.
    """
    source = "backend"
    if name == "auto":
        source, name = "IRL_OPS_BACKEND", os.environ.get("IRL_OPS_BACKEND") or "auto"
    if name == "auto":
        return name
    if name not in tuple(BACKENDS):
        accepted = ", ".join(["'auto'", *(f"'{n}'" for n in BACKENDS)])
        raise ValueError(f"{source} is {name!r}; accepted: {accepted}")
    if isinstance(logits, jax.Array) and not isinstance(logits, jax.core.Tracer):
        platform = next(iter(logits.devices())).platform
        reason = BACKENDS[name].unavailable(platform)
        if reason is not None:
            asked = "" if source == "backend" else f" (from {source})"
            raise ValueError(f"backend {name!r}{asked} cannot serve logits on {platform}: {reason}")
    return name


def fastest(platform: str) -> str:
    """The name of the fastest backend that serves ``platform``."""
    # Pallas on a CPU is its interpreter, which is asked for by name
    names = (n for n in BACKENDS if not (n == "pallas" and platform == "cpu"))
    return next(n for n in names if BACKENDS[n].unavailable(platform) is None)


def dispatch(backend: str, function: Callable[[str], Callable[..., Any]], *arrays: Any) -> Any:
    """``function(name)(*arrays)`` for the backend of that name.

    For "auto" the name is that of the fastest on the platform that the program is lowered for; the
    results of all have the same types.
    """
    if backend != "auto":
        return function(backend)(*arrays)
    names = {platform: fastest(platform) for platform in PLATFORMS}
    if set(names.values()) == {"reference"}:
        return function("reference")(*arrays)
    served = {platform: function(name) for platform, name in names.items()}
    return lax.platform_dependent(*arrays, default=function("reference"), **served)
