"""Which row kernels serve a call.

A backend is a module with ``row_stats``, ``row_grad``, ``row_stats_grad``, ``label_logit``,
``set_label_`` and ``scale_`` on torch tensors, and ``unavailable(device)``: None, or why it cannot
serve that device.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from irl_ops.torch import native, plain, triton

BACKENDS: dict[str, ModuleType] = {  # fastest first
    "triton": triton,
    "native": native,
    "reference": plain,
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first.

    Any of them can be given as ``backend=`` to the functions of this package.
    """
    return tuple(
        name
        for name, backend in BACKENDS.items()
        if any(backend.unavailable(device) is None for device in devices())
    )


def devices() -> list[torch.device]:
    """The devices of this machine, one of each type: the CPU, and the accelerator if any."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device("cpu"), *([accelerator] if accelerator else [])]


def choose(name: str, device: torch.device) -> str:
    """The backend for tensors on ``device``; "auto" is the fastest that serves it.

    The environment variable IRL_OPS_BACKEND, where set, replaces "auto".

    Raises:
        ValueError: the backend is unknown, or cannot serve the device; says why.
    """
    if name == "auto":
        name = os.environ.get("IRL_OPS_BACKEND", "auto")
    if name == "auto":
        # Triton on a CPU is its interpreter, which is asked for by name
        names = (n for n in BACKENDS if not (n == "triton" and device.type == "cpu"))
        return next(n for n in names if BACKENDS[n].unavailable(device) is None)
    if name not in tuple(BACKENDS):
        accepted = ", ".join(["'auto'", *(f"'{n}'" for n in BACKENDS)])
        raise ValueError(f"backend is {name!r}; accepted: {accepted}")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot serve logits on {device.type}: {reason}")
    return name
