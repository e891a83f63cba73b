"""Loss and gradients of a last layer whose logits are never stored, beside its matrix products.

2 x 1024 rows over 65536 columns, hidden states of width 512, chunks of 256 rows. The floor is what
no such loss can do without: per chunk the product that makes the logits and the two that take their
gradient back, into memory that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irl_ops.torch as irl

from .contest import Contest, Contestant

SHAPE, WIDTH, VOCAB, CHUNK = (2, 1024), 512, 65536, 256
PRODUCTS = "three products"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(hidden: Tensor, weight: Tensor) -> Contestant:
    """The bare products of the same chunks."""
    hidden, weight = hidden.detach().flatten(0, -2), weight.detach()
    logits = hidden.new_zeros(CHUNK, weight.shape[0])
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run(_: None) -> None:
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(logits, weight, out=dhidden[rows])
            dweight.addmm_(logits.t(), hidden[rows])

    return Contestant(PRODUCTS, run, lambda: (dweight.zero_(), None)[1])


def step(name: str, loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Contestant:
    """Forward and backward to leaves, whose gradients are allocated in the step."""

    def prepare() -> None:
        hidden.grad = weight.grad = None

    return Contestant(name, lambda _: loss(hidden, weight, labels).backward(), prepare)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return irl.iqlearn_loss(hidden @ weight.T, labels, inplace=True)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2), labels.flatten())


def torch_linear(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
    given = torch.nn.LinearCrossEntropyOptions(**options)
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    return F.linear_cross_entropy(*flat, options=given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(dtype, benchmark, report, threads, pytestconfig) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5
    hidden, weight = (x.to(getattr(torch, dtype)).requires_grad_() for x in (hidden, weight))
    labels = torch.randint(VOCAB, SHAPE, generator=generator)
    few = labels.clone()
    few[:, : SHAPE[1] * 9 // 10] = -100  # a prompt
    frozen = weight.detach()
    ours = partial(irl.linear_iqlearn_loss, chunk_size=CHUNK)
    whole = {
        "linear IQLearn": ours,
        "linear IQLearn, softcap": partial(ours, softcap=30.0),
        "linear IQLearn, entropy": partial(ours, entropy_coef=0.1),
        "linear MLE": partial(irl.linear_mle_loss, chunk_size=CHUNK),
        "IQLearn of stored logits, in place": dense,
        "cross_entropy, compiled": torch.compile(lambda h, w, y: cross_entropy(h, w, y)),
        "cross_entropy, eager": cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        whole["F.linear_cross_entropy"] = torch_linear
        whole[f"F.linear_cross_entropy, {CHUNK}"] = partial(torch_linear, batch_chunk_size=CHUNK)
    contest = Contest(
        [
            products(hidden, weight),
            *(step(name, loss, hidden, weight, labels) for name, loss in whole.items()),
            step("linear IQLearn, weight frozen", ours, hidden, frozen, labels),
            step("linear IQLearn, 90 % ignored", ours, hidden, weight, few),
        ],
        warmup=1,
    )
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results([PRODUCTS, "linear MLE", "linear IQLearn"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    shape = f"{' x '.join(map(str, SHAPE))} rows, {WIDTH} x {VOCAB}, chunks of {CHUNK}"
    report(f"last layer and loss, {dtype}, {shape}, {threads} threads, {rounds} rounds", results)
