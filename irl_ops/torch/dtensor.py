"""Logits that are a DTensor: their placements say what the options of parallel calls would.

The same of hidden states and a last layer's weight: ``irl_ops.torch.linear_dtensor``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from irl_ops.call import Parallel
from irl_ops.torch.parallel import Columns, Cut, Shards, is_dtensor

_MODULE = "torch.distributed.tensor"  # in sys.modules, since there is a DTensor


class Local(NamedTuple):
    """The part of a DTensor's call that is here; arrays as plain tensors."""

    logits: Tensor
    labels: Any
    is_expert: Any
    options: dict[str, Any]
    shards: Shards


def local_part(
    logits: Any, labels: Any, is_expert: Any, options: dict[str, Any], parallel: Parallel
) -> Local:
    """What is here of a call whose logits are a DTensor.

    Logits may be sharded on the last axis (the vocabulary) and on those of rows, each by one
    dimension of the mesh. Other arrays are DTensors on the same mesh, or plain tensors of all rows
    or of those that are here.

    Raises:
        ValueError: placements that are none of these; options that placements decide about.
    """
    refuse_told("logits", parallel)
    if options.get("inplace"):
        raise ValueError("inplace=True with logits that are a DTensor; accepted: False")
    shards = placed_shards(logits, parallel.vocab_size)
    rows = PlacedRows(logits, shards)
    given = {name: rows.option(name, x) for name, x in options.items()}
    return Local(logits.to_local(), rows.local(labels), rows.local(is_expert), given, shards)


def refuse_told(name: str, parallel: Parallel) -> None:
    """Raises where options say what the placements of ``name`` say."""
    for option in ("vocab_group", "vocab_start", "sequence_group", "sequence_order"):
        if getattr(parallel, option) is not None:
            raise ValueError(
                f"{option} is given with {name} that are a DTensor; accepted: None, since its "
                "placements say where its columns and rows are"
            )


def placed_shards(logits: Any, size: int | None) -> Shards:
    """What this process has of logits, a DTensor or whatever else has a mesh and placements."""
    tensor: Any = sys.modules[_MODULE]
    mesh, last = logits.device_mesh, logits.ndim - 1
    columns: Columns | None = None
    cuts: list[Cut] = []
    for dim, placement in enumerate(logits.placements):
        if isinstance(placement, tensor.Replicate):
            continue
        plain = type(placement) is tensor.Shard
        axis = placement.dim % logits.ndim if plain else -1
        taken = [cut.axis + last for cut in cuts] + ([last] if columns else [])
        if not plain or axis in taken:
            raise ValueError(
                f"logits are a DTensor with placements {logits.placements}; accepted: Replicate "
                "and Shard, each axis sharded by one dimension of the mesh"
            )
        group, sizes = mesh.get_group(dim), _sizes(logits.shape[axis], mesh.size(dim))
        rank = mesh.get_local_rank(dim)
        if axis == last:
            start, whole = sum(sizes[:rank]), size or logits.shape[-1]
            columns = Columns(group, start, max(0, min(sizes[rank], whole - start)), whole)
        else:
            cuts.append(Cut(f"mesh dimension {dim}", group, axis - last, None, sizes))
    return Shards(columns, tuple(cuts))


def _sizes(length: int, ranks: int) -> tuple[int, ...]:
    """As Shard cuts: equal pieces rounded up, and what is left of them for the last ranks."""
    most = -(-length // ranks)
    return tuple(max(0, min(most, length - rank * most)) for rank in range(ranks))


class PlacedRows:
    """Takes the rows that are here out of the arrays of a call."""

    def __init__(self, logits: Any, shards: Shards) -> None:
        self.mesh, self.placements = logits.device_mesh, logits.placements
        self.whole, self.shards = logits.shape[:-1], shards
        self.vocab = logits.shape[-1]

    def option(self, name: str, x: Any) -> Any:
        """What is here of an option."""
        if name == "cu_seqlens":
            return x
        if name not in ("extra_ids", "keep_mask") or not isinstance(x, Tensor):
            return self.local(x)
        if is_dtensor(x):
            return self._redistributed(x, columns=name == "keep_mask")
        x, columns = self._cut(x), self.shards.columns
        if name == "keep_mask" and columns is not None and x.shape[-1] == self.vocab:
            sizes = _sizes(self.vocab, dist.get_world_size(columns.group))
            x = x.narrow(-1, columns.start, sizes[dist.get_rank(columns.group)])
        return x

    def local(self, x: Any) -> Any:
        """The rows here of an array ``[..., T]``, or ``[...]``; anything else as it is."""
        if not isinstance(x, Tensor) or x.ndim not in (len(self.whole), len(self.whole) - 1):
            return x
        return self._redistributed(x) if is_dtensor(x) else self._cut(x)

    def _cut(self, x: Tensor) -> Tensor:
        axes = min(x.ndim, len(self.whole))
        if x.ndim == 0 or x.shape[:axes] != self.whole[:axes]:
            return x
        for cut in self.shards.cuts:  # all rows are given: no process has to tell another
            axis = cut.axis + len(self.whole)
            if axis < axes and cut.sizes:
                rank = self.mesh.get_local_rank(self._dimension(axis))
                x = x.narrow(axis, sum(cut.sizes[:rank]), cut.sizes[rank])
        return x

    def _redistributed(self, x: Any, columns: bool = True) -> Tensor:
        """Placed as the logits are; without ``columns`` nothing of the last axis is cut."""
        tensor: Any = sys.modules[_MODULE]
        if x.device_mesh != self.mesh:
            raise ValueError(
                f"an array is a DTensor on {x.device_mesh}; accepted: {self.mesh}, where the "
                "logits are"
            )
        axes = x.ndim if columns else x.ndim - 1
        wanted = [
            p if isinstance(p, tensor.Shard) and p.dim % (len(self.whole) + 1) < axes
            else tensor.Replicate()
            for p in self.placements
        ]  # fmt: skip
        local: Tensor = x.redistribute(placements=wanted).to_local()
        return local

    def _dimension(self, axis: int) -> int:
        tensor: Any = sys.modules[_MODULE]
        return next(
            i for i, p in enumerate(self.placements)
            if isinstance(p, tensor.Shard) and p.dim % (len(self.whole) + 1) == axis
        )  # fmt: skip
