"""Random batches for the losses of ``sft``, and how closely a result has to agree."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import naive_sft
from .cases import DTYPES, EPS, ROUNDING, number, rarely, sequences

CHOICES = {  # no power below 1 of an entropy, whose slope at 0 has no bound
    "eaft_loss": ("alpha", (1.0, 2.0, 0.0)),
    "asft_loss": ("lam", (0.1, 1.5, 0.0)),
    "psft_loss": ("epsilon", (0.2, 0.05, 0.5)),
    "power_loss": ("q", (1.0, 0.3, 2.5, 0.0)),
}


@dataclass
class SFTCase:
    """The arguments of one call."""

    name: str
    logits: Tensor
    labels: Tensor
    options: dict[str, Any]
    upstream: Any


@st.composite
def sft_cases(draw: Any, vocab: int | None = None) -> SFTCase:
    name = draw(st.sampled_from(sorted(naive_sft.FORMULAS)))
    vocab = vocab or draw(st.sampled_from((17, 64, 2)))
    lead, length = draw(st.sampled_from([(2,), (), (2, 3)])), draw(st.sampled_from([3, 5, 1]))
    labels, options = draw(sequences(vocab, lead, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (*lead, length)
    if name in CHOICES:
        key, choices = CHOICES[name]
        options[key] = number(draw, *choices)
    if name in naive_sft.OTHER:
        other = -8 * torch.rand(shape, generator=generator)
        options[naive_sft.OTHER[name]] = other.to(draw(st.sampled_from(DTYPES)))
    if rarely(draw, 3):
        weights = torch.randn(shape, generator=generator).abs()
        options["token_weights"] = weights * (torch.rand(shape, generator=generator) < 0.6)
    reduction = options["reduction"] = draw(st.sampled_from(["mean", "mean", "sum", "none"]))
    if reduction == "mean" and draw(st.booleans()):
        options["num_items"] = number(draw, 3, 7.5, zero=6)
    logits = 2 * torch.randn((*shape, vocab), generator=generator)
    spoil(name, logits, labels, options, draw(st.sampled_from([None, math.nan, math.inf])))
    upstream = torch.randn(shape, generator=generator) if reduction == "none" else 1.0
    dtype = draw(st.sampled_from([torch.float32, *DTYPES]))
    return SFTCase(name, logits.to(dtype), labels, options, upstream)


def spoil(
    name: str, logits: Tensor, labels: Tensor, options: dict[str, Any], garbage: float | None
) -> None:
    """Garbage in what belongs to rows that do not count."""
    if garbage is None:
        return
    _, rows = naive_sft.loss(name, torch.zeros_like(logits).double(), labels, **options)
    for i, row in enumerate(rows):
        if row.m == 0:
            logits.view(-1, logits.shape[-1])[i] = garbage
            if name in naive_sft.OTHER:
                options[naive_sft.OTHER[name]].view(-1)[i] = garbage


def expected(case: SFTCase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradient by float64 autograd, and the error that each may have.

    log p is off by EPS times what it is computed from, its own size and that of the other model's;
    a formula f and its slope f' by that times their own slopes, which are no larger than the factor
    below times 1 + |f'|. All f here are such: f' is a power of p, of r, or of H.
    """
    leaf = case.logits.double().requires_grad_()
    loss, rows = naive_sft.loss(case.name, leaf, case.labels, **case.options)
    total = ((loss + 0 * leaf.nan_to_num(0, 0, 0).sum()) * case.upstream).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    above = torch.as_tensor(case.upstream).abs().expand(case.labels.shape).reshape(-1).tolist()
    options = case.options
    others = options.get(naive_sft.OTHER.get(case.name, ""), torch.zeros(case.labels.shape))
    curve = 2 + sum(float(options.get(key, 1.0)) for key in ("q", "alpha"))
    curve *= 1 + math.log(leaf.shape[-1])  # of H / log V, at worst
    errors, slopes = [], []
    for row, g, other in zip(rows, above, others.reshape(-1).tolist(), strict=True):
        if row.m == 0:
            errors.append(0.0)
            slopes.append(0.0)
            continue
        logp = row.logprob.detach().requires_grad_()
        own = {k: float(options[k]) for k in ("alpha", "lam", "epsilon", "q") if k in options}
        given = {"entropy": row.entropy, "vocab": leaf.shape[-1], "other": torch.tensor(other)}
        f = naive_sft.FORMULAS[case.name](logp, **given, **own)
        (slope,) = torch.autograd.grad(f, logp)
        reach = 1 + math.log(leaf.shape[-1]) + abs(logp.item()) + abs(other)
        size = EPS * reach * curve * (1 + abs(slope.item()) + abs(f.item()))
        errors.append(abs(row.m) * size)
        slopes.append(g * abs(row.m) * size)
    error = torch.tensor(errors, dtype=torch.float64).reshape(case.labels.shape)
    by_row = torch.tensor(slopes, dtype=torch.float64).reshape(case.labels.shape)
    by_row = by_row[..., None].expand(leaf.shape)
    rounding = ROUNDING[case.logits.dtype] * (gradient.abs() + by_row)
    small = 2.0**-24 * (case.logits.dtype == torch.float16)  # below its normal numbers
    allowed = torch.where(by_row > 0, by_row + rounding + small, 0.0)
    return (
        loss.detach(),
        gradient,
        error if options["reduction"] == "none" else error.sum(),
        allowed,
    )


def check(loss: Tensor, gradient: Tensor, case: SFTCase) -> None:
    """A result against float64."""
    right, slope, error, allowed = expected(case)
    assert loss.dtype == torch.float32 and loss.shape == right.shape
    assert gradient.dtype == case.logits.dtype and gradient.shape == slope.shape
    assert ((loss.double() - right).abs() <= error).all(), (loss, right, error)
    assert ((gradient.double() - slope).abs() <= allowed).all(), (gradient, slope, allowed)
