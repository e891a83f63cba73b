"""IQLearn in Levanter: ``Trainer(config, optimizer, iqlearn_loss_fn(lam=0.1))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from irl_ops.integrations.jax_batches import PlainOptions, checked, integers
from irl_ops.jax import linear_iqlearn_loss


def iqlearn_loss_fn(
    *, chunk_size: int | None = None, **options: Unpack[PlainOptions]
) -> Callable[..., Any]:
    """A loss function of a model and an ``LmExample``, in the place of ``compute_next_token_loss``.

    Tokens are not shifted, and ``loss_weight`` at t weighs the row that scores token t + 1, as in
    Levanter; documents are those of the attention mask's ``segment_ids``. The loss is the weighted
    mean; a model's auxiliary loss is added. It is computed from the activations and the head
    (``linear_iqlearn_loss``), and no logits are stored.

    Args:
        chunk_size: rows of one chunk; see ``irl_ops.jax.linear_iqlearn_loss``.
        **options: of ``irl_ops.jax.iqlearn_loss``, those that hold for a whole run. A model whose
            logits are soft-capped or scaled needs ``softcap`` or ``logit_scale``.

    Returns:
        ``f(model, example, *, key=None, **unused)``, which gives ``(loss, metrics)``.

    Raises:
        TypeError: an option that belongs to a batch or that Levanter decides.
        ValueError: an option's value. The function itself raises it for a ``loss_weight`` that has
            no position axis.
    """
    given = checked("iqlearn_loss_fn", options, PlainOptions)

    def loss_fn(model: Any, example: Any, *, key: Any = None, **unused: Any) -> Any:
        activations = model.activations(example.tokens, example.attn_mask, key=key)
        hidden, auxiliary = activations if isinstance(activations, tuple) else (activations, 0.0)
        position, embed, vocab = model.Pos.name, model.Embed.name, model.Vocab.name
        batch = tuple(name for name in _names(hidden) if name not in (position, embed))
        rows = (*batch, position)
        tokens = integers(_array(example.tokens, rows))
        weights = example.loss_weight
        if weights is not None and position not in _names(weights):
            raise ValueError(
                f"loss_weight has the axes {_names(weights)}; accepted: "
                f"those of the tokens, {position!r} among them"
            )
        weight = None if weights is None else _beside(weights, rows, tokens).astype("float32")
        segments = getattr(example.attn_mask, "segment_ids", None)
        segments = segments[0] if isinstance(segments, tuple) else segments
        loss, metrics = linear_iqlearn_loss(
            _array(hidden, (*rows, embed)),
            _array(model.get_lm_head(), (vocab, embed)),
            tokens,
            shift=True,
            where=None if weight is None else weight != 0,
            token_weights=weight,
            segment_ids=None if segments is None else integers(_beside(segments, rows, tokens)),
            chunk_size=chunk_size,
            return_metrics=True,
            **given,
        )
        extra = auxiliary.array if hasattr(auxiliary, "array") else auxiliary
        return loss + extra, metrics

    return loss_fn


def _array(x: Any, names: tuple[str, ...]) -> jax.Array:
    """A named array in this order of axes."""
    plain: jax.Array = x.rearrange(tuple(name for name in names if name in _names(x))).array
    return plain


def _beside(x: Any, names: tuple[str, ...], tokens: jax.Array) -> jax.Array:
    """The same in the tokens' shape: an axis of the batch that is missing is repeated."""
    own = _names(x)
    missing = tuple(i for i, name in enumerate(names) if name not in own)
    return jnp.broadcast_to(jnp.expand_dims(_array(x, names), missing), tokens.shape)


def _names(x: Any) -> list[str]:
    return [axis.name for axis in x.axes]
