"""What torch.compile costs a loss: the same pass, and code of the compiler around it.

A step on more and more rows over 32768 columns, compiled and not. The difference in milliseconds
says what that code costs, and the ratio what is left of it beside the pass.
"""

from __future__ import annotations

import pytest
import torch

import irl_ops.torch as irl

from .bench_losses import named, step
from .contest import Contest, Contestant

COLUMNS = 32768


@pytest.mark.parametrize("rows", [1024, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled(dtype, rows, benchmark, report, threads, pytestconfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, rows // 2, COLUMNS, generator=generator)).to(getattr(torch, dtype))
    labels = torch.randint(COLUMNS, logits.shape[:-1], generator=generator)
    leaf = logits.clone().requires_grad_()
    torch._dynamo.reset()  # one shape at a time, as in training
    compiled = torch.compile(lambda q, a: irl.iqlearn_loss(q, a), fullgraph=True)
    contest = Contest(
        [
            Contestant("clone", lambda _: logits.clone()),
            step(named("IQLearn", lambda q, a: irl.iqlearn_loss(q, a)), leaf, labels),
            step(named("IQLearn, compiled", compiled), leaf, labels),
        ]
    )
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["IQLearn"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    report(f"compiled, {dtype}, {rows} x {COLUMNS}, {threads} threads, {rounds} rounds", results)
