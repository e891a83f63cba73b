"""Schedules of ``lam``: plain functions of the step.

Early in fine-tuning the logits are not yet the Q-values of anything, so the TD term is best brought
in after some steps of maximum likelihood::

    lam  |            ____________
         |           /            \\
         |          /              \\_________  final
       0 |_________/
         +--------|-|-------------|-|-------> step
           warmup   ramp          anneal

A schedule is any function of the step. Fix the other arguments of this one with
``functools.partial``, and it is one: ``partial(warmup_ramp, lam=0.1, warmup_steps=500)``.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["warmup_ramp"]

SHAPES = ("linear", "cosine")


def warmup_ramp(
    step: Any,
    *,
    lam: float,
    warmup_steps: int,
    ramp_steps: int = 0,
    anneal_start: int | None = None,
    anneal_steps: int = 0,
    final: float = 0.0,
    shape: str = "linear",
) -> Any:
    """Zero, then a ramp to ``lam``, then, where asked for, an anneal to ``final``.

    With s(x) = x (linear) or (1 - cos πx)/2 (cosine) on x clipped to [0, 1], and a step
    up where a length is 0::

        up   = s((step - warmup_steps) / ramp_steps)
        down = s((step - anneal_start) / anneal_steps)      0 without anneal_start
        lam(step) = lam * up * (1 - down) + final * down

    So it is exactly 0 before step ``warmup_steps``, exactly ``lam`` from ``warmup_steps +
    ramp_steps`` to ``anneal_start``, and exactly ``final`` from ``anneal_start + anneal_steps`` on.

    Args:
        step: the optimiser step, counted from 0. A Python number, or an array of any shape of
            NumPy, torch or JAX, traced ones included.
        lam: the value after the ramp, 0 or more.
        warmup_steps: steps of plain maximum likelihood (lam = 0).
        ramp_steps: steps from 0 to ``lam``; 0 jumps.
        anneal_start: the step at which the anneal starts, not before the ramp has ended. None: no
            anneal.
        anneal_steps: steps from ``lam`` to ``final``; 0 jumps.
        final: the value after the anneal, 0 or more. Without ``anneal_start`` it has no effect.
        shape: "linear" or "cosine", of the ramp and of the anneal.

    Returns:
        A float for a Python number, else an array like ``step``.

    Raises:
        ValueError: for a negative or non-finite number, an unknown shape, ``anneal_steps`` without
            ``anneal_start``, or an anneal that starts before the ramp has ended.
    """
    for name, value in (("lam", lam), ("final", final)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}; accepted: a finite number, 0 or more")
    for name, steps in (
        ("warmup_steps", warmup_steps),
        ("ramp_steps", ramp_steps),
        ("anneal_steps", anneal_steps),
    ):
        if steps < 0:
            raise ValueError(f"{name}={steps}; accepted: 0 or more")
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}; accepted: {', '.join(map(repr, SHAPES))}")
    if anneal_start is None and anneal_steps:
        raise ValueError(f"anneal_steps={anneal_steps} needs anneal_start, the step it starts at")
    if anneal_start is not None and anneal_start < warmup_steps + ramp_steps:
        raise ValueError(
            f"anneal_start={anneal_start} is before the ramp has ended; accepted: "
            f"warmup_steps + ramp_steps = {warmup_steps + ramp_steps} or more"
        )

    up = _rise(step - warmup_steps, ramp_steps, shape)
    if anneal_start is None:
        return lam * up
    down = _rise(step - anneal_start, anneal_steps, shape)
    return lam * up * (1 - down) + final * down


def _rise(steps: Any, length: int, shape: str) -> Any:
    """From exactly 0 to exactly 1 over ``length`` steps, without a branch on a traced ``steps``."""
    if length == 0:
        return 1.0 * (steps >= 0)
    x = steps / length
    s = (1 - _cos(math.pi * x)) / 2 if shape == "cosine" else x
    return s * ((x > 0) & (x < 1)) + (x >= 1)


def _cos(x: Any) -> Any:
    if isinstance(x, float):
        return math.cos(x)
    from array_api_compat import array_namespace

    return array_namespace(x).cos(x)
