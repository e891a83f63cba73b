"""The losses inside a compiled program, on a CPU: the eager call whole, as one operator each way.

``loss`` reads the logits once and writes their gradient once, into memory of the pool, as an eager
call does; ``claim`` hands that gradient over in the backward pass. Without a gradient to compute,
``loss`` reads the logits once.

What an operator returns belongs to the program, which copies it before anything is written there,
and may put other numbers in its place when it is done with it. So the gradient is no tensor of the
program. ``loss`` returns a ticket in its place, one integer, and ``claim`` returns the gradient
itself, which is the program's from then on: nothing is copied, and no other buffer is allocated.
The gradient lives as long as the ticket's memory, so that it goes with a loss whose backward pass
never runs.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from irl_ops.algebra import Heads, Sequence, Terms, Weighting
from irl_ops.call import Call
from irl_ops.readout import Readout
from irl_ops.torch import native, native_loss, pool
from irl_ops.torch.arguments import PLAIN, arguments
from irl_ops.torch.private import within_transform
from irl_ops.torch.refusals import refuse_second_derivative, refuse_second_pass

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]

NUMBERS = ("mle", "td", "agent_td", "gamma", "entropy_coef", "z_loss")  # of Terms
ITEMS = ("expert_items", "agent_items")


def serves(call: Call, logits: Tensor, labels: Tensor, backend: str) -> bool:
    """Whether the operators can do a call: in a compiled program, on tensors that have memory.

    An exported program is for other machines, and keeps the operators that all backends have.
    """
    if backend != "native" or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if within_transform():  # such as vmap, which copies what an operator returns
        return False
    arrays = (logits, labels, *arrays_of(call))
    return all(x is None or type(x) in PLAIN for x in arrays)


def arrays_of(call: Call) -> tuple[Tensor | None, ...]:
    """The arrays among the options, in the order in which ``loss`` takes them."""
    sequence = call.sequence
    return (
        call.heads.values,
        call.heads.next_values,
        call.terms.is_expert,
        call.weighting.token_weights,
        sequence.where,
        sequence.segment_ids,
        sequence.position_ids,
        sequence.cu_seqlens,
        sequence.truncated,
    )


def loss_of(call: Call, logits: Tensor, labels: Tensor, gradient: bool) -> Loss:
    """Any loss that ``serves`` accepts; differentiable where ``gradient`` says so."""
    names = native_loss.metric_names(call.terms) if call.metrics else ()
    numbers = numbers_of(call)
    ends, sequence = call.sequence.eos_token_id, call.sequence
    # numbers that change from step to step are symbols, which a compiler follows into tensors alone
    one = torch.ones((), dtype=torch.float64, device="cpu")
    run = HandedOver.apply if gradient else loss
    results: tuple[Tensor, ...] = run(
        logits,
        *arrays_of(call),
        labels,
        torch.stack([one * x for x in numbers.values()]),
        " ".join(numbers),
        sequence.ignore_index,
        sequence.shift,
        None if ends is None else list(ends),
        sequence.boundary,
        call.heads.detach_next,
        *call.readout,
        call.weighting.reduction,
        len(names),
        gradient,
        torch.empty(0, device="cpu"),
    )
    total, means, *_ = results
    if not call.metrics:
        return total
    return total, dict(zip(names, means.unbind(), strict=True))


def numbers_of(call: Call) -> dict[str, Any]:
    """The numbers of a call that are there, by name; each a Python number or a 0-d tensor."""
    given = [*zip(NUMBERS, [getattr(call.terms, name) for name in NUMBERS], strict=True)]
    if call.weighting.num_items is not None:
        given += zip(ITEMS, call.weighting.num_items, strict=True)
    return {name: x for name, x in given if x is not None}


def operator(function: Callable[..., Any]) -> Any:
    """A function of tensors on a CPU as an operator ``irl_ops::<name>`` that changes none of them.

    ``torch.library.custom_op`` does more, in Python, at every call: beside a loss that was not in
    the caches it takes a tenth of a millisecond.
    """
    name = f"irl_ops::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "cpu", function)
    return getattr(torch.ops.irl_ops, function.__name__)


@operator
def loss(
    logits: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    is_expert: Tensor | None,
    token_weights: Tensor | None,
    where: Tensor | None,
    segment_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    truncated: Tensor | None,
    labels: Tensor,
    numbers: Tensor,
    names: str,
    ignore_index: int,
    shift: bool,
    eos_token_id: list[int] | None,
    boundary: str,
    detach_next: bool,
    logit_scale: float,
    softcap: float | None,
    reduction: str,
    metrics: int,
    gradient: bool,
    apart: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, metrics, dvalues, dnext_values, ticket)``; what was not asked for is empty.

    Args:
        logits: ``[..., T, V]``; of it and of all arrays that follow see ``iqlearn_loss``.
        values: ``[..., T]``.
        next_values: ``[..., T]``.
        is_expert: ``[...]`` or ``[..., T]``.
        token_weights: ``[..., T]``.
        where: ``[..., T]``.
        segment_ids: ``[..., T]``.
        position_ids: ``[..., T]``.
        cu_seqlens: ``[S + 1]``.
        truncated: ``[...]`` or ``[..., T]``.
        labels: ``[..., T]``.
        numbers: float64, those of the terms and ``num_items``.
        names: what each is, separated by spaces.
        ignore_index: see ``iqlearn_loss``, as for all that follow.
        shift: see there.
        eos_token_id: see there.
        boundary: see there.
        detach_next: see there.
        logit_scale: see there.
        softcap: see there.
        reduction: see there.
        metrics: how many there are of them, 0 where they are not wanted.
        gradient: whether to compute it, for a ticket.
        apart: a tensor of its own for every call, without elements. A compiler merges operators
            whose arguments are equal, but each of two equal losses needs its ticket.
    """
    given = dict(zip(names.split(), numbers.tolist(), strict=True))
    items = [given.pop(name) for name in ITEMS if name in given]
    sequence = Sequence(
        ignore_index,
        shift,
        None if eos_token_id is None else tuple(eos_token_id),
        boundary,
        where,
        segment_ids,
        position_ids,
        cu_seqlens,
        truncated,
    )
    if cu_seqlens is not None:  # whose values nobody has seen yet
        sequence = arguments.sequence(labels, logits.shape[-1], sequence)
    arrays = (values, next_values, is_expert, token_weights, *sequence[-5:])
    call = Call(
        Terms(**given, is_expert=is_expert),
        sequence,
        Weighting(token_weights, tuple(items) or None, reduction),
        Heads(values, next_values, detach_next),
        metrics > 0,
        False,
        "native",
        Readout(logit_scale, softcap),
        plain=all(x is None for x in arrays),
    )
    logits = logits.detach()
    dlogits = pool.empty_like(logits) if gradient else None
    outcome = native_loss.loss(call, logits, labels, dlogits, None)
    means = outcome.metrics
    return (
        outcome.loss,
        _room(labels, 0) if means is None else torch.stack([*means.values()]),
        _room(labels, 0) if outcome.dvalues is None else outcome.dvalues,
        _room(labels, 0) if outcome.dnext_values is None else outcome.dnext_values,
        labels.new_empty(0, dtype=torch.int64) if dlogits is None else issue(dlogits),
    )


@torch.library.register_fake("irl_ops::loss")
def _(logits, values, next_values, *others):  # type: ignore[no-untyped-def]
    labels, (reduction, metrics, gradient, _) = others[7], others[-4:]
    by_row = labels.shape
    return (
        _room(labels, by_row if reduction == "none" else ()),
        _room(labels, metrics),
        _room(labels, by_row if gradient and values is not None else 0),
        _room(labels, by_row if gradient and next_values is not None else 0),
        labels.new_empty(int(gradient), dtype=torch.int64),
    )


def _room(labels: Tensor, shape: Any) -> Tensor:
    return labels.new_empty(shape, dtype=torch.float32)


class HandedOver(torch.autograd.Function):
    """``loss`` with a gradient: the ticket waits for the backward pass, which claims it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: Tensor | None, next_values: Tensor | None, *others: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss and the metrics."""
        total, means, *kept = loss(logits, values, next_values, *others)
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(means)
        ctx.layout = logits.shape, logits.stride(), logits.dtype
        ctx.has, ctx.others = (values is not None, next_values is not None), len(others)
        return total, means

    @staticmethod
    def backward(ctx: Any, above: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that came with the loss, times the one from above."""
        refuse_second_derivative()
        *rows, ticket = ctx.saved_tensors
        drows = [x * above if there else None for x, there in zip(rows, ctx.has, strict=True)]
        return claim(ticket, above, *ctx.layout), *drows, *[None] * ctx.others


class Ticket(ctypes.c_int64 * 8):  # type: ignore[misc]
    """The memory of a ticket, whose first number is the ticket's own; it keeps the gradient.

    Nothing else holds either, and numbers are never used again: a copy of a ticket claims the same
    gradient while the first one lives, and nothing afterwards.
    """

    gradient: Tensor


_count = itertools.count(1)
_issued: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()


def issue(gradient: Tensor) -> Tensor:
    """A ticket for that gradient, int64 ``[1]``."""
    ticket = Ticket(next(_count))
    ticket.gradient = gradient
    _issued[ticket[0]] = ticket
    return torch.frombuffer(ticket, dtype=torch.int64, count=1)


@operator
def claim(
    ticket: Tensor, above: Tensor, sizes: list[int], strides: list[int], dtype: torch.dtype
) -> Tensor:
    """The gradient that the ticket is for, times the one from above; once for each ticket.

    Args:
        ticket: int64 ``[1]``, of ``loss``.
        above: 0-d float32.
        sizes: those of the logits.
        strides: those of the logits.
        dtype: that of the logits.

    Raises:
        RuntimeError: the gradient was claimed before, or went with the ticket's memory.
    """
    issued = _issued.get(int(ticket))
    if issued is None:
        raise RuntimeError(
            "irl_ops: the gradient of this compiled loss is gone: the tensor that the compiled "
            "program saved for it was copied and freed, as hooks on saved tensors may do; "
            "accepted: hooks that keep what they are given, or a loss outside of the program"
        )
    gradient: Tensor | None = issued.__dict__.pop("gradient", None)  # one thread alone gets it
    if gradient is None:
        refuse_second_pass()
    native.scale_(gradient, above)
    return gradient


@torch.library.register_fake("irl_ops::claim")  # type: ignore[untyped-decorator]
def _(
    ticket: Tensor, above: Tensor, sizes: list[int], strides: list[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(torch.empty_strided(sizes, strides, dtype=dtype))
