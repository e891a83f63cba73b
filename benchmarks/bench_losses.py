"""Loss and gradient of 2 x 512 rows over 32768 columns, beside a copy of the logits and peers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irl_ops.torch as irl

from . import naive
from .contest import Contest, Contestant
from .produced import Produced

SHAPE = (2, 512, 32768)
Loss = Callable[[Tensor, Tensor], Tensor]


def step(loss: Loss, logits: Tensor, labels: Tensor) -> Contestant:
    """Forward and backward to a leaf, whose gradient is allocated in the step."""

    def prepare() -> None:
        logits.grad = None

    return Contestant(loss.__name__, lambda _: loss(logits, labels).backward(), prepare)


def inplace_step(logits: Tensor, labels: Tensor) -> Contestant:
    """The gradient takes the place of logits that lie in memory already."""
    anchor = torch.zeros((), requires_grad=True)
    kept: list[Tensor] = []  # so that no memory is given back to the system while time is taken

    def prepare() -> Tensor:
        produced = Produced.apply(anchor, logits.detach())
        kept[:] = [produced.detach()]
        return produced

    def run(produced: Tensor) -> None:
        irl.iqlearn_loss(produced, labels, inplace=True).backward()

    return Contestant("IQLearn in place", run, prepare)


def named(name: str, loss: Loss) -> Loss:
    loss.__name__ = name
    return loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses(dtype, benchmark, report, threads, pytestconfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(SHAPE, generator=generator)).to(getattr(torch, dtype))
    labels = torch.randint(SHAPE[-1], SHAPE[:-1], generator=generator)
    target = torch.empty_like(logits).fill_(1)  # resident
    leaf = logits.clone().requires_grad_()

    def cross_entropy(q: Tensor, a: Tensor) -> Tensor:
        return F.cross_entropy(q.view(-1, q.shape[-1]), a.view(-1))

    peers = [
        named("IQLearn", lambda q, a: irl.iqlearn_loss(q, a)),
        named("IQLearn, compiled", torch.compile(lambda q, a: irl.iqlearn_loss(q, a))),
        named("MLE", lambda q, a: irl.mle_loss(q, a)),
        named("IQLearn, naive eager", naive.iqlearn_loss),
        named("IQLearn, naive compiled", torch.compile(lambda q, a: naive.iqlearn_loss(q, a))),
        named("cross_entropy, compiled", torch.compile(lambda q, a: cross_entropy(q, a))),
        named("cross_entropy, eager", cross_entropy),
    ]
    contest = Contest(
        [
            Contestant("clone", lambda _: logits.clone()),
            Contestant("copy_", lambda _: target.copy_(logits)),
            inplace_step(logits, labels),
            *(step(loss, leaf, labels) for loss in peers),
        ]
    )
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["clone", "copy_", "MLE", "IQLearn"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    shape = " x ".join(map(str, SHAPE))
    report(f"forward and backward, {dtype} {shape}, {threads} threads, {rounds} rounds", results)
