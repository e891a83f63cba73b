"""Instruction bundles of the Pallas kernels' inner loops, as libtpu schedules them.

A TPU core issues one bundle a cycle, so that the bundles a register of logits takes are a lower
bound on its time, at a clock that the schedule does not know. Run as a program, this file compiles
the kernels in a process whose libtpu writes its schedules to a folder; ``bundles`` reads them.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

KERNELS = {"row_stats": 1, "row_grad": 2, "row_stats_grad": 2}  # reads and writes of the logits
ROWS, VOCAB = 256, 65536
LINE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+((?:(?:LH|LB|LE|PB|PF|CT)[: ]?\s*)*):\s*((?:>\s*)*)\{")


class Loops(NamedTuple):
    """The inner loops of a kernel, which walk a row chunk by chunk."""

    bundles: float  # per register of 8 x 128 logits
    spills: int  # stores and loads of spilled registers in them


class Bundle(NamedTuple):
    begins: bool  # a loop
    depth: int
    text: str


def bundles(on: str, dtype: str, registers: int) -> dict[str, Loops]:
    """Of every kernel, on a generation that has ``registers`` of logits in flight."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, __file__, on, dtype]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return {name: _loops(Path(folder), name, registers) for name in KERNELS}


def _loops(folder: Path, kernel: str, registers: int) -> Loops:
    (file,) = (
        path
        for path in folder.glob(f"*-irl_{kernel}.1-*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    lines = [(m, line) for line in file.read_text().splitlines() if (m := LINE.match(line))]
    listing = [Bundle("LB" in m[1], m[2].count(">"), line) for m, line in lines]
    inner = [
        body
        for start, bundle in enumerate(listing)
        if bundle.begins
        and _exponentials(body := _body(listing, start)) >= registers
        and not any(b.begins for b in body[1:])
    ]
    if not inner:
        raise ValueError(f"{file.name}: no loop with {registers} exponentials")
    spills = sum("_spill" in b.text for body in inner for b in body)
    return Loops(sum(map(len, inner)) / registers, spills)


def _body(listing: list[Bundle], start: int) -> list[Bundle]:
    """A loop's own bundles; some of the loop around it may be scheduled among them."""
    depth = listing[start].depth
    rest = itertools.takewhile(
        lambda bundle: not (bundle.begins and bundle.depth <= depth), listing[start + 1 :]
    )
    return [listing[start], *(bundle for bundle in rest if bundle.depth >= depth)]


def _exponentials(body: list[Bundle]) -> int:
    return sum(b.text.count("vpow2") + b.text.count("vexp") for b in body)


def compile_kernels(on: str, dtype: str) -> None:
    """Each once, on rows that are already there."""
    import jax
    from jax.sharding import SingleDeviceSharding
    from tpu_programs import topology

    from irl_ops.jax import pallas
    from irl_ops.kernels.pallas.generations import generation
    from irl_ops.kernels.pallas.row_grad import row_grad

    device = topology(on).devices[0]
    sharding = SingleDeviceSharding(device)
    q = jax.ShapeDtypeStruct((ROWS, VOCAB), dtype, sharding=sharding)
    y = jax.ShapeDtypeStruct((ROWS,), "int32", sharding=sharding)
    f = jax.ShapeDtypeStruct((ROWS,), "float32", sharding=sharding)
    of = generation(device.device_kind)
    jax.jit(pallas.row_stats).lower(q, y).compile()
    jax.jit(pallas.row_stats_grad).lower(q, f, f).compile()
    # the kernel itself, also where pallas.row_grad leaves the gradient to XLA
    jax.jit(lambda *given: row_grad(*given, of=of)).lower(q, y, f, f, f, f, f).compile()


if __name__ == "__main__":
    compile_kernels(*sys.argv[1:])
