"""Losses on meshes of hundreds of TPUs that are not here, and what their programs send.

Data, sequence and vocabulary are sharded at once. Of a compiled program every collective is listed,
with the bytes that a chip sends: of a ring, (n - 1)/n of what all n chips hold together in a
gather, twice that of what is added up in a reduction.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import irl_ops.jax as irl

TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x4"}
SHAPE, AXES = (8, 4, 8), ("data", "sequence", "vocab")
BATCH, LENGTH, VOCAB, DEEP, CHUNK = 16, 4096, 131072, 4096, 512
ROWS = BATCH * LENGTH // (SHAPE[0] * SHAPE[1])  # on a chip
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
OPTIONS: dict[str, Any] = dict(
    lam=0.1, gamma=0.99, reduction="sum", vocab_axis="vocab", sequence_axis="sequence"
)


class Collective(NamedTuple):
    """One of a program."""

    kind: str
    chips: int  # that take part together
    size: int  # bytes of the result
    turns: int  # how often it runs: in a loop, once for each chunk

    @property
    def sent(self) -> float:
        """Bytes that a chip sends."""
        share = (self.chips - 1) / self.chips
        part = {"all-reduce": 2 * share, "all-gather": share}.get(self.kind, 1.0)
        return self.turns * self.size * part


class Program(NamedTuple):
    """What the compiler says of a program."""

    collectives: list[Collective]
    temporaries: int  # bytes
    kernels: int  # Mosaic kernels in the lowered program


def judged(on: str, form: str) -> tuple[dict[str, float], int, list[str]]:
    """Bytes that a chip sends for each of its rows, temporaries, and what is wrong.

    Statistics and labels are all that the loss itself may send; a last layer adds the gradients of
    hidden and of weight, one sum each.
    """
    found, problems = compiled(on, form), []
    statistics = 12 * ROWS  # bytes: three numbers
    sums = [ROWS * DEEP * 2, VOCAB // SHAPE[2] * DEEP * 2] if form == "linear" else []
    sent: dict[str, float] = {"statistics and labels": 0.0}
    for one in found.collectives:
        if one.kind == "all-reduce" and one.size in sums:
            sums.remove(one.size)
            name = "hidden" if one.size == ROWS * DEEP * 2 else "weight"
            sent[name] = round(one.sent / ROWS, 1)
        elif one.kind == "all-gather" and one.size <= statistics * one.chips:
            sent["statistics and labels"] += one.sent / ROWS
        elif one.size > 64:
            problems.append(f"{one.kind} of {one.size} bytes")
    sent = {name: round(bytes_, 1) for name, bytes_ in sent.items()}
    problems += [f"no sum of {size} bytes" for size in sums]
    # a last layer also tells the labels' logits beforehand, and the values of first rows
    before = 4 * (SHAPE[2] - 1 + SHAPE[1] - 1) + 1 if form == "linear" else 0
    if sent["statistics and labels"] > 12 * (SHAPE[2] - 1) + 16 * (SHAPE[1] - 1) + before:
        problems.append("bytes of statistics and labels")
    chunk = CHUNK * VOCAB // SHAPE[2] * 2
    weight = VOCAB // SHAPE[2] * DEEP * 2  # the sum over chunks, before it is sent
    if found.temporaries > (2.5 * chunk + weight if form == "linear" else 1536 * ROWS):
        problems.append("memory")
    if not found.kernels:
        problems.append("no kernel")
    return sent, found.temporaries, problems


def compiled(on: str, form: str) -> Program:
    """``form`` is "dense", of logits that are an input, or "linear"."""
    program, given = PROGRAMS[form]
    mesh = mesh_of(on)
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, dtype, axes in given
    ]
    lowered = jax.jit(functools.partial(program, mesh), donate_argnums=0).lower(*inputs)
    executable = lowered.compile()
    return Program(
        collectives(executable.as_text()),
        executable.memory_analysis().temp_size_in_bytes,
        lowered.as_text().count("@tpu_custom_call"),
    )


@functools.cache
def mesh_of(on: str) -> Mesh:
    devices = topologies.get_topology_desc(TOPOLOGIES[on], platform="tpu").devices
    return Mesh(np.array(devices).reshape(SHAPE), AXES)


LOGITS = ("data", "sequence", "vocab")
LABELS = ((BATCH, LENGTH), "int32", ("data", "sequence"))


def dense(mesh: Mesh, logits: jax.Array, labels: jax.Array) -> Any:
    """The loss of the whole batch, and the gradient of the logits."""

    def here(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.lax.psum(irl.iqlearn_loss(logits, labels, **OPTIONS), "data")

    spread = _over(mesh, here, PartitionSpec(*LOGITS))
    return jax.value_and_grad(spread)(logits, labels)


def linear(mesh: Mesh, hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
    """The loss of the whole batch, and the gradients of a last layer."""

    def here(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        loss = irl.linear_iqlearn_loss(
            hidden, weight, labels, chunk_size=CHUNK, accumulate="weight", **OPTIONS
        )
        return jax.lax.psum(loss, "data")

    spread = _over(mesh, here, PartitionSpec(*LOGITS[:2]), PartitionSpec("vocab"))
    return jax.value_and_grad(spread, (0, 1))(hidden, weight, labels)


def _over(mesh: Mesh, here: Callable[..., Any], *specs: PartitionSpec) -> Callable[..., Any]:
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(*specs, PartitionSpec(*LOGITS[:2])),
        out_specs=PartitionSpec(),
    )


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "dense": (dense, (((BATCH, LENGTH, VOCAB), "bfloat16", LOGITS), LABELS)),
    "linear": (
        linear,
        (
            ((BATCH, LENGTH, DEEP), "bfloat16", LOGITS[:2]),
            ((VOCAB, DEEP), "bfloat16", ("vocab",)),
            LABELS,
        ),
    ),
}


KIND = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text."""
    bodies, found, inside = re.findall(r"body=%?([\w.\-]+)", text), [], ""
    for line in text.splitlines():
        begins = re.match(r"%?([\w.\-]+) \(.*\{$", line.removeprefix("ENTRY "))
        inside = begins[1] if begins else inside
        seen = KIND.search(line)
        if seen is None:
            continue
        shapes = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", seen[1])
        sizes = [WIDTHS[t] * math.prod(map(int, filter(None, n.split(",")))) for t, n in shapes]
        started = seen[3] is not None and seen[2] != "all-reduce"
        # what starts a collective returns what it is given too
        size = max(sizes) if started else sum(sizes)
        found.append(
            Collective(seen[2], _chips(line), size, ROWS // CHUNK if inside in bodies else 1)
        )
    return found


def _chips(line: str) -> int:
    """How many chips take part together: of replica_groups={{0,1},...} or [groups,chips]<=..."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(counted[2]) if counted else math.prod(SHAPE)
