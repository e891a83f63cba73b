"""Loss and gradient on a GPU, beside a copy of the logits and other libraries.

    python benchmarks/gpu_bench.py [--vocabs 32000 128256] [--rows 4096] [--dtypes bfloat16]

Each round runs every contestant once, in an order drawn anew, between two events on the device, and
with the L2 cache flushed before. The figures are medians over rounds, and the ratios medians of the
ratios within a round; "host ms" is what the host takes to launch a run, without waiting. Peers
that are not installed, or do not fit in memory, are named as such.
Writes benchmarks/results/bench-gpu-DEVICE.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import naive
import torch
import torch.nn.functional as F
from contest import Contestant
from produced import Produced
from rich.console import Console
from rich.table import Table
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.torch.backends import BACKENDS

VOCABS, ROWS, DTYPES = (
    (32000, 50257, 128256, 151936, 262144),
    (4096, 16384),
    ("bfloat16", "float32"),
)
FLUSH = 1 << 29  # bytes written before each run, several times any L2 cache
HEAD_START = 4  # times that they are written: meanwhile the host gets ahead of the device
WARM_UP, ROUNDS = 3, 15
COMPILED_ROWS = 4096  # what is compiled anew for every shape runs with the fewest rows alone

COPY, OURS, MLE, INPLACE, KERNEL = "copy", "IQLearn", "MLE", "IQLearn in place", "the kernel alone"
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Shape:
    """One contest: what ran, its figures, and what could not run."""

    dtype: str
    rows: int
    vocab: int
    ms: dict[str, float] = field(default_factory=dict)
    host_ms: dict[str, float] = field(default_factory=dict)
    ratio_to_copy: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run the contests that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("bench-gpu needs a GPU that torch can use, and there is none here", file=sys.stderr)
        return 1
    console, shapes = Console(width=120), []
    about = machine(device)
    for dtype in options.dtypes:
        for rows in options.rows:
            for vocab in options.vocabs:
                shape = run(Shape(dtype, rows, vocab), device, options.rounds)
                shapes.append(shape)
                console.print(table(shape))
                write(options.out / f"bench-gpu-{about['name']}.json", about, shapes)
    draw(options.out / f"bench-gpu-{about['name']}.png", about, shapes)
    console.print(verdicts(shapes))
    return 0


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure must not be quoted without."""
    module = torch.get_device_module(device)
    name = module.get_device_name() if device.type != "cpu" else "cpu"
    packages = ("torch", "triton", "liger-kernel", "quack-kernels")
    return {
        "device": name,
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "platform": torch.version.cuda or torch.version.hip or device.type,
        "versions": {p: version(p) for p in packages},
    }


def version(package: str) -> str | None:
    """Of an installed package; Triton's own word, since a newer one may lie first on the path."""
    if package == "triton" and importlib.util.find_spec("triton"):
        return str(importlib.import_module("triton").__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(shape: Shape, device: torch.device, rounds: int) -> Shape:
    """Play all rounds of one shape."""
    try:
        contestants = enter(shape, device)
    except torch.OutOfMemoryError:
        shape.absent["everything"] = "out of memory"
        return shape
    flush = torch.empty(FLUSH if device.type != "cpu" else 8, dtype=torch.uint8, device=device)
    for contestant in list(contestants):  # warm up, and leave out what cannot run
        try:
            shape.peak_mb[contestant.name] = peak(contestant, device)
            for _ in range(WARM_UP):
                contestant.run(contestant.prepare())
        except Exception as error:  # a peer may fail in any way: its own words are the result
            shape.absent[contestant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            shape.peak_mb.pop(contestant.name, None)
            contestants.remove(contestant)
        gc.collect()
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    hosts: dict[str, list[float]] = {c.name: [] for c in contestants}
    order = random.Random(0)
    for _ in range(rounds):
        for contestant in order.sample(contestants, len(contestants)):
            try:
                ms, host_ms = milliseconds(contestant, flush, device)
            except torch.OutOfMemoryError:  # it fitted beside other neighbours
                shape.absent[contestant.name] = "out of memory"
                shape.peak_mb.pop(contestant.name)
                contestants.remove(contestant)
            else:
                times[contestant.name].append(ms)
                hosts[contestant.name].append(host_ms)
    for name in (c.name for c in contestants):
        shape.ms[name] = statistics.median(times[name])
        shape.host_ms[name] = statistics.median(hosts[name])
        shape.ratio_to_copy[name] = statistics.median(
            a / b for a, b in zip(times[name], times[COPY], strict=True)
        )
    return shape


def milliseconds(
    contestant: Contestant, flush: Tensor, device: torch.device
) -> tuple[float, float]:
    """One run between two events, on a cold L2 cache; and what the host took to launch it."""
    prepared = contestant.prepare()
    if device.type == "cpu":  # the tests' way in: everything runs, nothing is timed
        contestant.run(prepared)
        return 1.0, 1.0
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    for _ in range(HEAD_START):
        flush.zero_()
    begin.record()
    start = time.perf_counter()
    kept = contestant.run(prepared)
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    del kept, prepared
    return float(begin.elapsed_time(end)), 1e3 * host


def peak(contestant: Contestant, device: torch.device) -> float:
    """Megabytes that a run holds at most, beside what lay there before."""
    prepared = contestant.prepare()
    if device.type == "cpu":
        contestant.run(prepared)
        return 0.0
    module = torch.get_device_module(device)
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    contestant.run(prepared)
    module.synchronize()
    return float(module.max_memory_allocated() - before) / 1e6


def enter(shape: Shape, device: torch.device) -> list[Contestant]:
    """Everyone who takes part; why others do not goes to ``shape.absent``."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(
        1, shape.rows, shape.vocab, dtype=getattr(torch, shape.dtype), device=device
    )
    logits.normal_(0, 3, generator=generator)
    labels = torch.randint(shape.vocab, (1, shape.rows), generator=generator, device=device)
    target, leaf = torch.empty_like(logits), logits.requires_grad_()
    backend = "triton"

    def step(name: str, loss: Loss) -> Contestant:
        def prepare() -> None:
            leaf.grad = None

        return Contestant(name, lambda _: loss(leaf, labels).backward(), prepare)

    def peer_step(name: str, loss: Loss) -> Contestant:
        """On a copy of the logits: some write their gradient over them."""

        def fresh() -> Tensor:
            leaf.grad = None  # room for the copy
            return logits.detach().clone().requires_grad_()

        return Contestant(name, lambda q: loss(q, labels).backward(), fresh)

    def iqlearn(q: Tensor, a: Tensor) -> Tensor:
        return irl.iqlearn_loss(q, a, backend=backend)

    def produced() -> Tensor:
        leaf.grad = None
        return Produced.apply(anchor, logits.detach())

    def flat(loss: Loss) -> Loss:
        return lambda q, a: loss(q.view(-1, q.shape[-1]), a.view(-1))

    anchor = torch.zeros((), requires_grad=True)
    alpha, beta = (
        torch.ones(1, shape.rows, device=device),
        torch.zeros(1, shape.rows, device=device),
    )
    contestants = [
        Contestant(COPY, lambda _: target.copy_(logits.detach())),
        Contestant(
            KERNEL,
            lambda _: BACKENDS[backend].row_stats_grad(logits.detach(), alpha, beta, None, target),
        ),
        step(OURS, iqlearn),
        step(MLE, lambda q, a: irl.mle_loss(q, a, backend=backend)),
        Contestant(
            INPLACE,
            lambda q: irl.iqlearn_loss(q, labels, inplace=True, backend=backend).backward(),
            produced,
        ),
        step("IQLearn, naive", naive.iqlearn_loss),
        step("cross_entropy", flat(F.cross_entropy)),
    ]
    compiled = {
        "IQLearn, naive, compiled": naive.iqlearn_loss,
        "cross_entropy, compiled": flat(F.cross_entropy),
    }
    for name, loss in compiled.items():
        if shape.rows != COMPILED_ROWS:
            shape.absent[name] = f"runs with {COMPILED_ROWS} rows alone"
        else:
            torch.compiler.reset()
            contestants.append(step(name, torch.compile(loss, dynamic=False)))
    for name, module, function in (
        ("Liger", "liger_kernel.transformers.functional", "liger_cross_entropy"),
        ("QuACK", "quack.cross_entropy", "cross_entropy"),
    ):
        try:
            peer = getattr(importlib.import_module(module), function)
        except Exception as error:  # not installed, or not for this device
            shape.absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            contestants.append(peer_step(name, flat(mean_of(peer))))
    return contestants


def mean_of(loss: Callable[..., Any]) -> Loss:
    """A peer's loss as one number, whatever it returns beside it."""

    def mean(q: Tensor, a: Tensor) -> Tensor:
        result = loss(q, a)
        result = result[0] if isinstance(result, tuple) else result
        return result.mean()

    return mean


def table(shape: Shape) -> Table:
    """The figures of one shape."""
    out = Table(
        title=f"{shape.dtype}, {shape.rows} x {shape.vocab}: loss and gradient",
        title_justify="left",
        caption="; ".join(f"{name}: {why}" for name, why in shape.absent.items()),
        caption_justify="left",
    )
    for heading in ("", "ms", "x copy", "x IQLearn", "host ms", "peak MB"):
        out.add_column(heading, justify="right" if heading else "left")
    for name, ms in sorted(shape.ms.items(), key=lambda item: item[1]):
        to_ours = f"{ms / shape.ms[OURS]:.2f}" if OURS in shape.ms else ""
        to_copy = f"{shape.ratio_to_copy[name]:.2f}"
        host, peak_mb = f"{shape.host_ms[name]:.3f}", f"{shape.peak_mb[name]:.0f}"
        out.add_row(name, f"{ms:.3f}", to_copy, to_ours, host, peak_mb)
    return out


def verdicts(shapes: list[Shape]) -> Table:
    """What the library sets out to reach, and whether it did; the worst shape decides."""
    out = Table(title="targets", title_justify="left")
    for heading in ("", "wanted", "measured", "at", ""):
        out.add_column(heading)

    def row(what: str, wanted: float, at_most: bool, figures: dict[str, float]) -> None:
        if not figures:
            out.add_row(what, f"{wanted}", "did not run", "", "open")
            return
        where, worst = (max if at_most else min)(figures.items(), key=lambda item: item[1])
        met = worst <= wanted if at_most else worst >= wanted
        sign = "<=" if at_most else ">="
        out.add_row(what, f"{sign} {wanted}", f"{worst:.3f}", where, "met" if met else "MISSED")

    def compared(one: str, other: str, keep: Callable[[Shape], bool] = lambda s: True) -> dict:
        return {
            f"{s.dtype} {s.rows} x {s.vocab}": s.ms[one] / s.ms[other]
            for s in shapes
            if keep(s) and one in s.ms and other in s.ms
        }

    row("IQLearn / copy, bfloat16, V < 160k", 1.15, True,
        compared(OURS, COPY, lambda s: s.dtype == "bfloat16" and s.vocab < 160_000))  # fmt: skip
    row("IQLearn / copy, bfloat16, V = 262144", 1.25, True,
        compared(OURS, COPY, lambda s: s.dtype == "bfloat16" and s.vocab >= 160_000))  # fmt: skip
    row("IQLearn / MLE", 1.01, True, compared(OURS, MLE))
    row("IQLearn / its kernel alone", 1.05, True, compared(OURS, KERNEL))
    row("Liger / MLE", 1.5, False, compared("Liger", MLE))
    row("QuACK / MLE", 1.2, False, compared("QuACK", MLE))
    row("cross_entropy, compiled / MLE", 2.0, False, compared("cross_entropy, compiled", MLE))
    row("IQLearn, naive, compiled / IQLearn", 2.0, False,
        compared("IQLearn, naive, compiled", OURS))  # fmt: skip
    return out


def write(path: Path, about: dict[str, Any], shapes: list[Shape]) -> None:
    """After every shape, so that an interrupted run leaves what it measured."""
    path.parent.mkdir(exist_ok=True)
    result = {"machine": about, "results": [asdict(shape) for shape in shapes]}
    path.write_text(json.dumps(result, indent=2) + "\n")


def draw(path: Path, about: dict[str, Any], shapes: list[Shape]) -> None:
    """Times over that of a copy, by V; one panel for each dtype and number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(s.dtype, s.rows) for s in shapes})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for (dtype, rows), axis in zip(panels, axes[0], strict=True):
        mine = [s for s in shapes if (s.dtype, s.rows) == (dtype, rows)]
        for name in dict.fromkeys(name for s in mine for name in s.ms):
            points = [(s.vocab, s.ratio_to_copy[name]) for s in mine if name in s.ms]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{dtype}, {rows} rows", xlabel="V", xscale="log", yscale="log")
        axis.set_ylabel("loss + gradient, times a copy")
        axis.grid(alpha=0.25)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(about["device"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
