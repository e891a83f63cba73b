"""What the JAX trainers share: the options of a run, and where labels have to lie.

A check of values works inside compiled programs as well: the program then calls back with one bool,
and the message comes as the error of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from irl_ops.jax import iqlearn_loss
from irl_ops.options import Boundary


class RunOptions(TypedDict, total=False):
    """The options of ``irl_ops.jax.iqlearn_loss`` that hold for a whole run with every trainer."""

    lam: float | jax.Array
    gamma: float | jax.Array
    entropy_coef: float | jax.Array
    logit_scale: float | jax.Array
    softcap: float | jax.Array | None
    eos_token_id: int | Sequence[int] | None
    boundary: Boundary
    detach_next: bool
    backend: str


class PlainOptions(RunOptions, total=False):
    """Those of trainers whose own configuration has no z-loss."""

    z_loss: float | jax.Array


class LoopOptions(PlainOptions, total=False):
    """Those of loops whose labels are the user's."""

    ignore_index: int


OF_A_BATCH = (
    "where", "segment_ids", "position_ids", "cu_seqlens", "truncated", "token_weights", "values",
    "next_values",
)  # fmt: skip


def checked(caller: str, options: Mapping[str, Any], accepted: type = RunOptions) -> dict[str, Any]:
    """``options``, once the loss has accepted their values; nothing is compiled.

    Raises:
        TypeError: an option that the loss does not have, or that a batch or the trainer decides.
        ValueError: an option's value.
    """
    own = list(accepted.__annotations__)
    for name in options:
        if name not in own:
            raise TypeError(f"{caller} has no option {name!r}; accepted: {', '.join(own)}")
    plain = {
        name: x
        for name, x in options.items()
        if name != "backend" and not isinstance(x, jax.core.Tracer)
    }
    ends = plain.get("eos_token_id")
    listed = ends if isinstance(ends, list | tuple) else [ends]
    columns = 1 + max((token for token in listed if isinstance(token, int)), default=1)

    def tried() -> jax.Array:
        logits = jnp.zeros((1, 2, max(columns, 2)))
        loss: jax.Array = iqlearn_loss(logits, jnp.zeros((1, 2), jnp.int32), **plain)
        return loss

    jax.eval_shape(tried)
    return dict(options)


def integers(x: Any) -> jax.Array:
    """Labels and segments as int32, in which the loss takes them; wider ones stay."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"labels or segments are {x.dtype}; accepted: integers")
    narrow: jax.Array = x if x.dtype in (jnp.int32, jnp.int64) else x.astype(jnp.int32)
    return narrow


def check_alignment(
    tokens: Any, labels: Any, labelled: Any, *, shift: bool, segment_ids: Any = None
) -> None:
    """Raises where labels [B, T] lie one row away from what the loss takes them for.

    Unshifted labels are the tokens themselves, shifted ones the tokens one row later within their
    document. Labels that are neither in all of their rows, or both, pass.

    Raises:
        ValueError: they are shifted and should not be, or the other way round. In a compiled
            program the error comes when the step is run, as JAX's own, with this message.
    """
    if tokens.shape != labels.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}; accepted: {list(tokens.shape)}, that of the "
            "tokens"
        )
    looked = labelled[..., :-1]
    if segment_ids is not None:
        looked = looked & (segment_ids[..., 1:] == segment_ids[..., :-1])
    here = ((labels == tokens) | ~labelled).all() & labelled.any()
    next_one = ((labels[..., :-1] == tokens[..., 1:]) | ~looked).all() & looked.any()
    wrong = next_one & ~here if shift else here & ~next_one
    if isinstance(wrong, jax.core.Tracer):
        jax.debug.callback(partial(_refuse, shift=shift), wrong)
    else:
        _refuse(wrong, shift=shift)


def _refuse(wrong: Any, *, shift: bool) -> None:
    if not wrong:
        return
    if shift:
        raise ValueError(
            "labels[:, t] == tokens[:, t + 1] throughout the batch: the labels are shifted "
            "already, and would be shifted a second time; accepted: labels[:, t] == tokens[:, t]"
        )
    raise ValueError(
        "labels == tokens throughout the batch: the labels are not shifted, and each row would "
        "predict its own token; accepted: labels[:, t] == tokens[:, t + 1]"
    )


def loss_fn(
    caller: str,
    call: Callable[[Any, Mapping[str, Any]], Any],
    shift: bool,
    verify: bool,
    options: Mapping[str, Any],
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """``f(model, batch)`` for a ``value_and_grad`` with ``has_aux=True``; see the modules' own."""
    if not isinstance(shift, bool):
        raise TypeError(f"shift is {shift!r}; accepted: True, False")
    given = checked(caller, options, LoopOptions)
    ignored = given.get("ignore_index", -100)

    def of(model: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        if "labels" not in batch:
            raise ValueError(f"batch={sorted(batch)}; accepted: a mapping that has 'labels'")
        facts = {n: batch[n] for n in (*OF_A_BATCH, "num_items") if batch.get(n) is not None}
        labels = integers(batch["labels"])
        ids = batch.get("input_ids")
        if verify and ids is not None:
            marks = batch.get("segment_ids")
            labelled = labels != ignored
            check_alignment(jnp.asarray(ids), labels, labelled, shift=shift, segment_ids=marks)
        found: tuple[jax.Array, dict[str, jax.Array]] = iqlearn_loss(
            call(model, batch), labels, shift=shift, return_metrics=True, **facts, **given
        )
        return found

    return of
