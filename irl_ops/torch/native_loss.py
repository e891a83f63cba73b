"""A whole loss call on the CPU, as one call of the C++ code.

Beside a row kernel that leaves nothing in the caches, sixty operations on [B, T] tensors would take
up to half as long as the kernel itself, nearly all of it on the way to their arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch import native
from irl_ops.torch.arguments import arguments
from irl_ops.torch.call import KNOWN, Call, Outcome


def loss_and_grad(call: Call, logits: Tensor, dlogits: Tensor) -> Outcome | None:
    """The outcome of ``call``; writes the gradient into ``dlogits``, which may be ``logits``.

    None for an objective that the C++ code does not know.
    """
    if call.objective not in KNOWN:
        return None
    shape = call.labels.shape
    dvalues = None if call.values is None else logits.new_empty(shape, dtype=torch.float32)
    dnext_values = (
        None if call.next_values is None else logits.new_empty(shape, dtype=torch.float32)
    )
    seen, kept = _fields(call)
    found = native._native.loss_and_grad(
        *native._rows(logits),
        seen,
        native._address(dlogits),
        dlogits.stride()[:-1],
        native._address(dvalues),
        native._address(dnext_values),
        torch.get_num_threads(),
    )
    del kept  # the arrays behind the addresses
    if isinstance(found, int):
        ignore_index, shift = call.sequence["ignore_index"], call.sequence["shift"]
        aligned = torch.zeros(shape, dtype=torch.int64)
        aligned.view(-1)[found] = algebra.BAD_LABEL
        arguments.refuse_label(aligned, call.labels, logits.shape[-1], ignore_index, shift)
    loss, nll, value, entropy, td, reward, tokens = found
    metrics = None
    if call.metrics:
        numbers = {"nll": nll, "value": value}
        if seen.entropy:
            numbers["entropy"] = entropy
        if seen.td:
            numbers |= {"td": td, "reward": reward}
        metrics = {name: torch.tensor(x) for name, x in {**numbers, "tokens": tokens}.items()}
    return Outcome(torch.tensor(loss, dtype=torch.float32), dvalues, dnext_values, metrics)


def _fields(call: Call) -> tuple[Any, list[Tensor]]:
    """The call as the C++ code takes it, and the tensors that have to live as long."""
    seen, kept = native._native.Call(), []

    def address(x: Tensor, dtype: torch.dtype) -> int:
        kept.append(x.detach().to(dtype).contiguous())
        return kept[-1].data_ptr()

    options, terms = call.sequence, call.terms
    seen.length = max(1, call.labels.shape[-1])
    seen.labels = address(call.labels, torch.int64)
    seen.ignore_index, seen.shift = options["ignore_index"], options["shift"]
    seen.boundary = options["boundary"]
    if options["where"] is not None:
        seen.where = address(options["where"], torch.bool)
    if options["segment_ids"] is not None:
        seen.segment_ids = address(options["segment_ids"], torch.int64)
    if options["position_ids"] is not None:
        seen.position_ids = address(options["position_ids"], torch.int64)
    if options["cu_seqlens"] is not None:
        seen.cu_seqlens = options["cu_seqlens"].tolist()
    seen.eos_token_ids = algebra.end_tokens(options["eos_token_id"])
    for name, flags in (("truncated", options["truncated"]), ("is_expert", terms.get("is_expert"))):
        if flags is not None:
            by_row = flags.shape == call.labels.shape
            getattr(seen, f"set_{name}")(address(flags, torch.bool), by_row)
    for name in ("token_weights", "values", "next_values"):
        if getattr(call, name) is not None:
            setattr(seen, name, address(getattr(call, name), torch.float32))
    for name in ("lam", "gamma", "alpha"):
        if name in terms:
            setattr(seen, name, float(terms[name]))
    seen.td, seen.detach_next = bool(terms), call.detach_next
    seen.entropy_coef = float(call.entropy_coef)
    seen.entropy = algebra.needs_entropy(call.entropy_coef)
    seen.mean = call.reduction == "mean"
    if call.num_items is not None:
        pair = call.num_items if isinstance(call.num_items, tuple) else (call.num_items,) * 2
        seen.counted, (seen.expert_items, seen.agent_items) = True, map(float, pair)
    return seen, kept
