"""IQLearn in EasyDeL: ``LOSS_MAPPING["ForCausalLM"] = iqlearn_loss_function(lam=0.1)``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp

from irl_ops.integrations.jax_batches import RunOptions, check_alignment, checked, integers
from irl_ops.jax import iqlearn_loss


def iqlearn_loss_function(
    *, verify: bool = True, **options: Unpack[RunOptions]
) -> Callable[..., Any]:
    """A loss function with the signature and the name of EasyDeL's ``ForCausalLMLoss``.

    Labels are unshifted unless the batch's ``LossConfig`` has ``shift_tokens=False``; those with an
    ``attention_mask`` of 0 count as -100. The loss is the sum over labels divided by
    ``num_items_in_batch``, or by their number. ``segment_ids`` of the batch part packed documents.

    EasyDeL looks its loss up once for each model: put this into ``LOSS_MAPPING`` before a trainer
    is made. It then computes all logits, since its chunked head knows only its own loss.

    Args:
        verify: whether labels are compared with ``input_ids`` where the batch has them. In a
            compiled program that is a callback with one bool a step; False leaves it out.
        **options: of ``irl_ops.jax.iqlearn_loss``, those that hold for a whole run.

    Returns:
        ``f(logits, labels, attention_mask=None, config=None, paxis=None, num_items_in_batch=None,
        batch=None, **rest)``, which returns EasyDeL's ``LossMetrics``.

    Raises:
        TypeError: an option that belongs to a batch or that EasyDeL decides.
        ValueError: an option's value. The function itself raises it for missing logits or labels,
            for a ``LossConfig`` that asks for what this loss does not do (label smoothing, another
            reduction or normalisation), and for labels that are shifted already.
    """
    given = checked("iqlearn_loss_function", options)

    def loss_function(
        logits: Any = None,
        labels: Any = None,
        attention_mask: Any = None,
        config: Any = None,
        paxis: Any = None,
        num_items_in_batch: Any = None,
        batch: Any = None,
        **rest: Any,
    ) -> Any:
        if logits is None or labels is None:
            raise ValueError("logits or labels are None; accepted: both, [B, T, V] and [B, T]")
        _check_config(config)
        ignored = getattr(config, "ignore_index", -100)
        shift = getattr(config, "shift_tokens", True)
        labels = integers(labels)
        if attention_mask is not None and attention_mask.shape == labels.shape:
            labels = jnp.where(jnp.asarray(attention_mask) != 0, labels, ignored)
        ids, segments = rest.get("input_ids"), rest.get("segment_ids")
        if verify and ids is not None:
            labelled = labels != ignored
            check_alignment(jnp.asarray(ids), labels, labelled, shift=shift, segment_ids=segments)
        loss, metrics = iqlearn_loss(
            logits,
            labels,
            shift=shift,
            ignore_index=ignored,
            segment_ids=None if segments is None else integers(segments),
            num_items=num_items_in_batch,
            z_loss=getattr(config, "z_loss", 0.0),
            return_metrics=True,
            **given,
        )
        metrics_of = importlib.import_module("easydel.infra.loss_utils").LossMetrics
        other = {name: metrics[name] for name in ("nll", "td", "value", "reward")}
        return metrics_of(
            loss=loss,
            weight_sum=metrics["tokens"],
            accuracy=metrics["accuracy"],
            other_metrics=other,
        )

    # EasyDeL takes the input_ids for missing labels where the loss has this name.
    loss_function.__name__ = "ForCausalLMLoss"
    return loss_function


def _check_config(config: Any) -> None:
    """Refuses what a ``LossConfig`` asks for in vain."""
    for name, accepted in (
        ("label_smoothing", (0.0,)),
        ("reduction", (None, "mean")),
        ("loss_normalizing_factor", ("NUM_REAL_TARGET_TOKENS",)),
        ("divide_weight_sum", (False,)),
    ):
        x = getattr(config, name, accepted[0])
        if getattr(x, "name", x) not in accepted:
            raise ValueError(
                f"LossConfig.{name} is {x!r}, which IQLearn would ignore; accepted: "
                f"{', '.join(map(repr, accepted))}"
            )
