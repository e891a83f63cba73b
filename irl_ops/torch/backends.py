"""Which row kernels serve a call.

A backend is a module with ``row_stats``, ``row_grad``, ``row_stats_grad``, ``label_logit``,
``set_label_`` and ``scale_`` on torch tensors, and ``unavailable(device)``: None, or why it cannot
serve that device. All but ``scale_`` take ``logit_scale`` and ``softcap``, as
``irl_ops.kernels.reference`` does. ``row_measures`` and ``row_measures_grad`` may be missing.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from irl_ops.torch import native, plain, triton

BACKENDS: dict[str, ModuleType] = {  # fastest first
    "triton": triton,
    "native": native,
    "reference": plain,
}

ON_CPU = tuple(name for name in BACKENDS if name != "triton")


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


def choose(name: str, logits: Tensor, measures: bool = False) -> str:
    """The backend for ``logits``; "auto" is the fastest that serves their device and dtype.

    ``measures``: whether it has to have ``row_measures``, which not all have.

    The environment variable IRL_OPS_BACKEND, where set and not empty, replaces "auto".

    Raises:
        ValueError: the backend is unknown, or cannot serve the logits; says why.
    """
    option = "backend"
    if name == "auto" and (named := os.environ.get("IRL_OPS_BACKEND")):
        option, name = "the environment variable IRL_OPS_BACKEND", named
    device, dtype = logits.device, logits.dtype
    if name == "auto":
        # Triton on a CPU is its interpreter, which is asked for by name
        for known in ON_CPU if logits.is_cpu else BACKENDS:
            if reason_against(known, device, dtype, measures) is None:
                return known
    if name not in tuple(BACKENDS):
        accepted = ", ".join(["'auto'", *(f"'{n}'" for n in BACKENDS)])
        raise ValueError(f"{option} is {name!r}; accepted: {accepted}")
    reason = reason_against(name, device, dtype, measures)
    if reason is not None:
        raise ValueError(
            f"{option} {name!r} cannot serve {dtype} logits on {device.type}: {reason}"
        )
    return name


def reason_against(
    name: str, device: torch.device, dtype: torch.dtype, measures: bool
) -> str | None:
    """Why a backend cannot serve logits of that device and dtype, or None."""
    reason: str | None = BACKENDS[name].unavailable(device)
    if reason is None and dtype == torch.float64 and name != "reference":
        return "its arithmetic is float32; float64 is computed by 'reference' alone"
    if reason is None and measures and not hasattr(BACKENDS[name], "row_measures"):
        return (
            "it has no kernels for a temperature by row, extra_ids, keep_mask, keep_above and "
            "extras; accepted: backend='auto' or 'reference'"
        )
    return reason
