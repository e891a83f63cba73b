"""A whole loss call on a GPU: the stages of the algebra in Triton, around the row kernel.

Five launches with a gradient, four without: ``align`` (with the labels' logits), ``coefficients``,
the row kernel, ``finish`` (with the gradient's elements at the labels), ``total``. Under
``logit_scale`` or ``softcap`` the labels' elements take two launches of their own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import Sequence, Terms
from irl_ops.call import Call
from irl_ops.torch import triton
from irl_ops.torch.arguments import arguments
from irl_ops.torch.outcome import Outcome

BLOCK = 256  # rows per program
ALIGNED = 64  # vectors in one buffer begin at multiples of so many elements, whatever n is
ABSENT, VALUE, LOADED, PER_ROW = range(4)  # as irl_ops.algebra.triton.numbers
METRICS = ("nll", "value", "entropy", "td", "reward", "accuracy", "z", "tokens")  # as of total


def loss(
    call: Call, logits: Tensor, labels: Tensor, dlogits: Tensor | None, above: Tensor | None
) -> Outcome:
    """See ``irl_ops.torch.whole``."""
    with torch.no_grad(), triton.current(logits.device):
        return _loss(call, logits.detach(), labels, dlogits, above)


def _loss(
    call: Call, logits: Tensor, labels: Tensor, dlogits: Tensor | None, above: Tensor | None
) -> Outcome:
    shape, n, device = labels.shape, labels.numel(), logits.device
    length, vocab = max(1, shape[-1]), logits.shape[-1]
    blocks = max(1, -(-n // BLOCK))
    sequence, terms, weighting, heads = call.sequence, call.terms, call.weighting, call.heads
    with_entropy, gradient = terms.entropy_coef is not None, dlogits is not None
    # of logits that are bent, the kernels and no stage touch the labels' elements
    plain, readout = call.readout.plain, call.readout.keywords
    plane = _only_plane(logits) if gradient and plain else None
    target = _only_plane(dlogits) if dlogits is not None and plain else None

    names = ["weights", "label_logit", "row_max", "logsum"]
    names += ["entropy"] * with_entropy + ["alpha", "beta"] * gradient
    names += ["entropy_weight"] * (with_entropy and gradient)
    names += ["elements"] * (gradient and target is None)
    padded = -(-n // ALIGNED) * ALIGNED
    buffer = torch.empty((len(names), padded), dtype=torch.float32, device=device)
    vectors: dict[str, Tensor] = dict(zip(names, buffer.unbind(), strict=True))
    partial = torch.empty((2, blocks), dtype=torch.float32, device=device)
    sums = torch.empty((10, blocks), dtype=torch.float32, device=device)
    aligned = torch.empty(n, dtype=torch.int64, device=device)
    kinds = torch.empty(n, dtype=torch.int8, device=device)

    is_expert, values = _flat(terms.is_expert), _flat(heads.values)
    next_values, token_weights = _flat(heads.next_values), _flat(weighting.token_weights)
    how = dict(EXPERT=_spread(is_expert, shape), MEAN=weighting.reduction == "mean", BLOCK=BLOCK)
    marks, kind_of_marks = _marks(sequence)
    where, truncated = _flat(sequence.where), _flat(sequence.truncated)
    stage("rows", "align")[(blocks,)](
        _flat(labels), where, marks, truncated, is_expert, token_weights, plane,
        n, length, vocab, sequence.ignore_index, 0 if marks is None else marks.numel(),
        *_layout(plane),
        aligned, kinds, vectors["weights"], vectors["label_logit"], partial,
        SHIFT=sequence.shift,
        EOS=sequence.eos_token_id or (),
        BOUNDARY=sequence.boundary,
        WHERE=where is not None,
        MARKS=kind_of_marks,
        WEIGHTS=token_weights is not None,
        TRUNCATED=_spread(truncated, shape),
        PICK=plane is not None,
        **how,
        enable_fp_fusion=True,
    )  # fmt: skip
    if device.type == "cpu" and (aligned == algebra.BAD_LABEL).any():
        arguments.refuse_label(aligned.view(shape), labels, vocab, sequence)

    numbers = Numbers(call, above, shape, device)
    present = dict(
        VALUES=values is not None,
        NEXT_VALUES=next_values is not None,
        DETACH=heads.detach_next,
        **numbers.how,
        **how,
    )
    dvalues = dnext_values = losses = None
    if dlogits is None:
        picked = ("row_max", "logsum", "label_logit", "entropy")
        triton.launch_row_stats(logits, aligned, *map(vectors.get, picked), **readout)
    else:
        if heads.values is not None:
            dvalues = torch.empty(shape, dtype=torch.float32, device=device)
        if heads.next_values is not None:
            dnext_values = torch.empty(shape, dtype=torch.float32, device=device)
        if plane is None:
            triton.launch_label_logit(logits, aligned, vectors["label_logit"], **readout)
        given = ("alpha", "beta", "entropy_weight")
        stage("coefficients", "coefficients")[(blocks,)](
            kinds, vectors["weights"], is_expert, vectors["label_logit"], values, next_values,
            partial, *numbers.given, n, length, blocks, *map(vectors.get, given),
            **present, enable_fp_fusion=True,
        )  # fmt: skip
        written = (*given, "row_max", "logsum", "entropy")
        triton.launch_row_stats_grad(logits, dlogits, *map(vectors.get, written), **readout)
    if weighting.reduction == "none":
        losses = torch.empty(shape, dtype=torch.float32, device=device)
    stage("finish", "finish")[(blocks,)](
        aligned, kinds, vectors["weights"], is_expert, vectors["row_max"], vectors["logsum"],
        vectors["label_logit"], vectors.get("entropy"), vectors.get("alpha"), vectors.get("beta"),
        vectors.get("entropy_weight"), values, next_values, partial, *numbers.given,
        n, length, blocks, vocab, *_layout(target),
        target, vectors.get("elements"), dvalues, dnext_values, losses, sums,
        GRADIENT="" if dlogits is None else "elements" if target is None else "dlogits",
        PER_ROW_LOSS=losses is not None,
        **present,
        enable_fp_fusion=True,
    )  # fmt: skip
    if dlogits is not None and target is None:
        elements, picked_logit = vectors["elements"], vectors["label_logit"]
        triton.launch_set_label(dlogits, aligned, elements, picked_logit, **readout)
    if losses is not None and not call.metrics:
        return Outcome(losses, dvalues, dnext_values, None)
    summed = torch.empty((), dtype=torch.float32, device=device)  # no view: users write to it
    means = torch.empty(len(METRICS), dtype=torch.float32, device=device)
    stage("total", "total")[(1,)](sums, blocks, summed, means, enable_fp_fusion=True)
    metrics = _metrics(means, terms) if call.metrics else None
    return Outcome(summed if losses is None else losses, dvalues, dnext_values, metrics)


class Numbers:
    """The numbers of a call as launches take them, and how each comes."""

    def __init__(
        self, call: Call, above: Tensor | None, shape: torch.Size, device: torch.device
    ) -> None:
        terms, (expert_items, agent_items) = call.terms, call.weighting.num_items or (None, None)
        named = dict(
            MLE=terms.mle,
            TD=terms.td,
            AGENT_TD=terms.agent_td,
            GAMMA=terms.gamma,
            ENTROPY=terms.entropy_coef,
            Z=terms.z_loss,
            ITEMS=expert_items,
            AGENT_ITEMS=agent_items,
            ABOVE=above,
        )
        self.how: dict[str, int] = {}
        self.given: list[Any] = []
        for name, x in named.items():
            if isinstance(x, Tensor):
                if x.dim() > 0:
                    x, self.how[name] = x.expand(shape).contiguous(), PER_ROW
                elif x.device == device:
                    self.how[name] = LOADED
                else:  # of the CPU, where looking costs nothing
                    x, self.how[name] = x.item(), VALUE
            elif x is None:
                self.how[name] = ABSENT
            else:
                x, self.how[name] = float(x), VALUE
            self.given.append(x)


@functools.cache
def stage(module: str, function: str) -> Any:
    """The Triton function of a stage of the algebra, to be launched."""
    return getattr(importlib.import_module(f"irl_ops.algebra.triton.{module}"), function)


def _only_plane(x: Tensor) -> Tensor | None:
    """All rows in three axes, or None where that takes several sets of views."""
    folded = triton._folded((x,))
    return None if folded is None else folded[0]


def _layout(plane: Tensor | None) -> tuple[int, int, int]:
    """Inner rows and the strides of both axes of rows."""
    return (1, 0, 0) if plane is None else (plane.shape[1], plane.stride(0), plane.stride(1))


def _flat(x: Tensor | None) -> Tensor | None:
    """The array detached and contiguous; bools as bytes, which is what the kernels read."""
    if x is None:
        return None
    x = x.detach().contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _marks(sequence: Sequence) -> tuple[Tensor | None, str]:
    """The array that marks segments and the name of its option."""
    for name in ("segment_ids", "position_ids", "cu_seqlens"):
        marks = getattr(sequence, name)
        if marks is not None:
            return _flat(marks), name
    return None, ""


def _spread(flags: Tensor | None, shape: torch.Size) -> int:
    """How flags come: one per row, or one per sequence."""
    return ABSENT if flags is None else PER_ROW if flags.shape == shape else LOADED


def _metrics(means: Tensor, terms: Terms) -> dict[str, Tensor]:
    absent = set()
    if terms.entropy_coef is None:
        absent.add("entropy")
    if terms.td is None:
        absent |= {"td", "reward"}
    if terms.z_loss is None:
        absent.add("z")
    named = zip(METRICS, means.unbind(), strict=True)
    return {name: x for name, x in named if name not in absent}
