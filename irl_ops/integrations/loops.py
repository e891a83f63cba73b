"""A training loop of one's own, under accelerate, Fabric, DeepSpeed or torch.distributed.

The loss of a step is a sum over rows, divided by the number of labels in all micro-batches of all
processes. Loops divide and average a second time; ``whole_batch`` says by what to divide and what
to multiply back::

    num_items, factor = whole_batch(micro_batches, accelerator, shift=True)
    for batch in micro_batches:
        logits = model(batch["input_ids"]).logits
        loss = iqlearn_loss(logits, batch["labels"], shift=True, num_items=num_items)
        accelerator.backward(loss * factor)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irl_ops.integrations.batches import count_labels


class WholeBatch(NamedTuple):
    """By what the losses of a step are divided, and by what they are multiplied back."""

    num_items: Tensor
    """The labels of all micro-batches of all processes, 0-d; the option of the loss."""

    factor: float
    """What makes up for the means of the loop: its accumulation steps times its processes."""


def whole_batch(
    micro_batches: Iterable[Mapping[str, Any] | Tensor],
    loop: Any = None,
    *,
    shift: bool,
    ignore_index: int = -100,
) -> WholeBatch:
    """The number of labels of one optimiser step, and the factor of its losses.

    ========================  =====================================================
    ``loop``                  what it does to a loss, and ``factor`` undoes
    ========================  =====================================================
    None                      DDP and FSDP average over processes
    ``accelerate.Accelerator``  ``backward`` divides by ``gradient_accumulation_steps``; the same
    ``lightning.Fabric``      the same as None: ``fabric.backward`` divides by nothing
    a DeepSpeed engine        ``backward`` divides by its accumulation steps; the same
    ========================  =====================================================

    Args:
        micro_batches: of this process, all of the step: labels [B, T], or mappings that hold them
            as "labels", beside what marks packed documents (see ``batches.segment_ids``).
        loop: whoever's ``backward`` is called, out of the table.
        shift: what the loss is called with.
        ignore_index: likewise.

    Raises:
        TypeError: ``loop`` is something else.
        ValueError: no micro-batch.
        NotImplementedError: accelerate with tensor, context or sequence parallelism; Fabric's
            DeepSpeed strategy.
    """
    counts = [count_labels(b, shift=shift, ignore_index=ignore_index) for b in micro_batches]
    if not counts:
        raise ValueError("micro_batches is empty; accepted: all micro-batches of the step")
    steps, processes, device = _means(loop)
    num_items = torch.stack([count.to(device or counts[0].device) for count in counts]).sum()
    if processes > 1:
        torch.distributed.all_reduce(num_items)
    return WholeBatch(num_items, float(steps * processes))


def _means(loop: Any) -> tuple[int, int, Any]:
    """By how many steps and processes a loop divides, and on which device it works."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    if loop is None:
        return 1, torch.distributed.get_world_size() if initialised else 1, None
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(loop).__mro__}
    if "accelerate.Accelerator" in kinds:
        split = getattr(loop, "parallelism_config", None)
        for name in ("tp_size", "cp_size", "sp_size"):
            if getattr(split, name, 1) > 1:
                raise NotImplementedError(
                    f"parallelism_config.{name}={getattr(split, name)}: several processes see the "
                    "same rows, or parts of them; accepted: 1"
                )
        return loop.gradient_accumulation_steps, loop.num_processes, loop.device
    if kinds & {"lightning.Fabric", "lightning_fabric.Fabric"}:
        if "DeepSpeed" in type(loop.strategy).__name__:
            raise NotImplementedError(
                "Fabric with DeepSpeed was never tried; accepted: its other strategies"
            )
        return 1, loop.world_size, loop.device
    if "deepspeed.DeepSpeedEngine" in kinds:
        return loop.gradient_accumulation_steps(), loop.dp_world_size, loop.device
    raise TypeError(
        f"loop={type(loop).__name__}; accepted: None, accelerate.Accelerator, lightning.Fabric or "
        "a DeepSpeedEngine"
    )
