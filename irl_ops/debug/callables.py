"""A function of logits and labels as the set-up, in torch, JAX or NumPy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from irl_ops.debug.arrays import as_is, dtype_name, framework, size, to_numpy
from irl_ops.debug.seen import BATCH_KEYS, Part, Seen, Slopes


def see_callable(
    target: Callable[..., Any], batch: Any, num_items: Any, reduction: str, gradient: bool
) -> Seen:
    """Calls ``target(logits, labels, **rest of the batch)``, with a gradient by the logits."""
    if not isinstance(batch, Mapping) or not {"logits", "labels"} <= set(batch):
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batch={given}; accepted for a function: a mapping with 'logits' [..., T, V] and "
            "'labels' [..., T], and what else the function takes by name"
        )
    rest = {name: x for name, x in batch.items() if name not in ("logits", "labels")}
    logits, labels = batch["logits"], batch["labels"]
    kind = framework(logits)
    if kind is None:
        raise TypeError(f"logits is a {type(logits).__name__}; accepted: a tensor or an array")
    call = _caller(target, labels, rest, num_items)
    run = {"torch": _torch, "jax": _jax, "numpy": _numpy}[kind]
    loss, dlogits = run(call, logits, reduction, gradient)
    part = Part(logits, labels, {n: as_is(x) for n, x in rest.items() if n in BATCH_KEYS})
    if dlogits is not None:
        found = to_numpy(dlogits).astype(np.float32)
        part.slopes = Slopes("the logits", found, lambda x: x, dtype_name(dlogits))
    return Seen(float(to_numpy(loss)), dtype_name(loss), [part])


def _caller(
    target: Callable[..., Any], labels: Any, rest: dict[str, Any], num_items: Any
) -> Callable[[Any], Any]:
    """The function of the logits; a ``compute_loss_func`` of a Trainer is called as one."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        names = []
    if names[:1] == ["outputs"]:
        more = {"num_items_in_batch": num_items} if num_items is not None else {}
        return lambda logits: target({"logits": logits}, labels, **more, **rest)
    return lambda logits: target(logits, labels, **rest)


def _scalar(out: Any, reduction: str) -> Any:
    """The loss in what a function returns: that, the first of a tuple, or the sum of rows."""
    loss = out[0] if isinstance(out, tuple | list) else out
    if isinstance(loss, float | int):
        return np.float64(loss)
    if loss.ndim and size(loss) != [1]:
        if reduction != "none":
            raise TypeError(
                f"the loss has shape {size(loss)}; accepted: one number, or one for each row with "
                "check(..., reduction='none')"
            )
        return loss.sum()
    return loss.reshape(())


def _torch(call: Callable[[Any], Any], logits: Any, reduction: str, gradient: bool) -> Any:
    import torch

    leaf = logits.detach().clone().requires_grad_(gradient)
    loss = _scalar(call(leaf), reduction)
    if not gradient or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return loss, None
    (dlogits,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(leaf) if dlogits is None else dlogits


def _jax(call: Callable[[Any], Any], logits: Any, reduction: str, gradient: bool) -> Any:
    import jax

    def loss(x: Any) -> Any:
        return _scalar(call(x), reduction)

    return jax.value_and_grad(loss)(logits) if gradient else (loss(logits), None)


def _numpy(call: Callable[[Any], Any], logits: Any, reduction: str, gradient: bool) -> Any:
    return _scalar(call(logits), reduction), None
