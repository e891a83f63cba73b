"""A whole loss call on a GPU: the scalar algebra in four launches, around the row kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.torch import triton
from irl_ops.torch.arguments import arguments
from irl_ops.torch.call import KNOWN, Call, Outcome

BLOCK = 256  # rows a program
NUMBERS = ("lam", "gamma", "alpha")


def loss_and_grad(call: Call, logits: Tensor, dlogits: Tensor) -> Outcome | None:
    """The outcome of ``call``; writes the gradient into ``dlogits``, which may be ``logits``.

    None for an objective that ``irl_ops.kernels.triton.transitions`` does not know.
    """
    n, shape = call.labels.numel(), call.labels.shape
    if call.objective not in KNOWN or n == 0:
        return None
    length, vocab, blocks = shape[-1], logits.shape[-1], -(-n // BLOCK)
    sequence, terms = call.sequence, call.terms
    td, expert = bool(terms), terms.get("is_expert")
    numbers = [_number(terms.get(name, 1.0), logits.device) for name in NUMBERS]
    entropy_coef = _number(call.entropy_coef, logits.device)
    items = call.num_items if isinstance(call.num_items, tuple) else (call.num_items,) * 2
    items = tuple(_number(1.0 if x is None else x, logits.device) for x in items)
    with_entropy = algebra.needs_entropy(call.entropy_coef)
    present = dict(
        TD=td,
        VALUES=call.values is not None,
        NEXT_VALUES=call.next_values is not None,
        DETACH=call.detach_next,
        ENTROPY=with_entropy,
    )

    labels = torch.empty(shape, dtype=torch.int64, device=logits.device)
    kinds = torch.empty(shape, dtype=torch.int8, device=logits.device)
    vectors = logits.new_empty((6, *shape), dtype=torch.float32)
    weights, mle, d, alpha, beta, elements = vectors
    entropy_weight = torch.empty_like(mle) if with_entropy else None
    partial = logits.new_empty((8, blocks), dtype=torch.float32)
    values, next_values = _flat(call.values), _flat(call.next_values)
    where, is_expert, truncated = map(_flat, (sequence["where"], expert, sequence["truncated"]))

    launch = _launcher(logits.device, blocks)
    launch(
        "rows",
        _flat(call.labels), where, _segments(call, n), _flat(sequence["position_ids"]),
        truncated, is_expert, _flat(call.token_weights),
        n, length, vocab, sequence["ignore_index"],
        labels, kinds, weights, partial,
        SHIFT=sequence["shift"],
        EOS=algebra.end_tokens(sequence["eos_token_id"]),
        BOUNDARY=sequence["boundary"],
        WHERE=where is not None,
        SEGMENTS=sequence["segment_ids"] is not None or sequence["cu_seqlens"] is not None,
        POSITIONS=sequence["position_ids"] is not None,
        WEIGHTS=call.token_weights is not None,
        TRUNCATED=_spread(truncated, n),
        EXPERT=_spread(is_expert, n),
        BLOCK=BLOCK,
    )  # fmt: skip
    if labels.device.type == "cpu" and (labels == algebra.BAD_LABEL).any():
        ignore_index, shift = sequence["ignore_index"], sequence["shift"]
        arguments.refuse_label(labels, call.labels, vocab, ignore_index, shift)
    label_logit = triton.label_logit(logits, labels)
    launch(
        "coefficients",
        kinds, weights, is_expert, label_logit, values, next_values, partial,
        *numbers, entropy_coef, *items, n, length, blocks,
        mle, d, alpha, beta, entropy_weight,
        EXPERT=_spread(is_expert, n),
        MEAN=call.reduction == "mean",
        ITEMS=call.num_items is not None,
        LOADED=_loaded(*numbers, entropy_coef, *items),
        BLOCK=BLOCK,
        **present,
    )  # fmt: skip
    row_max, logsum, entropy = triton.row_stats_grad(logits, alpha, beta, entropy_weight, dlogits)
    dvalues = None if values is None else torch.empty_like(mle)
    dnext_values = None if next_values is None else torch.empty_like(mle)
    launch(
        "residuals",
        labels, kinds, row_max, logsum, label_logit, entropy, mle, d, alpha, beta, entropy_weight,
        values, next_values, numbers[1], entropy_coef, n, length,
        elements, dvalues, dnext_values, partial,
        LOADED=_loaded(numbers[1], entropy_coef),
        BLOCK=BLOCK,
        **present,
    )  # fmt: skip
    triton.set_label_(dlogits, labels, elements)
    out = logits.new_empty(7, dtype=torch.float32)
    _launcher(logits.device, 1)("totals", partial, blocks, out)
    metrics = _metrics(out, td, with_entropy) if call.metrics else None
    return Outcome(out[0], dvalues, dnext_values, metrics)


def _launcher(device: torch.device, programs: int) -> Any:
    def launch(name: str, *arguments: Any, **constants: Any) -> None:
        with triton._current(device):
            kernel = triton._kernel("transitions", name)
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)

    return launch


def _flat(x: Tensor | None) -> Tensor | None:
    """Contiguous, and bytes for flags."""
    if x is None:
        return None
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _segments(call: Call, n: int) -> Tensor | None:
    """Segment ids, made of ``cu_seqlens`` where those are given."""
    ends = call.sequence["cu_seqlens"]
    if ends is None:
        return _flat(call.sequence["segment_ids"])
    return torch.searchsorted(ends, torch.arange(n, device=ends.device), right=True)


def _number(x: Any, device: torch.device) -> Any:
    """A float, or a tensor that is on the device already: its value is looked at there."""
    if not isinstance(x, Tensor):
        return float(x)
    return x.item() if x.device.type == "cpu" != device.type else x


def _loaded(*numbers: Any) -> int:
    """One bit for each number that is to be loaded from the device."""
    return sum(isinstance(x, Tensor) << bit for bit, x in enumerate(numbers))


def _spread(flags: Tensor | None, n: int) -> int:
    """How flags lie: 0 absent, 1 one a sequence, 2 one a row."""
    return 0 if flags is None else 2 if flags.numel() == n else 1


def _metrics(out: Tensor, td: bool, entropy: bool) -> dict[str, Tensor]:
    kept = {"nll": 1, "value": 2, "tokens": 6}
    if entropy:
        kept["entropy"] = 3
    if td:
        kept |= {"td": 4, "reward": 5}
    return {name: out[place] for name, place in kept.items()}
