"""IQLearn in MaxText's ``loss_fn``: in the place of ``max_utils.cross_entropy_with_logits``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from irl_ops.integrations.jax_batches import RunOptions, check_alignment, checked, integers
from irl_ops.jax import iqlearn_loss, token_stats

KEYS = ("inputs", "targets", "inputs_segmentation", "targets_segmentation")


def within_documents(data: Mapping[str, Any]) -> jax.Array:
    """``targets_segmentation`` [B, T] without the rows that score a token of the next document.

    MaxText packs before it shifts: the last row of a document has the first token of the next as
    its target, and only tokens that the configuration ignores are taken out. The sum and the
    number of targets, by which MaxText divides, both follow this mask.
    """
    _check_keys(data)
    targets, inputs = data["targets_segmentation"], data["inputs_segmentation"]
    return jnp.where(targets == inputs, targets, 0)


def cross_entropy_with_logits(
    logits: Any,
    data: Mapping[str, Any],
    *,
    z_loss: Any = 0.0,
    verify: bool = True,
    **options: Unpack[RunOptions],
) -> tuple[jax.Array, jax.Array]:
    """Offline IQLearn for each token, and what of it is z-loss: ``(xent, z_loss)``, [B, T].

    As MaxText's function: ``xent`` holds the z-loss, nothing is divided, and the caller masks by
    ``targets_segmentation``, sums, and divides by the number of targets or, accumulating
    gradients, lets the whole step do so. Targets are shifted beforehand; documents are those of
    ``inputs_segmentation``, and rows that score another document's token count as masked here, too.

    Args:
        logits: [B, T, V].
        data: the batch, with "inputs", "targets", "inputs_segmentation" and
            "targets_segmentation", all [B, T]; 0 is padding.
        z_loss: ``config.z_loss_multiplier``.
        verify: whether targets are compared with inputs. In a compiled program that is a callback
            with one bool a step; False leaves it out.
        **options: of ``irl_ops.jax.iqlearn_loss``, those that hold for a whole run. Documents that
            a row cuts off count as ended unless ``eos_token_id`` is given.

    Raises:
        TypeError: an option that belongs to a batch or that MaxText decides.
        ValueError: a batch without one of these keys; an option's value; targets that are the
            inputs of their own rows. In a compiled program this comes as the error of the step.
    """
    given = checked("cross_entropy_with_logits", options)
    mask = within_documents(data) != 0
    targets, segments = integers(data["targets"]), integers(data["inputs_segmentation"])
    if verify:
        inputs = jnp.asarray(data["inputs"])
        check_alignment(inputs, targets, mask, shift=False, segment_ids=segments)
    xent: jax.Array = iqlearn_loss(
        logits,
        targets,
        where=mask,
        segment_ids=segments,
        z_loss=z_loss,
        reduction="none",
        **given,
    )
    if isinstance(z_loss, int | float) and z_loss == 0:
        return xent, jnp.zeros_like(xent)
    readout = {name: given[name] for name in ("logit_scale", "softcap") if name in given}
    value = token_stats(jax.lax.stop_gradient(logits), targets, entropy=False, **readout).value
    return xent, jnp.where(mask, z_loss * value**2, 0.0)


def _check_keys(data: Mapping[str, Any]) -> None:
    for key in KEYS:
        if key not in data:
            raise ValueError(f"data has {sorted(data)}; accepted: a batch of MaxText with {key!r}")
