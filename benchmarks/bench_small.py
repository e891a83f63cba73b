"""Fixed costs: small logits, whose arithmetic takes no longer than the way to it.

Calls on 4 x 128 rows over 64 columns, all but one of them eager, beside F.cross_entropy's. One time
is that of a hundred calls, so that a table's milliseconds are tens of microseconds per call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irl_ops.torch as irl

from .contest import Contest, Contestant

SHAPE, CALLS = (4, 128, 64), 100
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.view(-1, SHAPE[-1]), labels.view(-1), reduction=reduction)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "IQLearn": lambda q, a: irl.iqlearn_loss(q, a),
    "IQLearn, metrics": lambda q, a: irl.iqlearn_loss(q, a, return_metrics=True)[0],
    "IQLearn, compiled": torch.compile(lambda q, a: irl.iqlearn_loss(q, a), fullgraph=True),
    "MLE": lambda q, a: irl.mle_loss(q, a),
    "cross_entropy, none": lambda q, a: cross_entropy(q, a, "none").sum(),
    "IQLearn, none": lambda q, a: irl.iqlearn_loss(q, a, reduction="none").sum(),
    "token_stats": lambda q, a: irl.token_stats(q, a).reward.sum(),
}


def step(name: str, loss: Loss, logits: Tensor, labels: Tensor) -> Contestant:
    """Forward and backward to a leaf."""

    def run(_: None) -> None:
        for _ in range(CALLS):
            logits.grad = None
            loss(logits, labels).backward()

    return Contestant(name, run)


def forward(name: str, loss: Loss, logits: Tensor, labels: Tensor) -> Contestant:
    @torch.no_grad()
    def run(_: None) -> None:
        for _ in range(CALLS):
            loss(logits, labels)

    return Contestant(name, run)


@pytest.mark.benchmark(group="fixed costs at 4 x 128 x 64")
@pytest.mark.parametrize("what", [step, forward])
def test_small(what, benchmark, report, threads, pytestconfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(SHAPE, generator=generator)).requires_grad_(what is step)
    labels = torch.randint(SHAPE[-1], SHAPE[:-1], generator=generator)
    contest = Contest([what(name, loss, logits, labels) for name, loss in LOSSES.items()])
    rounds = 10 * pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["cross_entropy", "IQLearn"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    shape = " x ".join(map(str, SHAPE))
    title = f"{CALLS} calls, {what.__name__}, float32 {shape}, {threads} threads, {rounds} rounds"
    report(title, results)
