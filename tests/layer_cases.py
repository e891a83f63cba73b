"""How far a loss of hidden states and a weight may be off, whose gradients are sums of products.

A gradient of a layer may cancel to nothing, of terms that are each rounded. So an error is measured
by the sizes of the terms: those of the logits' gradient are ``cases.tolerance``'s, and are added up
here as the products add them, without their signs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cases import EPS, Case, Outcome, tolerance

Bounds = dict[str, Tensor]


def whole(case: Case, layer: dict[str, Tensor], **readout: Any) -> Case:
    """The same call of stored float64 logits, before ``readout`` (logit_scale, softcap)."""
    x = {name: x.detach().double() for name, x in layer.items()}
    logits = x["hidden"] @ x["weight"].mT + x.get("bias", 0.0)
    given = {name: option for name, option in readout.items() if option is not None}
    return replace(case, leaf=logits, view=lambda leaf: leaf, options={**case.options, **given})


def added_up(rows: Outcome, layer: dict[str, Tensor]) -> Bounds:
    """Sizes, or errors, of the logits' gradient as those of the layer and of the heads."""
    x = {name: x.detach().double().abs() for name, x in layer.items()}
    size = rows.logits
    found = {"hidden": size @ x["weight"], "bias": size.flatten(0, -2).sum(0)}
    found["weight"] = size.flatten(0, -2).mT @ x["hidden"].flatten(0, -2)
    heads = {"values": rows.values, "next_values": rows.next_values}
    return {**{name: found[name] for name in layer}, **heads}


def sizes(case: Case, layer: dict[str, Tensor], **readout: Any) -> Bounds:
    """Of every element of a gradient, the sizes of its terms."""
    found = added_up(tolerance(whole(case, layer, **readout)), layer)
    return {name: x / EPS for name, x in found.items()}


def allowed(case: Case, layer: dict[str, Tensor], **readout: Any) -> tuple[Tensor, Bounds]:
    """What float32 may be off in the loss, and in every gradient.

    A sum of n products is off by n roundings of 2^-24, EPS being eight, of the sizes of its terms:
    so are the logits, and what they are off the loss and its gradient are off too; and so are the
    gradient's own sums, over the rows and over the columns.
    """
    x = {name: x.detach().double().abs() for name, x in layer.items()}
    terms = x["hidden"] @ x["weight"].mT + x.get("bias", 0.0)
    off = (x["hidden"].shape[-1] + 1) / 8 * terms.max().item()
    stored = whole(case, layer, **readout)
    within, size = tolerance(stored, off), tolerance(stored)
    rows, columns = case.labels.numel() / 8, stored.logits.shape[-1] / 8
    counts = {"hidden": columns, "weight": rows, "bias": rows}
    first, more = added_up(within, layer), added_up(size, layer)
    return within.loss, {n: b + (1 + counts.get(n, 0)) * more[n] for n, b in first.items()}


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Names the gradient that is not; an error of 0 stands for exactly 0."""
    error = (actual.detach().double() - expected.detach().double()).abs()
    # 1e-37: subnormal numbers may be flushed
    bad = error > torch.where(bound > 0, bound + 1e-37, 0.0)
    assert not bad.any(), f"{name} is off by {error[bad]}; allowed: {bound.expand_as(error)[bad]}"
