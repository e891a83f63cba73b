"""``token_stats`` on the CPU, and its gradient, each as one call of the C++ code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops.call import StatsCall
from irl_ops.torch import native, pool
from irl_ops.torch.native_call import Fields, fields_of, readout_of, refuse_label, row_vector
from irl_ops.torch.refusals import refuse_second_derivative


def token_stats(call: StatsCall, logits: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
    """The fields of ``TokenStats``, differentiable."""
    heads = call.heads
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (logits, heads.values, heads.next_values)
    ):
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
            logits, values, next_values, labels, outputs[2], kind, row_max, logsum, aligned
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
        logits, values, next_values, labels, entropy, kind, row_max, logsum, aligned = (
            ctx.saved_tensors
        )
        call: StatsCall = ctx.call
        fields = Fields(labels)
        fields.heads(call.heads._replace(values=values, next_values=next_values))
        fields.call.gamma = float(call.gamma)
        dlogits = pool.empty_like(logits) if ctx.needs_input_grad[0] else None
        dvalues, dnext_values = (
            None if x is None else row_vector(labels) for x in (values, next_values)
        )
        given = [None if x is None else x.float().contiguous() for x in above[:5]]
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
            **readout_of(call),
        )
        return dlogits, dvalues, dnext_values, None, None


def _token_stats(
    call: StatsCall, logits: Tensor, labels: Tensor, differentiable: bool
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The outputs, and what the gradient needs beside them, where there will be one."""
    fields = fields_of(call, labels)
    value, logprob, reward, next_value = (row_vector(labels) for _ in range(4))
    entropy = row_vector(labels) if call.entropy else None
    kind, correct = row_vector(labels, torch.int8), row_vector(labels, torch.bool)
    kept: tuple[Tensor | None, ...] = (None, None, None)
    if differentiable:  # row_max, logsum and the aligned labels
        kept = (row_vector(labels), row_vector(labels), row_vector(labels, torch.int64))
    outputs = (value, logprob, entropy, reward, next_value, kind, correct)
    bad = native._native.token_stats(
        *native._rows(logits),
        fields.call,
        tuple(map(native._address, (*outputs, *kept))),
        torch.get_num_threads(),
        **readout_of(call),
    )
    if bad >= 0:
        refuse_label(bad, labels, logits, call.sequence)
    return outputs, kept
