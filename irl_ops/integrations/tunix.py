"""IQLearn in Tunix's ``PeftTrainer``: ``trainer.with_loss_fn(iqlearn_loss_fn(lam=0.1))``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp

from irl_ops.integrations.jax_batches import PlainOptions, checked, integers
from irl_ops.jax import iqlearn_loss


def iqlearn_loss_fn(**options: Unpack[PlainOptions]) -> Callable[..., Any]:
    """A loss function of the model and its inputs, as ``PeftTrainer``'s own.

    Tokens are not shifted, and ``input_mask`` says which of them are predicted: logits[t] scores
    ``input_tokens[t + 1]`` where ``input_mask[t + 1]`` holds. With Tunix 0.1.7 it returns the mean
    over those, and accumulated gradients are the mean over micro-batches, as for Tunix's own loss.
    Where Tunix has a ``LossOutput`` it returns that: the sum, and the number of labels, by which
    the trainer divides once for all micro-batches.

    ``eos_token_id`` should be given: where a completion is cut off, it has not ended.

    Args:
        **options: of ``irl_ops.jax.iqlearn_loss``, those that hold for a whole run.

    Returns:
        ``f(model, input_tokens, input_mask, positions, attention_mask, images=None,
        segment_ids=None)`` for ``with_loss_fn``, without ``has_aux``. ``segment_ids`` [B, T] is
        for packed data, and comes from a ``gen_model_input_fn`` of yours.

    Raises:
        TypeError: an option that belongs to a batch or that Tunix decides.
        ValueError: an option's value. The function itself raises it for a mask of another shape
            than the tokens, and for logits that are not those of all tokens.
    """
    given = checked("iqlearn_loss_fn", options, PlainOptions)

    def loss_fn(
        model: Any,
        input_tokens: Any,
        input_mask: Any,
        positions: Any,
        attention_mask: Any,
        images: Any = None,
        segment_ids: Any = None,
    ) -> Any:
        more = {} if images is None else {"images": images}
        logits, _ = model(input_tokens, positions, None, attention_mask, **more)
        shape = tuple(input_tokens.shape)
        if tuple(input_mask.shape) != shape:
            raise ValueError(
                f"input_mask has shape {list(input_mask.shape)}; accepted: {list(shape)}, that of "
                "input_tokens"
            )
        if tuple(logits.shape[:-1]) != shape:
            raise ValueError(
                f"logits have shape {list(logits.shape)}; accepted: [{shape[0]}, {shape[1]}, V], "
                "those of all tokens"
            )
        labels = jnp.where(jnp.asarray(input_mask) != 0, integers(input_tokens), -100)
        if segment_ids is not None:
            segment_ids = integers(segment_ids)
        weighted = _weighted()
        loss, metrics = iqlearn_loss(
            logits,
            labels,
            shift=True,
            segment_ids=segment_ids,
            reduction="mean" if weighted is None else "sum",
            return_metrics=True,
            **given,
        )
        return loss if weighted is None else weighted(loss, metrics)

    return loss_fn


def _weighted() -> Callable[..., Any] | None:
    """What Tunix takes for a sum with its number of labels; None in versions without it."""
    if importlib.util.find_spec("tunix") is None:
        return None
    utils: Any = importlib.import_module("tunix.sft.utils")
    if not hasattr(utils, "LossOutput"):
        return None

    def output(loss: Any, metrics: dict[str, Any]) -> Any:
        tokens = metrics.pop("tokens")
        return utils.LossOutput(
            primary_loss=utils.WeightedMetric(loss, tokens),
            aux_metrics={
                name: utils.WeightedMetric(x * tokens, tokens) for name, x in metrics.items()
            },
        )

    return output
