"""Losses of a vocabulary sharded over processes: bytes that a rank sends, counted, and time.

    python benchmarks/bench_parallel.py [--ranks 2] [--rows 2048] [--vocab 65536] [--rounds 15]

Processes on gloo, each with its columns of float32 logits, one thread each. Beside MLE and IQLearn
of this library: torch's own loss parallelism, and the formula of Megatron-LM's fused vocabulary-
parallel cross-entropy, written here. A round runs every contestant once, loss and gradient to
fresh memory, in an order drawn anew; the figures are medians over rounds, of the slowest rank's
time.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

import irl_ops.torch as irl

COPY, MLE, IQLEARN = "copy of the logits", "MLE", "IQLearn"
ENTROPY = "IQLearn, entropy"
TORCH, MEGATRON = "torch loss_parallel", "Megatron's formula"
WARM_UP = 2


class Traffic:
    """Messages and bytes that this rank hands to collectives, whoever calls them."""

    NAMES = (  # and which argument is what is sent
        (dist, "all_reduce", 0),
        (dist, "all_gather_single", 1),
        (dist, "all_gather_into_tensor", 1),
        (functional, "all_reduce", 0),
    )

    def __init__(self) -> None:
        self.messages, self.bytes = 0, 0
        self.kept: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Traffic:
        for module, name, sent in self.NAMES:
            if hasattr(module, name):
                function = getattr(module, name)
                self.kept.append((module, name, function))
                setattr(module, name, self.counted(function, sent))
        return self

    def __exit__(self, *_: object) -> None:
        for kept in self.kept:
            setattr(*kept)

    def counted(self, function: Callable[..., Any], sent: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.messages += 1
            self.bytes += args[sent].numel() * args[sent].element_size()
            return function(*args, **kwargs)

        return run


class Megatron(torch.autograd.Function):
    """Cross-entropy of sharded logits in two collectives: MAX, and a packed SUM of two numbers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int) -> Tensor:
        """The loss of every row."""
        top = logits.max(-1).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        shifted = logits - top[..., None]
        local = labels - start
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        picked = shifted.gather(-1, local[..., None])[..., 0].masked_fill(elsewhere, 0.0)
        p = shifted.exp_()
        both = torch.stack([picked, p.sum(-1)])
        dist.all_reduce(both)
        picked, mass = both
        p.div_(mass[..., None])
        ctx.save_for_backward(p, local, elsewhere)
        return mass.log() - picked

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        """softmax - 1{label}, in the memory of the softmax."""
        p, local, elsewhere = ctx.saved_tensors
        p.scatter_add_(-1, local[..., None], (elsewhere.to(p.dtype) - 1)[..., None])
        return p.mul_(above[..., None]), None, None


def contestants(
    logits: Tensor, labels: Tensor, group: Any, mesh: DeviceMesh
) -> dict[str, Callable[[], Any]]:
    """What runs: a loss and its gradient, each."""
    start = dist.get_rank(group) * logits.shape[-1]
    out = torch.empty_like(logits)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        def run() -> None:
            logits.grad = None
            loss(logits).backward()

        return run

    def torch_parallel() -> None:
        logits.grad = None
        sharded = DTensor.from_local(logits, mesh, [Shard(1)])
        target = DTensor.from_local(labels, mesh, [Replicate()])
        with loss_parallel():
            F.cross_entropy(sharded, target).backward()

    return {
        COPY: lambda: out.copy_(logits.detach()),
        MLE: step(lambda x: irl.mle_loss(x, labels, vocab_group=group)),
        IQLEARN: step(lambda x: irl.iqlearn_loss(x, labels, vocab_group=group)),
        ENTROPY: step(lambda x: irl.iqlearn_loss(x, labels, entropy_coef=0.1, vocab_group=group)),
        MEGATRON: step(lambda x: Megatron.apply(x, labels, start).mean()),  # type: ignore[no-untyped-call]
        TORCH: torch_parallel,
    }


def work(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """One process; the first prints."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    group, mesh = dist.group.WORLD, init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(rank)
    width = options.vocab // ranks
    logits = torch.randn(options.rows, width, generator=generator).requires_grad_()
    labels = torch.randint(
        width * ranks, (options.rows,), generator=torch.Generator().manual_seed(0)
    )
    runs = contestants(logits, labels, group, mesh)
    sent, ms = {}, {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(WARM_UP):
            run()
        with Traffic() as traffic:
            run()
        sent[name] = (traffic.messages, traffic.bytes)
    order = random.Random(0)  # the same on every rank
    for _ in range(options.rounds):
        for name in order.sample(list(runs), len(runs)):
            dist.barrier()
            begin = time.perf_counter()
            runs[name]()
            took = torch.tensor((time.perf_counter() - begin) * 1e3)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            ms[name].append(took.item())
    if rank == 0:
        title = f"{options.rows} rows, {width * ranks} columns over {ranks} ranks, float32, gloo"
        Console().print(table(title, sent, ms, options.rows))
    dist.destroy_process_group()


def table(
    title: str, sent: dict[str, tuple[int, int]], ms: dict[str, list[float]], rows: int
) -> Table:
    """Figures of each contestant."""
    out = Table(title=title)
    for heading in ("", "collectives", "bytes per row", "ms", "x copy"):
        out.add_column(heading, justify="right" if heading else "left")
    copy = ms[COPY]
    for name, (messages, count) in sent.items():
        ratio = statistics.median(a / b for a, b in zip(ms[name], copy, strict=True))
        figures = (f"{statistics.median(ms[name]):.1f}", f"{ratio:.2f}")
        out.add_row(name, str(messages), f"{count / rows:.1f}", *figures)
    return out


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ranks", 2), ("rows", 2048), ("vocab", 65536), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(work, (options.ranks, port, options), options.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
