"""token_stats beside log_softmax, gather and entropy, and linear_token_stats beside its product.

1024 rows over 128256 columns in float32; hidden states of width 512.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl

from .contest import Contest, Contestant

ROWS, VOCAB, WIDTH = 1024, 128256, 512
CHUNKS = (None, 64)
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # log-likelihood and entropy


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def ours(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = irl.token_stats(logits, labels)
    assert stats.entropy is not None
    return stats.logprob, stats.entropy


def forward(name: str, statistics: Statistics, logits: Tensor, labels: Tensor) -> Contestant:
    @torch.no_grad()
    def run(_: None) -> object:
        return statistics(logits, labels)

    return Contestant(name, run)


def step(name: str, statistics: Statistics, logits: Tensor, labels: Tensor) -> Contestant:
    """The gradient of a policy's loss with a bonus of entropy."""

    def prepare() -> None:
        logits.grad = None

    def run(_: None) -> None:
        logprob, entropy = statistics(logits, labels)
        (-logprob.mean() - 0.01 * entropy.mean()).backward()

    return Contestant(name, run, prepare)


@pytest.mark.benchmark(group="token statistics")
@pytest.mark.parametrize("what", [forward, step])
def test_token_stats(what, benchmark, report, threads, pytestconfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, ROWS, VOCAB, generator=generator).requires_grad_(what is step)
    labels = torch.randint(VOCAB, (1, ROWS), generator=generator)
    contest = Contest(
        [
            what("token_stats", ours, logits, labels),
            what("log_softmax, gather, entropy", eager, logits, labels),
        ],
        warmup=1,
    )
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["token_stats"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    title = f"{what.__name__}, float32 {ROWS} x {VOCAB}, {threads} threads, {rounds} rounds"
    report(title, results)


@pytest.mark.benchmark(group="token statistics of a last layer")
def test_linear_token_stats(benchmark, report, threads, pytestconfig) -> None:
    """Time, beside the bare product into memory that is there already."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    logits = torch.zeros(ROWS, VOCAB)

    def product(_: None) -> None:
        torch.mm(hidden, weight.T, out=logits)

    def linear(chunk: int | None) -> Contestant:
        @torch.no_grad()
        def run(_: None) -> object:
            return irl.linear_token_stats(hidden, weight, labels, chunk_size=chunk)

        return Contestant(f"linear_token_stats, chunk_size={chunk}", run)

    contest = Contest([Contestant("product", product), *map(linear, CHUNKS)], warmup=1)
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["product"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    shape = f"{ROWS} x {WIDTH} x {VOCAB}"
    report(f"forward, float32 {shape}, {threads} threads, {rounds} rounds", results)


# A process of its own, as in bench_memory.py.
PROGRAM = f"""
import sys
import torch
import irl_ops.torch as irl

torch.set_num_threads(2)
chunk = int(sys.argv[1]) or None

def given(rows, width, vocab):
    return torch.ones(rows, width), torch.ones(vocab, width), torch.zeros(rows, dtype=torch.int64)

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x.split()[1] for x in lines if x.startswith(field)))

with torch.no_grad():
    irl.linear_token_stats(*given(4, 8, 16))  # what is loaded once is not the call's
    layer = given({ROWS}, {WIDTH}, {VOCAB})
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from what is held
    before = status("VmRSS")
    irl.linear_token_stats(*layer, chunk_size=chunk)
print((status("VmHWM") - before) / (4 * {ROWS} * {VOCAB}))
"""


@pytest.mark.benchmark(group="token statistics of a last layer")
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc/self/clear_refs")
@pytest.mark.parametrize("chunk", CHUNKS)
def test_peak_memory_of_linear_token_stats(chunk, benchmark) -> None:
    def measure() -> float:
        command = [sys.executable, "-P", "-c", PROGRAM, str(chunk or 0)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    grown = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["peak growth / size of the logits"] = round(grown, 3)
    print(f"peak growth of linear_token_stats, chunk_size={chunk}: {grown:.3f} x the logits")
