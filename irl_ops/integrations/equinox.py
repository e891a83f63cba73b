"""IQLearn for Equinox: ``eqx.filter_value_and_grad(loss_fn, has_aux=True)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax

from irl_ops.integrations import jax_batches
from irl_ops.integrations.jax_batches import LoopOptions


def iqlearn_loss_fn(
    *,
    shift: bool,
    call: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    verify: bool = True,
    **options: Unpack[LoopOptions],
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """A loss function of a model and a batch, which gives the loss and its metrics.

    The batch is a mapping with "input_ids" and "labels" [B, T]. What else it holds of
    ``segment_ids``, ``position_ids``, ``where``, ``truncated``, ``token_weights``, ``values`` and
    ``next_values`` goes to the loss; with ``num_items``, the number of labels of all micro-batches
    of all devices, the loss is sum / num_items, and gradients of micro-batches are added up.

    Args:
        shift: True where labels are the tokens themselves, False where they were shifted
            beforehand; nobody can guess it, so there is no default.
        call: the logits [B, T, V] of a model and a batch. None:
            ``jax.vmap(model)(batch["input_ids"])``, since Equinox modules take one sequence.
        verify: whether labels are compared with "input_ids". In a compiled program that is a
            callback with one bool a step; False leaves it out.
        **options: of ``irl_ops.jax.iqlearn_loss``, those that hold for a whole run.

    Returns:
        ``f(model, batch) -> (loss, metrics)``.

    Raises:
        TypeError: an option that belongs to a batch.
        ValueError: an option's value. The function itself raises it for a batch without labels, and
            for labels that lie one row off; in a compiled program as the error of the step.
    """
    forward = call or (lambda model, batch: jax.vmap(model)(batch["input_ids"]))
    return jax_batches.loss_fn("iqlearn_loss_fn", forward, shift, verify, options)
