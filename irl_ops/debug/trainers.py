"""A Transformers Trainer as the set-up: what it would differentiate in its first step."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from irl_ops.debug.arrays import as_is, dtype_name
from irl_ops.debug.modules import given_options, see_step, shifts, unrecorded, unwrapped
from irl_ops.debug.seen import Part, Seen


def see_trainer(trainer: Any, batch: Any, gradient: bool) -> Seen:
    """Its ``training_step`` on the micro-batches of one step, without backward and update."""
    if hasattr(trainer, "sampler") and hasattr(trainer, "buffer"):
        raise TypeError(
            f"target is a {type(trainer).__name__}, which samples its policy for each step; "
            "accepted: a Trainer whose loss is iqlearn_loss"
        )
    device = trainer.args.device
    with torch.random.fork_rng(), untouched(trainer):
        batches, items = _batches(trainer, batch, device)
        trainer.current_gradient_accumulation_steps = len(batches)
        # outside of train() there is no wrapped model yet; the plain one computes the same loss
        model = trainer.model_wrapped if trainer.model_wrapped is not None else trainer.model
        with trainer.accelerator.no_sync(model):
            steps = [_step(trainer, model, inputs, items, gradient) for inputs in batches]
    losses = [loss for _, loss in steps]
    world = int(trainer.args.world_size)
    if world > 1 and items is not None and not trainer.args.average_tokens_across_devices:
        # the Trainer has counted this rank's labels alone
        items = trainer.accelerator.gather(torch.as_tensor(items, device=device).reshape(1)).sum()
    return Seen(
        found=float(sum(losses)),
        dtype=dtype_name(losses[0]),
        parts=[part for part, _ in steps],
        defaults=_options(trainer, model),
        shift=shifts(model, batches[0]),
        num_items=_count(items),
        world_size=world,
        scale=float(world),  # against the mean over ranks that DDP takes
        recomputed=True,
    )


def _batches(trainer: Any, batch: Any, device: Any) -> tuple[list[dict[str, Any]], Any]:
    """The micro-batches of a step, and the N that the Trainer counts for them."""
    steps = int(trainer.args.gradient_accumulation_steps)
    if batch is None:
        source = iter(trainer.get_train_dataloader())
        batches, items = trainer.get_batch_samples(source, steps, device)
        if not batches:
            raise ValueError("batch=None, and the Trainer's data loader is empty")
    else:
        given = [batch] if isinstance(batch, Mapping) else list(batch)
        batches, items = trainer.get_batch_samples(iter(given), len(given), device)
    for inputs in batches:
        if not isinstance(inputs, Mapping) or inputs.get("labels") is None:
            raise ValueError("a batch of the Trainer has no labels; accepted: one with 'labels'")
    return [dict(inputs) for inputs in batches], items


def _step(
    trainer: Any, model: Any, inputs: dict[str, Any], items: Any, gradient: bool
) -> tuple[Part, Tensor]:
    """What the Trainer hands to ``accelerator.backward``."""
    accelerator = trainer.accelerator
    handed: list[Tensor] = []

    def keep(loss: Tensor, **kwargs: Any) -> None:
        handed.append(loss / accelerator.gradient_accumulation_steps)

    def step() -> Tensor:
        vars(accelerator)["backward"] = keep
        try:
            trainer.training_step(model, dict(inputs), items)
        finally:
            del vars(accelerator)["backward"]
        if len(handed) != 1:
            raise TypeError(
                f"{type(trainer).__name__}.training_step has called accelerator.backward "
                f"{len(handed)} times; accepted: once"
            )
        return handed[0]

    placed = trainer._prepare_inputs(dict(inputs))
    model.train()
    return see_step(model, placed, step, gradient)


def _options(trainer: Any, model: Any) -> dict[str, Any]:
    """Of ``apply_iqlearn`` or of an ``iqlearn_loss_func``."""
    loss = getattr(trainer.compute_loss_func, "options", None)
    if not isinstance(loss, dict):
        return given_options(model)
    return {name: as_is(x) for name, x in loss.items() if name not in ("inplace", "backend")}


def _count(items: Any) -> float | None:
    return None if items is None else float(torch.as_tensor(items).flatten()[0])


@contextmanager
def untouched(trainer: Any) -> Generator[None]:
    """What a step writes into a Trainer and its model comes back as it was."""
    names = ("_metrics", "_total_train_tokens", "current_gradient_accumulation_steps")
    kept = {n: copy.deepcopy(getattr(trainer, n)) for n in names if hasattr(trainer, n)}
    training = {module: module.training for module in trainer.model.modules()}
    func = trainer.compute_loss_func
    sums = dict(func._sums) if hasattr(func, "_sums") else None
    called = getattr(func, "called", None)
    with unrecorded(unwrapped(trainer.model)):
        try:
            yield
        finally:
            vars(trainer).update(kept)
            for module, mode in training.items():
                module.training = mode
            if sums is not None:
                func._sums.clear()
                func._sums.update(sums)
                func.called = called
