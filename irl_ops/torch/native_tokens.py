"""``token_stats`` on the CPU, and its gradient, each as one call of the C++ code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.algebra import Sequence
from irl_ops.call import StatsCall
from irl_ops.torch import native, pool
from irl_ops.torch.gradients import asks_for_gradient
from irl_ops.torch.native_call import contiguous, fields_of, readout_of, refuse_label, row_vector
from irl_ops.torch.refusals import refuse_second_derivative


def token_stats(call: StatsCall, logits: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
    """The fields of ``TokenStats``, differentiable."""
    heads = call.heads
    if asks_for_gradient(logits, heads.values, heads.next_values):
        outputs: tuple[Tensor | None, ...] = Differentiable.apply(  # type: ignore[no-untyped-call]
            logits, heads.values, heads.next_values, labels, call
        )
        return outputs
    return _token_stats(call, logits, labels, False)[0]


class Differentiable(torch.autograd.Function):
    """``token_stats`` and its gradient, each one call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        labels: Tensor,
        call: StatsCall,
    ) -> tuple[Tensor | None, ...]:
        """The fields of ``TokenStats``."""
        outputs, (row_max, logsum, aligned) = _token_stats(call, logits, labels, True)
        kind, correct = outputs[5:]
        ctx.save_for_backward(
            logits, values, next_values, outputs[2], kind, row_max, logsum, aligned
        )
        ctx.call = call
        ctx.set_materialize_grads(False)
        constant: tuple[Tensor | None, ...] = (kind, correct)
        if outputs[2] is not None and not call.measures.entropy_grad:
            constant += (outputs[2],)
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        """One read of the logits and one write of their gradient."""
        refuse_second_derivative()
        logits, values, next_values, entropy, kind, row_max, logsum, aligned = ctx.saved_tensors
        call: StatsCall = ctx.call
        if not call.plain:  # which row follows which is in `kind`
            heads = call.heads._replace(values=values, next_values=next_values)
            call = call._replace(sequence=Sequence(), heads=heads)
        fields = fields_of(call, aligned)
        dlogits = pool.empty_like(logits) if ctx.needs_input_grad[0] else None
        dvalues, dnext_values = (
            None if x is None else row_vector(aligned) for x in (values, next_values)
        )
        given = [None if x is None else contiguous(x, torch.float32) for x in above[:5]]
        kept = (None, None, entropy, None, None, kind, None, row_max, logsum, aligned)
        native._native.token_stats_grad(
            *native._rows(logits),
            fields.call,
            tuple(map(native._address, kept)),
            tuple(map(native._address, given)),
            native._address(dlogits),
            () if dlogits is None else dlogits.stride()[:-1],
            native._address(dvalues),
            native._address(dnext_values),
            torch.get_num_threads(),
            *readout_of(call),
        )
        return dlogits, dvalues, dnext_values, None, None


def _token_stats(
    call: StatsCall, logits: Tensor, labels: Tensor, differentiable: bool
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The outputs, and what the gradient needs beside them, where there will be one."""
    fields, rows = fields_of(call, labels), contiguous(labels, torch.int64)
    value = row_vector(labels)
    # like another, a tensor is made soonest
    logprob, reward, next_value = (torch.empty_like(value) for _ in range(3))
    entropy = torch.empty_like(value) if call.entropy else None
    kind = torch.empty_like(value, dtype=torch.int8)
    correct = torch.empty_like(value, dtype=torch.bool)
    kept: tuple[Tensor | None, ...] = (None, None, None)
    if differentiable:  # row_max, logsum and the aligned labels
        kept = (torch.empty_like(value), torch.empty_like(value), torch.empty_like(rows))
    outputs = (value, logprob, entropy, reward, next_value, kind, correct)
    bad = native._native.token_stats(
        *native._rows(logits),
        fields.call,
        rows.data_ptr(),
        tuple(map(native._address, (*outputs, *kept))),
        torch.get_num_threads(),
        *readout_of(call),
    )
    if bad >= 0:
        refuse_label(bad, labels, logits, call.sequence)
    return outputs, kept
