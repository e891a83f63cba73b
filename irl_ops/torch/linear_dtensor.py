"""Hidden states and a last layer's weight that are DTensors, as tensor parallelism leaves them.

``ColwiseParallel`` shards a weight [V, D] on its rows, the columns of the logits. Hidden states may
be whole on that mesh, or cut along their rows, as sequence parallelism leaves them: those are
gathered over the processes that have columns, and stay cut over all others.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from irl_ops.call import Parallel
from irl_ops.torch.dtensor import PlacedRows, placed_shards, refuse_told
from irl_ops.torch.parallel import Shards, is_dtensor


class Local(NamedTuple):
    """The part of a call that is here, in plain tensors."""

    hidden: Tensor
    weight: Tensor
    labels: Any
    is_expert: Any
    options: dict[str, Any]
    shards: Shards


class _Logits(NamedTuple):
    """In the place of logits [..., T, V] that would be a DTensor."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """As a tensor's."""
        return len(self.shape)


def local_part(
    hidden: Any,
    weight: Any,
    labels: Any,
    is_expert: Any,
    options: dict[str, Any],
    parallel: Parallel,
) -> Local:
    """What is here of a call whose ``hidden`` [..., T, D] or ``weight`` [V, D] are DTensors.

    On each dimension of the mesh weight is sharded on its rows or whole, and hidden is sharded on
    an axis of its rows or whole. A plain tensor among them is the same on the whole mesh; a plain
    weight and an ``accumulate`` get the gradient of the rows here.

    Raises:
        ValueError: other placements, two meshes, or options that placements decide about.
    """
    name = "weight" if is_dtensor(weight) else "hidden"
    refuse_told(name, parallel)
    tensor: Any = sys.modules["torch.distributed.tensor"]
    mesh = (weight if is_dtensor(weight) else hidden).device_mesh
    bias: Any = options.get("bias")
    whole = (tensor.Replicate(),) * mesh.ndim
    for what, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if is_dtensor(x) and x.device_mesh != mesh:
            raise ValueError(f"{what} is a DTensor on {x.device_mesh}; accepted: {mesh}, as {name}")
    columns = weight.placements if is_dtensor(weight) else whole
    if any(p != tensor.Shard(0) for p in columns if not isinstance(p, tensor.Replicate)):
        raise ValueError(
            f"weight is a DTensor with placements {columns}; accepted: Shard(0), its columns of "
            "logits, and Replicate"
        )
    rows = whole
    if is_dtensor(hidden):
        rows = tuple(
            p if isinstance(c, tensor.Replicate) else tensor.Replicate()
            for p, c in zip(hidden.placements, columns, strict=True)
        )
        hidden = hidden.redistribute(placements=rows)
    last = hidden.ndim - 1
    if any(isinstance(p, tensor.Shard) and p.dim % hidden.ndim == last for p in rows):
        raise ValueError(
            f"hidden is a DTensor with placements {rows}; accepted: Replicate, and Shard of an "
            "axis of its rows"
        )
    placements = tuple(
        p if isinstance(c, tensor.Replicate) else tensor.Shard(last)
        for p, c in zip(rows, columns, strict=True)
    )
    logits = _Logits(mesh, placements, (*hidden.shape[:-1], weight.shape[0]))
    shards = placed_shards(logits, parallel.vocab_size)
    groups = [
        mesh.get_group(i) for i, p in enumerate(placements)
        if isinstance(p, tensor.Shard) and p.dim % (last + 1) != last
    ]  # fmt: skip
    here = PlacedRows(logits, shards)
    given = {n: x if n in ("bias", "accumulate") else here.option(n, x) for n, x in options.items()}
    accumulate: Any = given.get("accumulate")
    if is_dtensor(accumulate):
        given["accumulate"] = accumulate.to_local()
    if bias is not None:
        given["bias"] = _of_columns(bias, mesh, columns, groups)
    if is_dtensor(hidden):
        hidden = hidden.to_local()
    weight = _of_columns(weight, mesh, columns, groups)
    return Local(hidden, weight, here.local(labels), here.local(is_expert), given, shards)


def _of_columns(x: Any, mesh: Any, columns: tuple[Any, ...], groups: list[Any]) -> Tensor:
    """The part here of a weight or bias, whose gradient is that of the rows of all processes."""
    tensor: Any = sys.modules["torch.distributed.tensor"]
    if not is_dtensor(x):
        plain: Tensor = x
        if all(isinstance(p, tensor.Replicate) for p in columns):
            return plain
        x = tensor.DTensor.from_local(x, mesh, [tensor.Replicate()] * mesh.ndim, run_check=False)
    local: Tensor = x.redistribute(placements=columns).to_local()
    return _Summed.apply(local, groups) if groups else local  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    """Its gradient is the sum over processes that have other rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[Any]) -> Tensor:
        """As it is."""
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        """One collective for each of the groups."""
        total = above.contiguous().clone()
        for group in ctx.groups:
            dist.all_reduce(total, group=group)
        return total, None
